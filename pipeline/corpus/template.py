"""Templates, which turn a row into text by `"{column}"` placeholders, as in `str.format` but with plain names only."""

import difflib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa

from pipeline.corpus.source_files import ParquetSource, SourceFile
from pipeline.corpus.values import is_printable
from pipeline.errors import CorpusError


@dataclass(frozen=True)
class TextTemplate:
    text: str
    """As written in the settings."""
    pieces: tuple[tuple[str, str | None], ...]
    """(literal text, column after it); None where no column follows."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns used, each once, in the order of their first use."""
        return tuple(dict.fromkeys(column for _, column in self.pieces if column is not None))

    @property
    def literals(self) -> list[str]:
        """The texts before, between and behind the columns."""
        texts = [""]
        for literal, column in self.pieces:
            texts[-1] += literal
            if column is not None:
                texts.append("")
        return texts


def parse_template(text: str, where: str) -> TextTemplate:
    """Raises: CorpusError for unbalanced braces and for anything but a plain column name between them."""
    try:
        parsed = list(string.Formatter().parse(text))
    except ValueError as error:
        message = str(error)
        raise CorpusError(
            f"{where}: the template {text!r} is broken ({message[:1].lower()}{message[1:]}); "
            "write {column} for a column, {{ and }} for braces"
        ) from error
    pieces: list[tuple[str, str | None]] = []
    for literal, column, spec, conversion in parsed:
        # In str.format a digit alone is a position; here it can only be a column's name.
        if column is not None and (not column or spec or conversion or any(mark in column for mark in ".[]{}")):
            raise CorpusError(
                f"{where}: the template {text!r} may hold plain column names only, such as {{text}}; "
                "give the column that name in the Parquet file"
            )
        pieces.append((literal, column))
    return TextTemplate(text, tuple(pieces))


def render_row(template: TextTemplate, values: Mapping[str, str]) -> str:
    """Fill in one row's values; every column of the template must be there."""
    return "".join(literal + (values[column] if column is not None else "") for literal, column in template.pieces)


@dataclass(frozen=True)
class RenderedRows:
    texts: Sequence[str | None]
    """[B]; None where a column of the template is null."""
    blank: Sequence[bool]
    """[B]: whether the columns gave nothing but white space; False where the text is None."""


def render_rows(template: TextTemplate, columns: Mapping[str, Sequence[str | None]], rows: int) -> RenderedRows:
    """Fill in the values of `rows` rows, column by column; the texts are those of `render_row`."""
    names = [column for _, column in template.pieces if column is not None]
    if not names:
        text = render_row(template, {})
        return RenderedRows([text] * rows, [_is_blank(text)] * rows)
    if template.pieces == (("", names[0]),):
        texts = columns[names[0]]
        return RenderedRows(texts, [text is not None and _is_blank(text) for text in texts])
    braced = (
        literal.replace("{", "{{").replace("}", "}}") + "{}" * (name is not None) for literal, name in template.pieces
    )
    fill = "".join(braced).format
    filled = list(zip(*(columns[name] for name in names), strict=True))
    texts = [None if None in values else fill(*values) for values in filled]
    # "review: {text}" without a text is as empty as "{text}" without one.
    blank = [None not in values and all(map(_is_blank, values)) for values in filled]
    return RenderedRows(texts, blank)


def _is_blank(text: str | None) -> bool:
    return not text or text.isspace()


def check_columns(source: ParquetSource, templates: Sequence[TextTemplate]) -> None:
    """Raises: CorpusError when a file lacks a column that a template names, or holds one that is not text or number."""
    for template in templates:
        for name in template.columns:
            for file in source.files:
                _check_column(source.where, template, name, file)


def check_class_names(sources: Sequence[ParquetSource], templates: Sequence[TextTemplate]) -> None:
    """Raises: CorpusError when two files, of any splits, have different class names for a column's numbers."""
    for name in dict.fromkeys(name for template in templates for name in template.columns):
        files = [(source.where, file, dict(file.columns).get(name)) for source in sources for file in source.files]
        numbered = [
            (where, file)
            for where, file, kind in files
            if kind is not None and (pa.types.is_integer(kind) or pa.types.is_floating(kind))
        ]
        for (_, one), (where, other) in pairwise(numbered):
            names = [dict(file.class_names).get(name) for file in (one, other)]
            if names[0] != names[1]:
                described = [
                    "no names" if these is None else f"the names {', '.join(map(repr, these))}" for these in names
                ]
                raise CorpusError(
                    f"{where}: the numbers of the column {name!r} have {described[1]} in {other.path} and "
                    f"{described[0]} in {one.path}; write both with the same ClassLabel, or the column as text"
                )


def _check_column(where: str, template: TextTemplate, name: str, file: SourceFile) -> None:
    if name not in file.column_names:
        close = difflib.get_close_matches(name, file.column_names, n=1, cutoff=0.5)
        fix = f"did you mean {{{close[0]}}}?" if close else "fix the template or the file"
        raise CorpusError(
            f"{where}: the template {template.text!r} names the column {name!r}, which {file.path} does not have "
            f"(it has {', '.join(file.column_names)}); {fix}"
        )
    times = [own for own, _ in file.columns].count(name)
    if times > 1:
        raise CorpusError(
            f"{where}: {file.path} has {times} columns of the name {name!r}, which the template {template.text!r} "
            "names; rename all but one of them"
        )
    kind = dict(file.columns).get(name)
    if kind is not None and not is_printable(kind):
        raise CorpusError(
            f"{where}: the column {name!r} of {file.path} has the type {kind}, which is neither text nor number; "
            "write it as a string"
        )
