"""The manifests of cluster/, read."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "cluster"
KUBERNETES = CLUSTER / "kubernetes"
IN_IMAGE = "/opt/promptbank/"
"""Where the image has the project."""

_SETTINGS = ("settings.yaml", "kustomization.yaml")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def manifests() -> dict[str, dict[str, Any]]:
    """Every Kubernetes object, by file name."""
    found = {path.name: list(yaml.safe_load_all(path.read_text())) for path in sorted(KUBERNETES.glob("*.yaml"))}
    assert all(len(objects) == 1 for objects in found.values()), "one object a file"
    return {name: objects[0] for name, objects in found.items() if name not in _SETTINGS}


def cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    """The Ray cluster of a RayCluster, RayJob or RayCronJob."""
    match manifest["kind"]:
        case "RayCluster":
            return manifest["spec"]
        case "RayJob":
            return manifest["spec"]["rayClusterSpec"]
        case "RayCronJob":
            return manifest["spec"]["jobTemplate"]["rayClusterSpec"]
    raise AssertionError(manifest["kind"])


def values_of(tree: Any, key: str) -> Iterator[Any]:
    """Every value that stands under `key`, at any depth."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            if name == key:
                yield value
            yield from values_of(value, key)
    elif isinstance(tree, list):
        for value in tree:
            yield from values_of(value, key)


def pod_templates(tree: Any) -> Iterator[dict[str, Any]]:
    """Every pod template: what has metadata and a spec with containers."""
    if isinstance(tree, dict):
        if "containers" in (tree.get("spec") or {}):
            yield tree
        for value in tree.values():
            yield from pod_templates(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from pod_templates(value)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)
