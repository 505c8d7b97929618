"""Custom resources against the schema of their own definition, as strictly as an API server that refuses what it would
otherwise drop (`kubectl apply --validate=strict`)."""

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

CRDS = Path(__file__).resolve().parents[3] / "shared" / "crds"
_LOOSE = ("additionalProperties", "x-kubernetes-preserve-unknown-fields")


def mistakes(manifest: dict[str, Any]) -> list[str]:
    """`spec.rayVersio: …` for every place where a custom resource does not fit its definition."""
    found = _validator(manifest["kind"], manifest["apiVersion"]).iter_errors(manifest)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:300]}" for error in found]


@cache
def _validator(kind: str, api_version: str) -> Draft202012Validator:
    path = CRDS / f"ray.io_{kind.lower()}s.yaml"
    spec = yaml.load(path.read_text(), Loader=yaml.CSafeLoader)["spec"]  # a megabyte: the loader in C
    assert spec["names"]["kind"] == kind
    served = {f"{spec['group']}/{version['name']}": version for version in spec["versions"] if version["served"]}
    return Draft202012Validator(_strict(served[api_version]["schema"]["openAPIV3Schema"], root=True))


def _strict(schema: Any, root: bool = False) -> Any:
    """The same structural schema with unknown fields refused; of the root, `metadata` is Kubernetes' own."""
    if not isinstance(schema, dict):
        return schema
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(inner) for name, inner in schema["properties"].items()}
    for key in ("items", "additionalProperties"):
        if key in schema:
            strict[key] = _strict(schema[key])
    if root:
        strict["properties"]["metadata"] = {"type": "object"}
    if schema.get("type") == "object" and not any(key in schema for key in _LOOSE):
        strict["additionalProperties"] = False
    return strict
