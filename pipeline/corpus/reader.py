"""Token shards -> `TokenSet`: one split, sorted by row id.

The order is the same on every rank, however rows are spread over shards, so a step's batch is a pure function of seed
and step.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.rows import SHARD_SCHEMA, RowStatus
from pipeline.corpus.tally import NO_ROWS, SplitSummary, tally_rows
from pipeline.errors import CorpusError
from pipeline.sealed_files import DamagedError, file_digest, open_json

MANIFEST = "manifest.json"
_UNSEALED = (
    *("key", "made_from", "files", "rows", "counts", "corpus_digest", "input_tokens", "target_tokens"),
    *("longest_input", "longest_target", "distinct_targets", "target_ids"),
)
_ID_SPACE = 2**64
_BATCH_ROWS = 8192
_ID_ROWS = 2**18
_FIRST_BITS = 20

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class SplitRef:
    """The rows of a shard folder whose id lies in [fraction_from, fraction_to) of all ids.

    Ids are hashes of a row's texts. So a split by id is random, copies of a row are in the same split, and a row stays
    in its split when others are added.
    """

    dir: str
    fraction_from: float = 0.0
    fraction_to: float = 1.0

    @property
    def id_range(self) -> tuple[int, int]:
        """First id of the split and first id behind it; splits that share a fraction share this number."""
        return int(self.fraction_from * _ID_SPACE), int(self.fraction_to * _ID_SPACE)

    @property
    def is_whole(self) -> bool:
        return self.id_range == (0, _ID_SPACE)


@dataclass(frozen=True)
class TokenSet:
    """A split in memory, N rows sorted by id: flat token arrays and the offsets of the rows in them."""

    row_ids: UInt64
    input_tokens: Int32
    input_offsets: Int64
    target_tokens: Int32
    target_offsets: Int64
    targets: pa.LargeStringArray

    def __len__(self) -> int:
        return len(self.row_ids)

    def input_ids(self, row: int) -> Int32:
        """[T] token ids; a read-only view."""
        return self.input_tokens[self.input_offsets[row] : self.input_offsets[row + 1]]

    def target_ids(self, row: int) -> Int32:
        """[T] token ids, separator and eos included; a read-only view."""
        return self.target_tokens[self.target_offsets[row] : self.target_offsets[row + 1]]

    def head(self, rows: int) -> "TokenSet":
        """The first rows, which are a fixed random subset."""
        rows = min(rows, len(self))
        inputs, targets = self.input_offsets[: rows + 1], self.target_offsets[: rows + 1]
        tokens = self.input_tokens[: inputs[-1]], self.target_tokens[: targets[-1]]
        return TokenSet(self.row_ids[:rows], tokens[0], inputs, tokens[1], targets, self.targets[:rows])

    def target(self, row: int) -> str:
        """The target's text as the template rendered it."""
        text: str = self.targets[row].as_py()
        return text

    @cached_property
    def rows_by_target(self) -> Mapping[str, Int64]:
        """The row numbers of each different target, sorted by target."""
        codes = self.targets.dictionary_encode()
        of_row = codes.indices.to_numpy()
        numbers = {target: np.flatnonzero(of_row == code) for code, target in enumerate(codes.dictionary.to_pylist())}
        return dict(sorted(numbers.items()))

    @property
    def input_lengths(self) -> Int32:
        """[N] tokens per input."""
        return np.diff(self.input_offsets).astype(np.int32)

    @property
    def target_lengths(self) -> Int32:
        """[N] tokens per target."""
        return np.diff(self.target_offsets).astype(np.int32)


def open_split(ref: SplitRef, limit: int | None = None) -> TokenSet:
    """Read a split's usable rows, sorted by row id. `limit` keeps the first of them, which are a fixed random subset.

    Raises: CorpusError when the shards are missing.
    """
    low, high = ref.id_range
    if limit is not None:
        # Rows beyond the limit are dropped batch by batch, so that a large split is not read whole for a few rows.
        high = min(high, _id_after(ref, limit))
    tables = [batch.filter(pa.array(_usable(batch, low, high))) for batch in _batches(ref, SHARD_SCHEMA.names)]
    return token_set(pa.Table.from_batches(tables, schema=SHARD_SCHEMA), limit)


def rows_at(ref: SplitRef, numbers: Sequence[int] | npt.NDArray[np.int64]) -> tuple[TokenSet, Int64]:
    """Rows of a split by their numbers `[N]` in `open_split` -> these rows, and the place `[N]` of each among them.

    Copies of a row are one row here. The memory is that of these rows, however many the split has: its files are read
    three times instead. Raises: CorpusError when the shards are missing.
    """
    low, high = ref.id_range
    wanted = _ids_at(ref, np.asarray(numbers, np.int64))
    left, taken = np.unique(wanted), []
    for batch in _batches(ref, SHARD_SCHEMA.names):
        usable = np.flatnonzero(_usable(batch, low, high))
        found, first = np.unique(batch["row_id"].to_numpy()[usable], return_index=True)
        here = np.isin(found, left)
        taken.append(batch.take(pa.array(usable[first[here]])))
        left = np.setdiff1d(left, found[here])
    rows = token_set(pa.Table.from_batches(taken, schema=SHARD_SCHEMA))
    return rows, np.searchsorted(rows.row_ids, wanted)


