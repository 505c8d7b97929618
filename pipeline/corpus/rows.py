"""One batch of corpus rows -> the rows of a token shard. Pure: no Ray, no files."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import pyarrow as pa

from pipeline.corpus.encoding import Architecture, encode_inputs, encode_targets
from pipeline.corpus.template import Template, render


class RowStatus(IntEnum):
    """Why a row is used or not; the first that holds, in this order: null, empty, input long, target long."""

    OK = 0
    NULL = 1
    EMPTY = 2
    INPUT_LONG = 3
    TARGET_LONG = 4


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

    input: Template
    target: Template
    separator: str
    max_input_tokens: int
    max_target_tokens: int
    """Separator and eos included."""
    architecture: Architecture

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.input.columns + self.target.columns))


def row_identity(input_text: str | None, target_text: str | None) -> int:
    """The 64-bit name of a text-to-text pair: order and splits derive from it and from nothing else."""
    canonical = json.dumps([input_text, target_text], ensure_ascii=False).encode()
    return int.from_bytes(hashlib.blake2b(canonical).digest()[:8], "big")


def tokenise_rows(recipe: Recipe, tokenizer: Any, columns: Mapping[str, Sequence[str | None]], rows: int) -> pa.Table:
    """Columns of B texts -> a table of B rows with SHARD_SCHEMA; unusable rows keep a status and no tokens."""
    inputs = [_fill(recipe.input, columns, row) for row in range(rows)]
    targets = [_fill(recipe.target, columns, row) for row in range(rows)]
    statuses = [_text_status(pair) for pair in zip(inputs, targets, strict=True)]
    ids = [row_identity(i.text, t.text) for i, t in zip(inputs, targets, strict=True)]

    kept = [row for row, status in enumerate(statuses) if status == RowStatus.OK]
    input_ids = _spread(rows, kept, encode_inputs(tokenizer, recipe.architecture, [inputs[r].text or "" for r in kept]))
    target_ids = _spread(
        rows,
        kept,
        encode_targets(tokenizer, recipe.architecture, recipe.separator, [targets[r].text or "" for r in kept]),
    )
    for row in kept:
        if len(input_ids[row]) > recipe.max_input_tokens:
            statuses[row] = RowStatus.INPUT_LONG
        elif len(target_ids[row]) > recipe.max_target_tokens:
            statuses[row] = RowStatus.TARGET_LONG
    used = [status == RowStatus.OK for status in statuses]
    return pa.table(
        {
            "row_id": ids,
            "status": [int(status) for status in statuses],
            "input_ids": [tokens if use else [] for tokens, use in zip(input_ids, used, strict=True)],
            "target_ids": [tokens if use else [] for tokens, use in zip(target_ids, used, strict=True)],
            "target": [target.text if use else "" for target, use in zip(targets, used, strict=True)],
        },
        schema=SHARD_SCHEMA,
    )


@dataclass(frozen=True)
class _Filled:
    text: str | None
    """None when a column of the template is null."""
    blank: bool
    """Nothing but white space came out of the columns, or in all."""


def _fill(template: Template, columns: Mapping[str, Sequence[str | None]], row: int) -> _Filled:
    values = {name: value for name in template.columns if (value := columns[name][row]) is not None}
    if len(values) < len(template.columns):
        return _Filled(None, False)
    text = render(template, values)
    # "review: {text}" without a text is as empty as "{text}" without one.
    nothing_in = bool(values) and not any(value.strip() for value in values.values())
    return _Filled(text, nothing_in or not text.strip())


def _text_status(pair: tuple[_Filled, _Filled]) -> RowStatus:
    if any(side.text is None for side in pair):
        return RowStatus.NULL
    return RowStatus.EMPTY if any(side.blank for side in pair) else RowStatus.OK


def _spread(rows: int, places: Sequence[int], tokens: Sequence[list[int]]) -> list[list[int]]:
    spread: list[list[int]] = [[] for _ in range(rows)]
    for place, ids in zip(places, tokens, strict=True):
        spread[place] = ids
    return spread
