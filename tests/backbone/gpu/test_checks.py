"""The checks of `jobs/benchmark.py gpu` on Triton's kernels, by Triton's interpreter on a CPU."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

import torch

from pipeline.backbone import gpu
from pipeline.backbone.gpu import attention as gpu_attention
from pipeline.lab.benchmark.gpu_checks import (
    attention_checks,
    gate_checks,
    linear_checks,
    row_checks,
    run_checks,
    triton_is_missing,
)

CPU = torch.device("cpu")


def some_checks():
    """Of each kind; the interpreter takes minutes for all."""
    yield from list(linear_checks(CPU, "triton", small=True))[1:9:3]
    yield from [check for check in row_checks(CPU, "triton", small=True) if "1030" not in check[0]][::5]
    yield from [check for check in gate_checks(CPU, "triton") if "gradients" in check[0]]
    of_attention = list(attention_checks(CPU, "triton", small=True))
    yield from [check for check in of_attention if "one token" in check[0] or "prompts given, a tree" in check[0]]
    yield from [check for check in of_attention if "given, 3 and 3 heads" in check[0]]


def ran(checks):
    found = []
    with gpu.used(True):
        run_checks(found.append, checks)
    return found


def test_tritons_kernels_are_within_the_bounds_of_float64():
    assert triton_is_missing(CPU) is None
    found = ran(some_checks())
    assert len(found) > 30 and [entry for entry in found if not entry["passed"]] == []


def test_an_attention_that_is_off_is_found(monkeypatch):
    usual = gpu_attention.attend
    monkeypatch.setattr(gpu_attention, "attend", lambda *given: usual(*given) * 1.001)
    checks = [check for check in attention_checks(CPU, "triton", small=True) if "one token" in check[0]]
    found = [entry for entry in ran(checks) if "float32: output" in entry["check"]]
    assert found and not any(entry["passed"] for entry in found)
