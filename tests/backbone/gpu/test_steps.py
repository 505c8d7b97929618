"""A model's whole pass with the kernels for GPUs: by Triton's interpreter on a CPU, and compiled for real GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

import numpy as np
import torch

from pipeline.backbone import gpu, prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.gpu import attention as gpu_attention
from pipeline.backbone.host import host_backbone
from pipeline.backbone.native import attention as native_attention
from pipeline.backbone.native import rows as native_rows
from tests.tiny import VOCAB, make_model

CPU = torch.device("cpu")
# Bytes that a block may have of a streaming multiprocessor's own memory, by compute capability.
SHARED = {75: 64 * 2**10, 80: 163 * 2**10, 90: 227 * 2**10}


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The kernels for GPUs are used on the CPU, where the interpreter runs them, and the CPU's own are not."""
    monkeypatch.setattr(gpu, "runs_on", lambda device: not gpu._given_up)
    monkeypatch.setattr(gpu, "_given_up", False)
    for module in (native_rows, native_attention):
        monkeypatch.setattr(module, "supports", lambda *tensors: False)


def losses_and_gradients(folder, kernels, products="exact"):
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=False, products=products,
        kernels=kernels,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [torch.randn(n, 32, generator=torch.Generator().manual_seed(n), requires_grad=True) for n in (3, 7)]
    rows = prompted.Rows(prompts, [0, 1, 1], [rng.integers(3, VOCAB, n) for n in (5, 2, 9)])
    losses = backbone.run(prompted.target_nll, rows, [rng.integers(3, VOCAB, n) for n in (2, 4, 1)])
    return backbone, losses.detach(), torch.autograd.grad(losses.sum(), prompts)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("products", ["exact", "int8"])
def test_losses_and_gradients_are_those_of_pytorchs_operators(tmp_path, request, family, products):
    folder = make_model(tmp_path, family, scale=3.0)
    _, *expected = losses_and_gradients(folder, False, products)
    request.getfixturevalue("as_on_gpu")
    launched = []
    request.getfixturevalue("monkeypatch").setattr(
        gpu_attention._PackedAttention, "backward", _counting(gpu_attention._PackedAttention.backward, launched)
    )
    backbone, *found = losses_and_gradients(folder, True, products)
    assert backbone.proof.way == "packed" and not gpu._given_up and launched
    # Int8 products round, so a last bit of difference may become a step of quantising.
    close = {"rtol": 1e-4, "atol": 1e-5} if products == "exact" else {"rtol": 0.05, "atol": 0.02}
    for mine, theirs in zip((found[0], *found[1]), (expected[0], *expected[1]), strict=True):
        torch.testing.assert_close(mine, theirs, **close)


def _counting(function, calls):
    def counted(*args):
        calls.append(1)
        return function(*args)

    return staticmethod(counted)


def test_where_a_kernel_fails_pytorchs_operators_take_its_place_and_the_model_runs_packed(
    tmp_path, as_on_gpu, monkeypatch, caplog
):
    def fails(*_):
        raise RuntimeError("no kernel image is available for execution on the device")

    monkeypatch.setattr(gpu_attention, "attend", fails)
    backbone, losses, _ = losses_and_gradients(make_model(tmp_path, "llama", scale=3.0), True)
    assert backbone.proof.way == "packed" and gpu._given_up and losses.isfinite().all()
    assert "no kernel image" in caplog.text


@pytest.mark.processes
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize(("kind", "size"), [("bf16", 64), ("bf16", 128), ("fp16", 128), ("fp32", 64)])
def test_the_kernels_compile_for_gpus_and_fit_their_memory(capability, kind, size):
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([environment.get("PYTHONPATH", ""), str(script.parents[3])])
    command = [sys.executable, str(script), kind, str(size), str(capability)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    for name, found in json.loads(ran.stdout).items():
        assert found["cubin"] > 0 and found["shared"] <= SHARED[capability], name