def token_set(table: pa.Table, limit: int | None = None) -> TokenSet:
    """Rows with SHARD_SCHEMA, all of them usable, sorted by row id; `limit` keeps the first ones."""
    # 64-bit offsets first: a whole split may hold more tokens than 32-bit offsets can address.
    wide = {
        "input_ids": pa.large_list(pa.int32()),
        "target_ids": pa.large_list(pa.int32()),
        "target": pa.large_string(),
    }
    table = table.cast(pa.schema([field.with_type(wide.get(field.name, field.type)) for field in SHARD_SCHEMA]))
    order = pc.sort_indices(table["row_id"])[:limit]
    taken = {name: table[name].take(order) for name in table.column_names}
    columns = {
        name: pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
        for name, column in taken.items()
    }
    input_tokens, input_offsets = _flat(columns["input_ids"])
    target_tokens, target_offsets = _flat(columns["target_ids"])
    return TokenSet(
        columns["row_id"].to_numpy(), input_tokens, input_offsets, target_tokens, target_offsets, columns["target"]
    )


def summarise_split(ref: SplitRef) -> SplitSummary:
    """Count a split's rows by status, and digest their ids. The manifest has both for a whole folder."""
    manifest = _manifest(ref)
    if ref.is_whole and "corpus_digest" in manifest:
        return SplitSummary(manifest["counts"], manifest["corpus_digest"])
    tally = NO_ROWS
    low, high = ref.id_range
    for batch in _batches(ref, ["row_id", "status"], _ID_ROWS):
        ids, statuses = batch["row_id"].to_numpy(), batch["status"].to_numpy()
        inside = _inside(ids, low, high)
        tally += tally_rows(ids[inside], statuses[inside])
    return tally.summary


def unique_targets(ref: SplitRef) -> Iterator[str]:
    """Each different target of the split's usable rows, once; stop early to bound time and memory."""
    low, high = ref.id_range
    listed = _manifest(ref).get("target_ids")
    # The manifest lists each target's least and greatest id. They decide for a split that begins at the least of all
    # ids, or ends at the greatest; for another one the rows must be read.
    if listed is not None and (low == 0 or high == _ID_SPACE):
        yield from (target for target, (first, last) in listed.items() if (first < high if low == 0 else last >= low))
        return
    seen: set[str] = set()
    for batch in _batches(ref, ["row_id", "status", "target"]):
        for target in pc.unique(batch["target"].filter(pa.array(_usable(batch, low, high)))).to_pylist():
            if target not in seen:
                seen.add(target)
                yield target


def unencodable_targets(ref: SplitRef) -> Iterator[str]:
    """The targets of a whole folder's rows that the tokenizer cannot encode, in the order of the files."""
    return _refused_targets(ref, RowStatus.TARGET_UNSAYABLE)


def changed_targets(ref: SplitRef) -> Iterator[str]:
    """The targets of a whole folder's rows that the chat template changes, in the order of the files."""
    return _refused_targets(ref, RowStatus.TARGET_CHANGED)


def _refused_targets(ref: SplitRef, status: RowStatus) -> Iterator[str]:
    if not summarise_split(ref).counts.get(status.name.lower()):
        return
    for batch in _batches(ref, ["status", "target"]):
        lost = batch["status"].to_numpy() == status
        yield from batch["target"].filter(pa.array(lost)).to_pylist()


def count_targets(ref: SplitRef) -> Iterator[tuple[str, int]]:
    """(target, number of usable rows that have it), batch by batch: a target may come more than once.

    Raises: CorpusError when the shards are missing.
    """
    low, high = ref.id_range
    for batch in _batches(ref, ["row_id", "status", "target"]):
        counts = pc.value_counts(batch["target"].filter(pa.array(_usable(batch, low, high))))
        yield from zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)


