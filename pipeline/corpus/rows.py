"""One batch of corpus rows -> the rows of a token shard: a pure function, without Ray and files."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain, compress

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.chat import ModelChat, render_chats
from pipeline.corpus.encoding import (
    Architecture,
    FastTokenizer,
    encode_inputs,
    encode_plain,
    encode_targets,
    unencodable,
)
from pipeline.corpus.template import RenderedRows, TextTemplate, render_rows
from pipeline.corpus.values import OverLong

# A text of more characters than both of these, a thousand for each token, has too many tokens for certain.
_SURE_TEXT, _SURE_TEXT_OF_A_TOKEN = 2**20, 2**10


class RowStatus(IntEnum):
    """Why a row is used or not. Where several hold, the first in this order counts."""

    OK = 0
    NULL = 1
    EMPTY = 2
    INPUT_LONG = 3
    TARGET_LONG = 4
    NO_EMBEDDING = 5
    """It has a token without a row in the model's table of embeddings."""
    TARGET_UNSAYABLE = 6
    """The tokenizer cannot encode it; the row keeps its text."""
    TARGET_CHANGED = 7
    """The chat template would write another text, for example without the white space at its end."""


SHARD_SCHEMA = pa.schema(
    [
        pa.field("row_id", pa.uint64()),
        pa.field("status", pa.int8()),
        pa.field("input_ids", pa.list_(pa.int32())),
        pa.field("target_ids", pa.list_(pa.int32())),
        pa.field("target", pa.string()),
    ]
)


@dataclass(frozen=True)
class Recipe:
    """All that decides a row's tokens besides the tokenizer."""

    input: TextTemplate | ModelChat
    target: TextTemplate | None
    """None for rows without a target: plain text, or `unlabelled` rows."""
    separator: str
    max_input_tokens: int
    max_target_tokens: int
    """Separator and eos included."""
    architecture: Architecture
    embedding_rows: int | None = None
    """Token ids from here on have no embedding; None where the tokenizer has no such id."""
    integer_columns: Mapping[str, str] = field(default_factory=dict)
    """Columns whose floats are written as integers: see `find_integer_columns`."""
    targets_encoded_after_text: bool = False
    """The tokenizer encodes beginnings differently (`encodes_beginnings_differently`), and a target is none."""
    counts_unencodable: bool = False
    """The tokenizer loses some text (`can_lose_text`), and targets that it loses have a status of their own."""
    unlabelled: bool = False
    """The rows are inputs of a task, with the special tokens of inputs. Plain text, which is cut into examples later,
    has none."""

    @property
    def chat(self) -> ModelChat | None:
        return self.input if isinstance(self.input, ModelChat) else None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.input.columns + (self.target.columns if self.target else ())))


def row_identities(inputs: Sequence[str | None], targets: Sequence[str | None]) -> npt.NDArray[np.uint64]:
    """[B] pairs -> [B] 64-bit ids. The order of rows and their splits follow from these and from nothing else."""
    digests = (
        hashlib.blake2b((_canonical(one) + _canonical(other)).encode(), digest_size=8).digest()
        for one, other in zip(inputs, targets, strict=True)
    )
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _canonical(text: str | None) -> str:
    # The length in front makes pairs unambiguous: "ab" and "c" differ from "a" and "bc".
    return "-" if text is None else f"{len(text)}:{text}"


def tokenise_rows(
    recipe: Recipe, tokenizer: FastTokenizer, columns: Mapping[str, Sequence[str | None]], rows: int
) -> pa.Table:
    """Columns of B texts -> a table of B rows with SHARD_SCHEMA; unusable rows have a status and no tokens."""
    inputs = _rendered_inputs(recipe, columns, rows)
    targets = render_rows(recipe.target, columns, rows) if recipe.target else RenderedRows([""] * rows, [False] * rows)
    statuses = _text_statuses(inputs, targets)
    _mark_oversized(statuses, recipe, columns, inputs, targets)
    kept = np.flatnonzero(statuses == RowStatus.OK)
    kept_targets = _texts(targets, statuses)

    # A task's targets are often a few labels, so each different one is encoded once.
    place_of = {target: place for place, target in enumerate(dict.fromkeys(kept_targets))}
    places = np.fromiter(map(place_of.__getitem__, kept_targets), np.int64, len(kept))
    input_ids, target_ids, unencoded = _encode(recipe, tokenizer, _texts(inputs, statuses), list(place_of))
    changed = np.asarray(recipe.chat.changed(list(place_of)) if recipe.chat else [False] * len(place_of), bool)[places]

    input_long = _lengths(input_ids) > recipe.max_input_tokens
    target_long = (_lengths(target_ids) > recipe.max_target_tokens)[places]
    no_embedding = _any_from(recipe.embedding_rows, input_ids) | _any_from(recipe.embedding_rows, target_ids)[places]
    lost = np.asarray(unencoded, bool)[places]
    # In reverse order of precedence: a later assignment wins.
    statuses[kept[changed]] = RowStatus.TARGET_CHANGED
    statuses[kept[lost]] = RowStatus.TARGET_UNSAYABLE
    statuses[kept[no_embedding]] = RowStatus.NO_EMBEDDING
    statuses[kept[target_long]] = RowStatus.TARGET_LONG
    statuses[kept[input_long]] = RowStatus.INPUT_LONG
    used = ~(input_long | target_long | no_embedding | lost | changed)
    used_rows = kept[used]
    row_inputs: list[Sequence[int]] = [()] * rows
    for row, ids in zip(used_rows.tolist(), compress(input_ids, used.tolist()), strict=True):
        row_inputs[row] = ids
    # An empty target stands behind the last one, for rows that are not used.
    target_of = np.full(rows, len(place_of))
    target_of[used_rows] = places[used]
    shown = np.full(rows, len(place_of))
    shown[kept] = np.where(statuses[kept] >= RowStatus.TARGET_UNSAYABLE, places, len(place_of))
    shown[used_rows] = places[used]
    return pa.table(
        {
            "row_id": row_identities(inputs.texts, targets.texts),
            "status": statuses,
            "input_ids": _token_lists(row_inputs),
            "target_ids": _token_lists([*target_ids, ()]).take(pa.array(target_of)),
            "target": pa.array([*place_of, ""], pa.string()).take(pa.array(shown)),
        },
        schema=SHARD_SCHEMA,
    )


