"""ClassLabel columns of Hugging Face `datasets`: integers, with their names in the schema's metadata."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

_NO_LABEL = -1


class UnnamedClassError(ValueError):
    """A column holds a number for which its ClassLabel has no name."""


def named_texts(column: pa.Array, names: Sequence[str]) -> list[str | None]:
    """[B] class numbers -> [B] names; null and -1, which `datasets` writes for "no label", are None.

    Raises: UnnamedClassError.
    """
    texts: list[str | None] = []
    for number in column.to_pylist():
        if number is None or number != number:  # NaN: pandas turns integers with a null into floats
            texts.append(None)
            continue
        if not _NO_LABEL <= number < len(names) or number != int(number):
            raise UnnamedClassError(f"the class {number}, while its ClassLabel has {len(names)} names")
        texts.append(None if number == _NO_LABEL else names[int(number)])
    return texts


def footer_class_names(schema: pa.Schema) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(column, names) of each ClassLabel column; metadata that is not of `datasets`' form gives no names."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        named = {column: _names(feature) for column, feature in features.items()}
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError):
        return ()
    columns = {field.name for field in schema if pa.types.is_integer(field.type) or pa.types.is_floating(field.type)}
    return tuple((column, names) for column, names in named.items() if names and column in columns)


def _names(feature: Any) -> tuple[str, ...]:
    if not isinstance(feature, Mapping) or feature.get("_type") != "ClassLabel":
        return ()
    names = feature.get("names")
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()