def target_tokens(ref: SplitRef, target: str) -> list[int]:
    """The tokens, eos included, of a target that a usable row has.

    Raises: CorpusError when the shards are missing, or no row has it.
    """
    low, high = ref.id_range
    for batch in _batches(ref, ["row_id", "status", "target_ids", "target"]):
        having = pc.and_(pa.array(_usable(batch, low, high)), pc.equal(batch["target"], target))
        place = pc.index(having, True).as_py()
        if place >= 0:
            tokens: list[int] = batch["target_ids"][place].as_py()
            return tokens
    raise CorpusError(f"no usable row in {ref.dir} has the target {target!r}; run the job again to build the shards")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a complete shard folder; None when the folder is missing or half-built, or a shard is gone."""
    try:
        manifest = open_json((Path(folder) / MANIFEST).read_bytes(), _UNSEALED)
        sizes = {name: (Path(folder) / name).stat().st_size for name in manifest["files"]}
    except (OSError, DamagedError, KeyError, TypeError):
        return None
    return manifest if sizes == manifest["files"] else None


def is_whole(folder: str | Path) -> bool:
    """Whether a shard folder is complete and every shard has its digest. Reads all of it."""
    manifest = read_manifest(folder)
    return manifest is not None and not any(_is_damaged(Path(folder) / name, manifest) for name in manifest["files"])


def _is_damaged(shard: Path, manifest: Mapping[str, Any]) -> bool:
    digests = manifest.get("digests")  # earlier versions wrote none
    if digests is None:
        return False
    status = shard.stat()
    return digests.get(shard.name) != _digest(shard, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _digest(shard: Path, *version: int) -> str:
    """The file's digest, computed once for each version of it, since a split is read several times."""
    return file_digest(shard)


def _id_after(ref: SplitRef, limit: int) -> int:
    """The smallest id bound below which at least `limit` usable rows lie; the split's end if there are fewer."""
    # Ids and statuses are two small columns, so this pass is cheap beside reading tokens.
    low, high = ref.id_range
    ids = np.concatenate(
        [np.empty(0, np.uint64)]
        + [batch["row_id"].to_numpy()[_usable(batch, low, high)] for batch in _batches(ref, ["row_id", "status"])]
    )
    return int(np.partition(ids, limit - 1)[limit - 1]) + 1 if 0 < limit <= len(ids) else high


def _ids_at(ref: SplitRef, numbers: Int64) -> UInt64:
    """The ids `[N]` of the usable rows that have these numbers when they are sorted by id."""
    # Ids are hashes, so few of them begin alike. One pass counts by their first bits, which tells how those that are
    # looked for begin, and another one gathers the ids that begin so: the whole split's might not fit into memory.
    counts = np.zeros(2**_FIRST_BITS, np.int64)
    for _, beginnings in _usable_ids(ref):
        counts += np.bincount(beginnings, minlength=len(counts))
    before = np.cumsum(counts) - counts
    assert not len(numbers) or 0 <= numbers.min() <= numbers.max() < counts.sum(), "there is no such row"
    sought = np.searchsorted(before, numbers, side="right") - 1
    among = np.isin(np.arange(len(counts)), sought)
    ids = np.sort(np.concatenate([np.empty(0, np.uint64), *(ids[among[begin]] for ids, begin in _usable_ids(ref))]))
    gathered = np.cumsum(counts * among) - counts * among
    found: UInt64 = ids[gathered[sought] + numbers - before[sought]]
    return found


def _usable_ids(ref: SplitRef) -> Iterator[tuple[UInt64, Int64]]:
    """Ids of usable rows, batch by batch, and the first bits of each as a number."""
    low, high = ref.id_range
    for batch in _batches(ref, ["row_id", "status"], _ID_ROWS):
        ids = batch["row_id"].to_numpy()[_usable(batch, low, high)]
        yield ids, (ids >> np.uint64(64 - _FIRST_BITS)).astype(np.int64)


def _usable(batch: pa.RecordBatch, low: int, high: int) -> npt.NDArray[np.bool_]:
    ok: npt.NDArray[np.bool_] = batch["status"].to_numpy() == RowStatus.OK
    return ok & _inside(batch["row_id"].to_numpy(), low, high)


def _inside(ids: UInt64, low: int, high: int) -> npt.NDArray[np.bool_]:
    # Python integers: numpy 2 compares them exactly, even 2**64, which does not fit into the array's type.
    inside: npt.NDArray[np.bool_] = (ids >= low) & (ids < high)
    return inside


def _manifest(ref: SplitRef) -> dict[str, Any]:
    manifest = read_manifest(ref.dir)
    if manifest is None:
        raise CorpusError(f"the token shards in {ref.dir} are missing or incomplete; run the job again to build them")
    return manifest


def _batches(ref: SplitRef, columns: Sequence[str], rows: int = _BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    manifest = _manifest(ref)
    for name in manifest["files"]:
        if _is_damaged(Path(ref.dir) / name, manifest):
            raise CorpusError(f"the token shard {Path(ref.dir) / name} is damaged; run the job again to rebuild it")
        try:
            with pq.ParquetFile(Path(ref.dir) / name, pre_buffer=False, buffer_size=2**20) as shard:
                yield from shard.iter_batches(rows, columns=list(columns), use_threads=False)
        except pa.ArrowInvalid as error:  # damage in shards without digests is found only here
            damaged = f"the token shard {Path(ref.dir) / name} is damaged"
            raise CorpusError(f"{damaged}; remove the folder and run the job again to rebuild it") from error


def _flat(lists: pa.LargeListArray) -> tuple[Int32, Int64]:
    # Arrow's own buffers, without copying row by row. Offsets of a slice need not begin at 0.
    offsets = lists.offsets.to_numpy()
    return lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]
