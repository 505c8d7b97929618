"""A filter of the settings -> a filter of Arrow's, and the row groups that its statistics leave over.

The language is that of Iceberg's filters, as pyiceberg parses it: comparisons, `in`, `between`, `like 'x%'`, `is null`,
`and`, `or`, `not`. A comparison with null is not true, as in SQL.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
from pyarrow import fs

from pipeline.corpus.row_view import RowFilter
from pipeline.corpus.source_files import SourceFile, one_line
from pipeline.corpus.tables.libraries import lake_library
from pipeline.corpus.values import is_text, plain_type
from pipeline.errors import CorpusError


def parse_where(text: str, columns: Mapping[str, pa.DataType], where: str, of_iceberg: bool = False) -> RowFilter:
    """A filter over columns of these types.

    of_iceberg: `not in` is true of null, as pyiceberg has it in Iceberg's own tables.
    Raises: CorpusError when it is none, or does not fit them."""
    expressions = lake_library("pyiceberg.expressions", f"'where: {text}'", where)
    parser = lake_library("pyiceberg.expressions.parser", f"'where: {text}'", where)
    visitors = lake_library("pyiceberg.expressions.visitors", f"'where: {text}'", where)
    arrow = lake_library("pyiceberg.io.pyarrow", f"'where: {text}'", where)
    try:
        parsed = visitors.rewrite_not(parser.parse(text))
    except Exception as error:  # pyparsing's errors are of many kinds
        raise CorpusError(
            f"{where}: the filter {text!r} cannot be read ({one_line(error)[:200]}); fix 'where'"
        ) from error
    named = _columns_of(parsed)
    for name in named:
        if name not in columns:
            raise CorpusError(
                f"{where}: the filter {text!r} names the column {name!r}, which is not there (there are "
                f"{', '.join(columns)}); fix 'where'"
            )
    try:
        fields = [
            pa.field(name, _filtered_type(columns[name]), metadata={"PARQUET:field_id": str(place)})
            for place, name in enumerate(named, 1)
        ]
        schema = arrow.pyarrow_to_schema(pa.schema(fields), downcast_ns_timestamp_to_us=True)
        exact = parsed if of_iceberg else _null_is_not_true(parsed, expressions)
        bound = visitors.bind(schema, exact, case_sensitive=True)
        return RowFilter(
            text, named, arrow.expression_to_pyarrow(bound, schema), _takes_nan(parsed, columns, expressions)
        )
    except Exception as error:  # pyiceberg has errors of its own for types that Iceberg lacks
        raise CorpusError(
            f"{where}: the filter {text!r} does not fit the columns' types ({one_line(error)[:200]}); fix 'where'"
        ) from error


def without_hopeless_groups(filesystem: fs.FileSystem, file: SourceFile, wanted: RowFilter) -> SourceFile:
    """The file with the filter, and without the row groups that hold no such row by their statistics."""
    assert file.view is not None
    view = replace(file.view, where=wanted, exact=False)
    stored, kinds = dict(view.stored), dict(file.columns)
    # Statistics are of stored values under stored names: of others they would tell nothing, or something wrong.
    plain = all(stored.get(name) == name for name in wanted.columns)
    plain = plain and not wanted.takes_nan
    if file.reader is not None or wanted.expression is None or not plain or not wanted.columns:
        return replace(file, view=view)
    fragment = pads.ParquetFileFormat().make_fragment(file.path, filesystem)
    schema = fragment.physical_schema
    if any(plain_type(schema.field(name).type) != plain_type(kinds[name]) for name in wanted.columns):
        return replace(file, view=view)
    try:
        groups = tuple(group.id for group in fragment.subset(wanted.expression, schema=schema).row_groups)
    except pa.ArrowException:  # of large unsigned numbers, say; the rows themselves are filtered all the same
        return replace(file, view=view)
    rows = min(view.rows, sum(file.row_groups[group][0] for group in groups))
    return replace(file, view=replace(view, row_groups=groups, rows=rows))


def _filtered_type(kind: pa.DataType) -> pa.DataType:
    """The type that a filter compares: Iceberg knows no unsigned numbers, no kinds of texts, and one kind of times."""
    kind = plain_type(kind)
    if is_text(kind):
        return pa.string()
    if pa.types.is_uint64(kind):  # the only integers that a long cannot hold
        return pa.decimal128(20, 0)
    if pa.types.is_time(kind):
        return pa.time64("us")
    if pa.types.is_integer(kind):
        return pa.int64()
    return pa.float32() if pa.types.is_float16(kind) else kind


def _columns_of(parsed: Any) -> tuple[str, ...]:
    """The names in an expression that is not bound yet."""
    parts = [getattr(parsed, side) for side in ("left", "right", "child") if hasattr(parsed, side)]
    own = [parsed.term.name] if hasattr(parsed, "term") else []
    return tuple(dict.fromkeys([*own, *(name for part in parts for name in _columns_of(part))]))


def _takes_nan(parsed: Any, columns: Mapping[str, pa.DataType], expressions: Any) -> bool:
    """Whether some part is true of a float that is not a number: `is nan`, and of comparisons what is not equal."""
    parts = [getattr(parsed, side) for side in ("left", "right", "child") if hasattr(parsed, side)]
    true_of_nan = isinstance(parsed, expressions.NotEqualTo | expressions.NotIn | expressions.IsNaN)
    own = true_of_nan and pa.types.is_floating(plain_type(columns[parsed.term.name]))
    return own or any(_takes_nan(part, columns, expressions) for part in parts)


def _null_is_not_true(parsed: Any, expressions: Any) -> Any:
    """`a not in (…)` is not true of null, as in SQL; pyiceberg's translation to Arrow takes null for no member."""
    if isinstance(parsed, expressions.And | expressions.Or):
        sides = [_null_is_not_true(side, expressions) for side in (parsed.left, parsed.right)]
        return type(parsed)(*sides)
    if isinstance(parsed, expressions.NotIn | expressions.NotStartsWith):
        return expressions.And(parsed, expressions.NotNull(parsed.term))
    return parsed