def _rendered_inputs(recipe: Recipe, columns: Mapping[str, Sequence[str | None]], rows: int) -> RenderedRows:
    if isinstance(recipe.input, ModelChat):
        return render_chats(recipe.input, columns, rows)
    return render_rows(recipe.input, columns, rows)


def _encode(
    recipe: Recipe, tokenizer: FastTokenizer, inputs: Sequence[str], targets: Sequence[str]
) -> tuple[list[list[int]], list[list[int]], list[bool]]:
    """-> ids of the inputs, ids of the targets, and for each target whether it is lost in its tokens."""
    if recipe.target is None and not recipe.unlabelled:
        return encode_plain(tokenizer, inputs), [[] for _ in targets], [False] * len(targets)
    input_ids = encode_inputs(tokenizer, recipe.architecture, inputs, recipe.chat)
    if recipe.target is None:
        return input_ids, [[] for _ in targets], [False] * len(targets)
    target_ids = encode_targets(tokenizer, recipe.architecture, recipe.separator, targets, recipe.chat)
    lost = [False] * len(targets)
    if recipe.counts_unencodable:
        lost = unencodable(tokenizer, recipe.architecture, recipe.separator, targets, recipe.chat)
    return input_ids, target_ids, lost


def _mark_oversized(
    statuses: npt.NDArray[np.int8],
    recipe: Recipe,
    columns: Mapping[str, Sequence[str | None]],
    inputs: RenderedRows,
    targets: RenderedRows,
) -> None:
    """Mark rows that are certainly over-long, so that they are not tokenised only to count their tokens."""
    sides = (
        (targets, recipe.target, recipe.max_target_tokens, RowStatus.TARGET_LONG),
        (inputs, recipe.input, recipe.max_input_tokens, RowStatus.INPUT_LONG),
    )
    open_rows = statuses == RowStatus.OK
    for rendered, template, most_tokens, status in sides:
        most = max(_SURE_TEXT, _SURE_TEXT_OF_A_TOKEN * most_tokens)
        long = np.fromiter((len(text or "") > most for text in rendered.texts), bool, len(rendered.texts))
        for name in template.columns if template else ():
            long |= np.fromiter((type(cell) is OverLong for cell in columns[name]), bool, len(long))
        statuses[open_rows & long] = status


def _text_statuses(inputs: RenderedRows, targets: RenderedRows) -> npt.NDArray[np.int8]:
    """[B] statuses as far as the texts alone decide them."""
    statuses = np.full(len(inputs.texts), RowStatus.OK, np.int8)
    for side in (inputs, targets):
        statuses[np.asarray(side.blank, bool)] = RowStatus.EMPTY
    for side in (inputs, targets):
        if None in side.texts:
            statuses[[text is None for text in side.texts]] = RowStatus.NULL
    return statuses


def _texts(rendered: RenderedRows, statuses: npt.NDArray[np.int8]) -> list[str]:
    """The texts of the rows that are OK so far."""
    return [text or "" for text in compress(rendered.texts, (statuses == RowStatus.OK).tolist())]


def _lengths(ids: Sequence[Sequence[int]]) -> npt.NDArray[np.int32]:
    return np.fromiter(map(len, ids), np.int32, len(ids))


def _any_from(first: int | None, ids: Sequence[Sequence[int]]) -> npt.NDArray[np.bool_]:
    """[B][T] ids -> [B] whether a row has an id of at least `first`."""
    if first is None:
        return np.zeros(len(ids), bool)
    return np.fromiter((max(row, default=-1) >= first for row in ids), bool, len(ids))


def _token_lists(ids: Sequence[Sequence[int]]) -> pa.ListArray:
    """[B][T] ids as one array of lists, made from flat arrays, which is faster than row by row."""
    offsets = np.zeros(len(ids) + 1, np.int32)
    np.cumsum(_lengths(ids), out=offsets[1:])
    tokens = np.fromiter(chain.from_iterable(ids), np.int32, offsets[-1])
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(tokens))
