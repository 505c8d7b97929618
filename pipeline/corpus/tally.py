"""Counts of token rows, made while they are written and summed over shards: rows, ids, lengths, targets."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.rows import RowStatus

LISTED_TARGETS = 1000
_WORD = 2**64


@dataclass(frozen=True)
class SplitSummary:
    counts: dict[str, int]
    """Rows by status: "ok", "null", "empty", "input_long", "target_long"; other statuses if there are such rows."""
    digest: str
    """Digest of the multiset of row ids: the same rows in any files give the same digest."""

    @property
    def rows(self) -> int:
        return sum(self.counts.values())


@dataclass(frozen=True)
class RowTally:
    """Rows by status, and sums over their ids modulo 2**64, which do not depend on the order of rows."""

    counts: tuple[int, ...]
    ids: int
    squares: int

    def __add__(self, other: "RowTally") -> "RowTally":
        counts = tuple(a + b for a, b in zip(self.counts, other.counts, strict=True))
        return RowTally(counts, (self.ids + other.ids) % _WORD, (self.squares + other.squares) % _WORD)

    @property
    def summary(self) -> SplitSummary:
        # Sums do not depend on order, and count duplicates. The ids are hashes already.
        digest = hashlib.sha256(f"{sum(self.counts)} {self.ids} {self.squares}".encode()).hexdigest()
        # The newer statuses occur with few models and tokenizers. Other corpora keep the counts that they always had.
        met = [status for status in RowStatus if status <= RowStatus.TARGET_LONG or self.counts[status]]
        return SplitSummary({status.name.lower(): self.counts[status] for status in met}, digest)


NO_ROWS = RowTally((0,) * len(RowStatus), 0, 0)


def tally_rows(ids: npt.NDArray[np.uint64], statuses: npt.NDArray[np.int8]) -> RowTally:
    """`[N]` ids and statuses of rows -> their tally."""
    counts = tuple(np.bincount(statuses, minlength=len(RowStatus)).tolist())
    with np.errstate(over="ignore"):
        return RowTally(counts, int(ids.sum(dtype=np.uint64)), int((ids * ids).sum(dtype=np.uint64)))


@dataclass(frozen=True)
class ShardTally:
    """Counts of one token shard, or of several together."""

    rows: RowTally
    input_tokens: int
    target_tokens: int
    longest_input: int
    longest_target: int
    targets: Mapping[str, tuple[int, int]] | None
    """Each different target of usable rows with its least and greatest row id; None if above LISTED_TARGETS."""

    def __add__(self, other: "ShardTally") -> "ShardTally":
        return ShardTally(
            self.rows + other.rows,
            self.input_tokens + other.input_tokens,
            self.target_tokens + other.target_tokens,
            max(self.longest_input, other.longest_input),
            max(self.longest_target, other.longest_target),
            _merged(self.targets, other.targets),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "ShardTally":
        rows, targets = plain["rows"], plain["targets"]
        read = {
            "rows": RowTally(tuple(rows["counts"]), rows["ids"], rows["squares"]),
            "targets": None if targets is None else {target: (low, high) for target, (low, high) in targets.items()},
        }
        return ShardTally(**{**plain, **read})


EMPTY_TALLY = ShardTally(NO_ROWS, 0, 0, 0, 0, {})


def tally_table(table: pa.Table) -> ShardTally:
    """The tally of one table with SHARD_SCHEMA."""
    lengths = {side: pc.list_value_length(table[f"{side}_ids"]) for side in ("input", "target")}
    return ShardTally(
        tally_rows(table["row_id"].to_numpy(), table["status"].to_numpy()),
        pc.sum(lengths["input"]).as_py() or 0,
        pc.sum(lengths["target"]).as_py() or 0,
        pc.max(lengths["input"]).as_py() or 0,
        pc.max(lengths["target"]).as_py() or 0,
        _targets(table),
    )


def manifest_figures(total: ShardTally) -> dict[str, Any]:
    """A shard folder's counts for its manifest, so that nobody has to read the rows for them."""
    summary = total.rows.summary
    targets = None if total.targets is None else dict(sorted(total.targets.items()))
    return {
        "rows": summary.rows,
        "counts": summary.counts,
        "corpus_digest": summary.digest,
        "input_tokens": total.input_tokens,
        "target_tokens": total.target_tokens,
        "longest_input": total.longest_input,
        "longest_target": total.longest_target,
        "distinct_targets": None if targets is None else list(targets),
        "target_ids": targets,
    }


def _targets(table: pa.Table) -> dict[str, tuple[int, int]] | None:
    usable = table.select(["row_id", "target"]).filter(pc.equal(table["status"], int(RowStatus.OK)))
    found = usable.group_by("target").aggregate([("row_id", "min"), ("row_id", "max")])
    if found.num_rows > LISTED_TARGETS:
        return None
    columns = (found[name].to_pylist() for name in ("target", "row_id_min", "row_id_max"))
    return {target: (low, high) for target, low, high in zip(*columns, strict=True)}


def _merged(
    one: Mapping[str, tuple[int, int]] | None, other: Mapping[str, tuple[int, int]] | None
) -> Mapping[str, tuple[int, int]] | None:
    if one is None or other is None:
        return None
    merged = dict(one)
    for target, (low, high) in other.items():
        mine = merged.get(target, (low, high))
        merged[target] = min(low, mine[0]), max(high, mine[1])
    return merged if len(merged) <= LISTED_TARGETS else None
