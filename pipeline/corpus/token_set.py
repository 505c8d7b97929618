"""The rows of one split, sorted by row id, as a step sees them: token arrays in memory or in mapped files.

What a rank holds of a mapped split does not grow with its tokens: ids and places of the rows, offsets, tokens and texts
all lie in files, whose pages the system lends to every rank alike and takes back when it likes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
UInt64 = npt.NDArray[np.uint64]
Places = npt.NDArray[np.unsignedinteger]
Numbers = slice | npt.NDArray[np.integer]


@dataclass(frozen=True)
class TokenBlock:
    """Tokens of some rows as they lie in memory or in a mapped file: a flat array, and the rows' offsets in it."""

    tokens: Int32
    offsets: Int32 | Int64
    texts: pa.Array | None = None
    """What the tokens say, for targets."""


@dataclass(frozen=True)
class TokenColumn:
    """One side of N rows, inputs or targets: which row of which block each one is."""

    blocks: Sequence[TokenBlock]
    block_of: Places
    """`[N]`"""
    row_of: Places
    """`[N]`"""

    def __len__(self) -> int:
        return len(self.block_of)

    def __getitem__(self, row: int) -> Int32:
        """[T] token ids; a read-only view."""
        block, place = self.blocks[self.block_of[row]], int(self.row_of[row])
        return block.tokens[block.offsets[place] : block.offsets[place + 1]]

    def text(self, row: int) -> str:
        texts = self.blocks[self.block_of[row]].texts
        assert texts is not None, "inputs have no texts"
        text: str = texts[int(self.row_of[row])].as_py()
        return text

    def take(self, rows: Numbers) -> "TokenColumn":
        """Some of the rows; no token is copied."""
        return TokenColumn(self.blocks, self.block_of[rows], self.row_of[rows])

    def lengths(self) -> Int32:
        """[N] tokens."""
        lengths = np.empty(len(self), np.int32)
        for block, here, places in self._by_block():
            lengths[here] = block.offsets[places + 1] - block.offsets[places]
        return lengths

    def targets(self) -> tuple[list[str], Int32]:
        """The different texts, sorted, and for each row `[N]` which of them it has."""
        numbers: dict[str, int] = {}
        found = np.empty(len(self), np.int32)
        for block, here, places in self._by_block():
            assert block.texts is not None, "inputs have no texts"
            coded = pc.dictionary_encode(block.texts.take(pa.array(places)))
            of_block = [numbers.setdefault(text, len(numbers)) for text in coded.dictionary.to_pylist()]
            found[here] = np.asarray(of_block, np.int32)[coded.indices.to_numpy()]
        texts = sorted(numbers)
        rank = np.empty(len(texts), np.int32)
        rank[[numbers[text] for text in texts]] = np.arange(len(texts), dtype=np.int32)
        return texts, rank[found]

    def _by_block(self) -> Iterator[tuple[TokenBlock, Int64, Int64]]:
        """Each block with the numbers of the rows that are in it, and their places there."""
        order = np.argsort(self.block_of, kind="stable")
        numbers, starts = np.unique(self.block_of[order], return_index=True)
        for number, here in zip(numbers.tolist(), np.split(order, starts)[1:], strict=True):
            yield self.blocks[number], here, self.row_of[here].astype(np.int64)


@dataclass(frozen=True)
class TokenSet:
    """A split's N usable rows, sorted by id."""

    row_ids: UInt64
    inputs: TokenColumn
    targets: TokenColumn

    def __len__(self) -> int:
        return len(self.row_ids)

    def input_ids(self, row: int) -> Int32:
        """[T] token ids; a read-only view."""
        return self.inputs[row]

    def target_ids(self, row: int) -> Int32:
        """[T] token ids, separator and eos included; a read-only view."""
        return self.targets[row]

    def target(self, row: int) -> str:
        """The target's text as the template rendered it."""
        return self.targets.text(row)

    def take(self, rows: Numbers) -> "TokenSet":
        """Some of the rows; no token is copied."""
        return TokenSet(self.row_ids[rows], self.inputs.take(rows), self.targets.take(rows))

    def head(self, rows: int) -> "TokenSet":
        """The first rows, which are a fixed random subset."""
        return self.take(slice(rows))

    @cached_property
    def rows_by_target(self) -> Mapping[str, Int32]:
        """The row numbers of each different target, sorted by target. It takes four bytes a row."""
        texts, of_row = self.targets.targets()
        numbers = np.argsort(of_row, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(of_row, minlength=len(texts)))
        return dict(zip(texts, np.split(numbers, ends[:-1]), strict=True)) if texts else {}

    @property
    def input_lengths(self) -> Int32:
        """[N] tokens per input."""
        return self.inputs.lengths()

    @property
    def target_lengths(self) -> Int32:
        """[N] tokens per target."""
        return self.targets.lengths()


def flat_column(tokens: Int32, offsets: Int32 | Int64, texts: pa.Array | None = None) -> TokenColumn:
    """The rows of one block, in its order; `[N + 1]` offsets."""
    rows = len(offsets) - 1
    block_of = np.broadcast_to(np.uint8(0), rows)  # which takes no room
    return TokenColumn((TokenBlock(tokens, offsets, texts),), block_of, np.arange(rows, dtype=np.uint32))


def blocks_of(batch: pa.RecordBatch) -> tuple[TokenBlock, TokenBlock]:
    """The inputs and the targets of a batch with SHARD_SCHEMA: Arrow's own buffers, of which nothing is copied."""
    inputs, targets = _flat(batch["input_ids"]), _flat(batch["target_ids"])
    return TokenBlock(*inputs), TokenBlock(*targets, batch["target"])


def token_set(table: pa.Table, limit: int | None = None) -> TokenSet:
    """Rows with SHARD_SCHEMA in memory, all of them usable, sorted by row id; `limit` keeps the first ones."""
    batches = table.to_batches()
    ids = np.concatenate([np.empty(0, np.uint64), *(batch["row_id"].to_numpy() for batch in batches)])
    block_of = np.repeat(np.arange(len(batches), dtype=np.uint32), [batch.num_rows for batch in batches])
    row_of = np.concatenate([np.empty(0, np.uint32), *(np.arange(b.num_rows, dtype=np.uint32) for b in batches)])
    inputs, targets = zip(*map(blocks_of, batches), strict=True) if batches else ((), ())
    rows = TokenSet(ids, TokenColumn(inputs, block_of, row_of), TokenColumn(targets, block_of, row_of))
    return rows.take(np.argsort(ids, kind="stable")[:limit])


def _flat(lists: pa.ListArray) -> tuple[Int32, Int32]:
    # Arrow's own buffers, without copying row by row. A slice's offsets lie within those of the whole.
    return lists.values.to_numpy(), lists.offsets.to_numpy()
