"""Settings by size of GPU: valid, within the GPU by the project's own estimate, and as cluster/gpu/README.md counts."""

import re

import pytest
import torch

from pipeline.backbone.memory import MemoryEstimate, estimate_memory
from pipeline.lab.benchmark.shapes import published_config
from pipeline.settings import Settings, parse_settings
from tests.cluster.manifests import CLUSTER, read

GPU = CLUSTER / "gpu"
SHAPES = {"3b": "llama-3b", "7b": "llama-7b", "13b": "llama-13b", "70b": "llama-70b", "70b-on-4": "llama-70b"}
CUDA_GB = 1.0
"""CUDA's context and its libraries' workspaces: assumed, not measured."""
ENTRIES = [(size, name) for size in (24, 40, 80) for name in read(GPU / f"{size}gb.yaml")]


def settings_of(size: int, name: str) -> Settings:
    fragment = read(GPU / f"{size}gb.yaml")[name]
    fragment["model"]["path"] = "model"
    return parse_settings({**fragment, "tasks": {"task": {"train": "train.parquet", "dev": "dev.parquet"}}})


def estimate(settings: Settings, name: str) -> MemoryEstimate:
    cluster = settings.cluster
    ranks = 1 if cluster.partition == "never" else cluster.num_workers
    dtype = getattr(torch, settings.model.dtype)
    return estimate_memory(published_config(SHAPES[name]), True, dtype, ranks, cluster.tokens_per_microbatch)


def row(size: int, name: str) -> tuple[str, float]:
    """A line of the README's table, and its total in GB."""
    settings = settings_of(size, name)
    parts, cluster = estimate(settings, name), settings.cluster
    weights = 0.0 if settings.model.offload == "cpu" else parts.weights / 1e9
    gathered, activations, process = parts.gathered / 1e9, parts.activations / 1e9, parts.parts["the process"] / 1e9
    total = weights + gathered + activations + process + CUDA_GB
    tokens = cluster.tokens_per_microbatch
    a_token = parts.activations / tokens / 1e6
    how = f"{cluster.partition}, offload {settings.model.offload}"
    line = (
        f"| {size} GB | {name} | {cluster.num_workers} | {how} | {weights:.2f} | {gathered:.2f} | "
        f"{tokens:,} × {a_token:.2f} = {activations:.2f} | {process + CUDA_GB:.2f} | {total:.1f} of {size} |"
    )
    return line, total


@pytest.mark.parametrize(("size", "name"), ENTRIES)
def test_a_fragment_is_valid_and_within_its_gpu(size, name):
    settings = settings_of(size, name)
    assert settings.cluster.use_gpu and settings.model.weights == "int8"
    _, total = row(size, name)
    # Not over, and not so far below that the GPU would idle.
    assert 0.75 * size < total <= 0.9 * size


def test_every_size_has_every_model():
    for size in (24, 40, 80):
        assert {"3b", "7b", "13b", "70b"} <= set(read(GPU / f"{size}gb.yaml"))


def test_the_readmes_table_is_what_the_estimate_says():
    table = "\n".join(row(*entry)[0] for entry in ENTRIES)
    written = "\n".join(re.findall(r"^\| \d\d GB .*$", (GPU / "README.md").read_text(), re.M))
    assert written == table, f"it should be:\n{table}"


@pytest.mark.slow
def test_where_the_model_is_whole_partitioning_would_be_a_waste_and_else_it_is_needed():
    for size, name in ENTRIES:
        settings = settings_of(size, name)
        whole = estimate_memory(published_config(SHAPES[name]), True, torch.bfloat16, 1, 64).weights / 1e9
        assert (settings.cluster.partition == "never") == (whole < size / 2)
