"""Token shards -> `TokenSet`: one split, sorted by row id, in files that are mapped and not read.

The order is the same on every rank, however rows are spread over shards, so a step's batch is a pure function of seed
and step.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.row_index import INDEX, open_index
from pipeline.corpus.rows import RowStatus
from pipeline.corpus.tally import NO_ROWS, SplitSummary, tally_rows
from pipeline.corpus.token_set import TokenColumn, TokenSet, UInt64, blocks_of
from pipeline.corpus.writing import MANIFEST, read_shard
from pipeline.errors import CorpusError
from pipeline.sealed_files import DamagedError, file_digest, open_json

_ID_SPACE = 2**64
_digests: dict[tuple[int, ...], str] = {}


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


def open_split(ref: SplitRef, limit: int | None = None) -> TokenSet:
    """Map a split's usable rows, sorted by row id. `limit` keeps the first of them, which are a fixed random subset.

    Raises: CorpusError when the shards are missing or damaged.
    """
    batches = list(_batches(ref))
    ids, places = open_index(Path(ref.dir) / INDEX)
    # Numpy compares ids exactly only with one of their own type, and 2**64 is none.
    bounds = (np.searchsorted(ids, np.uint64(bound)) if bound < _ID_SPACE else len(ids) for bound in ref.id_range)
    low, high = map(int, bounds)
    rows = slice(low, high if limit is None else min(high, low + limit))
    inputs, targets = zip(*map(blocks_of, batches), strict=True) if batches else ((), ())
    block_of, row_of = places[rows, 0], places[rows, 1]
    return TokenSet(ids[rows], TokenColumn(inputs, block_of, row_of), TokenColumn(targets, block_of, row_of))


def summarise_split(ref: SplitRef) -> SplitSummary:
    """Count a split's rows by status, and digest their ids. The manifest has both for a whole folder."""
    manifest = _manifest(ref)
    if ref.is_whole:
        return SplitSummary(manifest["counts"], manifest["corpus_digest"])
    tally = NO_ROWS
    low, high = ref.id_range
    for batch in _batches(ref):
        ids, statuses = batch["row_id"].to_numpy(), batch["status"].to_numpy()
        inside = _inside(ids, low, high)
        tally += tally_rows(ids[inside], statuses[inside])
    return tally.summary


def unique_targets(ref: SplitRef) -> Iterator[str]:
    """Each different target of the split's usable rows, once; stop early to bound time and memory."""
    low, high = ref.id_range
    listed = _manifest(ref)["target_ids"]
    # The manifest lists each target's least and greatest id. They decide for a split that begins at the least of all
    # ids, or ends at the greatest; for another one the rows must be read.
    if listed is not None and (low == 0 or high == _ID_SPACE):
        yield from (target for target, (first, last) in listed.items() if (first < high if low == 0 else last >= low))
        return
    seen: set[str] = set()
    for batch in _batches(ref):
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
    for batch in _batches(ref):
        lost = batch["status"].to_numpy() == status
        yield from batch["target"].filter(pa.array(lost)).to_pylist()


def count_targets(ref: SplitRef) -> Iterator[tuple[str, int]]:
    """(target, number of usable rows that have it), batch by batch: a target may come more than once.

    Raises: CorpusError when the shards are missing.
    """
    low, high = ref.id_range
    for batch in _batches(ref):
        counts = pc.value_counts(batch["target"].filter(pa.array(_usable(batch, low, high))))
        yield from zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)


def target_tokens(ref: SplitRef, target: str) -> list[int]:
    """The tokens, eos included, of a target that a usable row has.

    Raises: CorpusError when the shards are missing, or no row has it.
    """
    low, high = ref.id_range
    for batch in _batches(ref):
        having = pc.and_(pa.array(_usable(batch, low, high)), pc.equal(batch["target"], target))
        place = pc.index(having, True).as_py()
        if place >= 0:
            tokens: list[int] = batch["target_ids"][place].as_py()
            return tokens
    raise CorpusError(f"no usable row in {ref.dir} has the target {target!r}; run the job again to build the shards")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a complete shard folder; None when the folder is missing or half-built, or a shard is gone."""
    try:
        path = Path(folder) / MANIFEST
        status = path.stat()
        manifest = _opened_manifest(path, status.st_ino, status.st_size, status.st_mtime_ns)
        sizes = {name: os.stat(f"{folder}/{name}").st_size for name in manifest["files"]}
    except (OSError, DamagedError, KeyError, TypeError):
        return None
    return manifest if sizes == manifest["files"] else None


@lru_cache(maxsize=64)
def _opened_manifest(path: Path, *version: int) -> dict[str, Any]:
    """A manifest that is asked for many times while a corpus is checked; nobody may change it."""
    return open_json(path.read_bytes(), ())


def is_whole(folder: str | Path) -> bool:
    """Whether a shard folder is complete and every file has its digest. Reads all of it."""
    manifest = read_manifest(folder)
    return manifest is not None and not any(_is_damaged(Path(folder) / name, manifest) for name in manifest["files"])


def known_digest(file: Path) -> str:
    """The file's digest, computed once for each version of it, since a split is read several times. Raises: OSError."""
    status = file.stat()
    # Not by its path: folders share the shards of source files that did not change.
    version = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if version not in _digests:
        _digests[version] = file_digest(file)
    return _digests[version]


def _is_damaged(file: Path, manifest: Mapping[str, Any]) -> bool:
    digest: str = manifest["digests"][file.name]
    return digest != known_digest(file)


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


def _batches(ref: SplitRef) -> Iterator[pa.RecordBatch]:
    """The batches of all shards, in the order in which the index counts them."""
    manifest, folder = _manifest(ref), Path(ref.dir)
    if _is_damaged(folder / INDEX, manifest):
        raise CorpusError(f"the index of the token shards in {folder} is damaged; run the job again to rebuild it")
    for name in sorted(manifest["files"].keys() - {INDEX}):
        if _is_damaged(folder / name, manifest):
            raise CorpusError(f"the token shard {folder / name} is damaged; run the job again to rebuild it")
        yield from read_shard(folder / name)
