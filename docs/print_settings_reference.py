"""Prints the settings reference, docs/settings.md, from docs/settings.schema.json (`make docs` writes it).

python docs/print_settings_reference.py > docs/settings.md
"""

import json
from pathlib import Path
from typing import Any

SCHEMA = Path(__file__).with_name("settings.schema.json")
HEAD = """\
# Settings

<!-- From docs/print_settings_reference.py: edit the docstrings in pipeline/settings/, then run make schema docs. -->

A settings file is YAML. `jobs/tune_prompts.py`, `jobs/refresh_prompts.py` and `jobs/compare_methods.py` read the same
file, and each job takes the blocks that it needs. This page lists every key with its type, its default and its
meaning. A job refuses an unknown key and suggests the right one.

`--set block.key=value` overrides a key on the command line. An editor completes keys from
[`settings.schema.json`](settings.schema.json), a JSON Schema of the file. `jobs/adapt_backbone.py` has
[settings of its own](adaptation.md). The other jobs read no settings file: their options are on the command line.
"""
LAST = "Next: [corpora](corpora.md).\n"
LARGE = 10**6
"""Bounds from here on only catch mistakes, and are left out."""

Json = dict[str, Any]


def reference(schema: Json) -> str:
    """The page: a section a block, in the order of the file, each followed by the blocks inside it."""
    definitions = schema["$defs"]
    waiting = [(name, definitions[_block(field)]) for name, field in schema["properties"].items()]
    listed = [f"- [`{name}`](#{name}): {_one_line(block['description'])}" for name, block in waiting]
    sections, told = [HEAD, "\n".join(listed) + "\n"], set()
    while waiting:
        place, block = waiting.pop(0)
        if place == "tasks":
            block = _without(block, definitions["TaskDefaults"])
        told.add(block["title"])
        sections.append(_section(place, block))
        inside = {key: definitions[name] for key, field in block["properties"].items() if (name := _block(field))}
        waiting[:0] = [(f"{place}.{key}", inner) for key, inner in inside.items() if inner["title"] not in told]
    return "\n".join([*sections, LAST])


def _without(block: Json, told: Json) -> Json:
    rest = {key: field for key, field in block["properties"].items() if key not in told["properties"]}
    return {**block, "properties": rest}


def _section(place: str, block: Json) -> str:
    required = block.get("required", ())
    keys = [_key(key, field, key in required) for key, field in block["properties"].items()]
    heading = "###" if "." in place else "##"
    return "\n".join([f"{heading} `{place}`", "", _one_line(block["description"]), "", *keys, ""])


def _key(key: str, field: Json, required: bool) -> str:
    default = field.get("default", {} if field.get("type") == "object" else None)
    if required:
        last = "must be given"
    elif _block(field):
        last = "described below"
    else:
        last = f"default `{json.dumps(default, ensure_ascii=False)}`"
    meaning = _one_line(field.get("description", ""))
    return f"- **`{key}`** ({_type(field)}; {last})" + (f": {meaning}" if meaning else "")


def _block(field: Json) -> str | None:
    """The definition that a field refers to."""
    inside = [field, *field.get("anyOf", ()), *field.get("oneOf", ()), *field.get("patternProperties", {}).values()]
    return next((choice["$ref"].rsplit("/", 1)[1] for choice in inside if "$ref" in choice), None)


def _type(field: Json) -> str:
    """A type in words, with its bounds."""
    if choices := field.get("anyOf") or field.get("oneOf"):
        return " or ".join(dict.fromkeys(map(_type, choices)))
    if "const" in field:
        return f"`{field['const']}`"
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    match field.get("type"):
        case "array":
            items = field.get("items", {})
            return "list of mappings" if "$ref" in items else f"list of {_type(items)}"
        case "object":
            return "mapping"
        case "integer" | "number" as number:
            signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
            bounds = [f"{sign} {field[bound]:,}" for bound, sign in signs.items() if field.get(bound, LARGE) < LARGE]
            return " ".join([number, " and ".join(bounds)]).strip()
        case "string":
            return "text"
        case "boolean":
            return "true or false"
        case "null":
            return "null"
    return "block" if "$ref" in field else "any value"


def _one_line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    print(reference(json.loads(SCHEMA.read_text())), end="")
