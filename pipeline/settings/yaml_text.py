"""Reads YAML as people write it: plain values and their spellings, or one sentence that names the line and the fix.

PyYAML alone takes the last of two equal keys, reads `no` as false and `2026-02-20` as a date, and lets an invalid date,
a very long integer or a deep nesting escape as an exception of its own.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from pipeline.errors import SettingsError

DEEPEST = 50
"""Most levels of nesting; settings have six."""
_MOST_VALUES = 100_000
"""Each alias (`*name`) counts in full: ten lines of them can expand to more values than fit into memory."""
_MOST_BITS = 1024
_KINDS = {"timestamp": "a date", "int": "an integer", "float": "a number", "bool": "a yes or no"}
_TOO_DEEP = f"it is nested more than {DEEPEST} levels deep; no setting is"
_MERGE = "tag:yaml.org,2002:merge"
_FREE_KEYS = ("model", "config")
"""Below it are the keys of a model's configuration, whose names may be numbers."""

Place = tuple[str | int, ...]
Spellings = dict[Place, str]
"""By place, the spelling of values that YAML did not read as text although their writer may have meant text."""


def read_yaml_text(text: str, where: str, place: Place = ()) -> tuple[Any, Spellings]:
    """The value of a YAML document, and the spellings in it; `place` is where the document stands in the settings.

    where: names the document. Raises: SettingsError.
    """
    loader = None
    try:
        loader = _Loader(text)
        value = loader.get_single_data()
        spelt: Spellings = {}
        return _Plain(spelt).of(value, place, 0), spelt
    except SettingsError as error:
        raise SettingsError(f"{where}: {error}") from error
    except yaml.YAMLError as error:
        one_line = re.sub(r"\s+", " ", str(error))
        raise SettingsError(f"{where} is not valid YAML: {one_line}") from error
    except RecursionError as error:
        raise SettingsError(f"{where}: {_TOO_DEEP}") from error
    finally:
        if loader is not None:
            loader.dispose()


def quoted(text: str) -> str:
    """`"no"`: the text in quotes, so that YAML reads it as text."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class _Written:
    """A scalar that YAML does not read as text."""

    value: Any
    text: str
    line: int = field(compare=False)


class _Loader(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == _MERGE:
                continue
            line = _line(key)
            if (key.tag, key.value) in lines:
                first = lines[key.tag, key.value]
                raise SettingsError(f"line {line}: the key '{_shown(key)}' is there twice (line {first}); keep one")
            lines[key.tag, key.value] = line
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep=deep)
        # From an invalid date, an integer of 5,000 digits, `!!bool perhaps`, `!!timestamp soon`.
        except (ValueError, OverflowError, LookupError, AttributeError, TypeError) as error:
            if isinstance(error, SettingsError) or not isinstance(node, yaml.ScalarNode):
                raise
            kind = _KINDS.get(node.tag.rpartition(":")[2], "a value of its kind")
            raise SettingsError(
                f"line {_line(node)}: {_shown(node)} looks like {kind} and is not a valid one; fix it, or put it in "
                f"quotes to mean the text"
            ) from error
        if not isinstance(node, yaml.ScalarNode) or isinstance(value, str | _Written):
            return value
        if isinstance(value, int) and value.bit_length() > _MOST_BITS:
            raise SettingsError(f"line {_line(node)}: {_shown(node)} is an integer too large for any setting; lower it")
        written = self.constructed_objects[node] = _Written(value, node.value, _line(node))
        return written


@dataclass
class _Plain:
    """Turns the loader's values into plain ones, and notes their spellings by place."""

    spelt: Spellings
    values: int = 0

    def of(self, value: Any, place: Place, depth: int) -> Any:
        self.values += 1
        if depth > DEEPEST:
            raise SettingsError(_TOO_DEEP)
        if self.values > _MOST_VALUES:
            raise SettingsError(f"it expands to more than {_MOST_VALUES:,} values; use fewer aliases (*name)")
        if isinstance(value, dict):
            return {self.key(key, place): self.of(item, (*place, _bare(key)), depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.of(item, (*place, at), depth + 1) for at, item in enumerate(value)]
        if isinstance(value, _Written):
            self.spelt[place] = value.text
            return value.value
        return value

    def key(self, key: Any, place: Place) -> Any:
        free = place[: len(_FREE_KEYS)] == _FREE_KEYS and isinstance(_bare(key), int)
        if isinstance(key, _Written) and not free:
            text = key.text or "null"
            read = "" if text == str(key.value) else f", which YAML reads as {_as_read(key.value)},"
            raise SettingsError(f"line {key.line}: the key {text}{read} is not text; put it in quotes: {quoted(text)}")
        return _bare(key)


def _bare(value: Any) -> Any:
    return value.value if isinstance(value, _Written) else value


def _as_read(value: Any) -> str:
    """A value as YAML shows it: `false`, `null`, `2026-02-20`."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _shown(node: yaml.ScalarNode) -> str:
    text = str(node.value)
    return text if len(text) <= 60 else f"{text[:20]}… ({len(text):,} characters)"
