"""How many kernels a GPU is asked to launch for a layer, counted on a CPU: PyTorch's operators and Triton's kernels."""

import os
from collections import Counter

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime.interpreter import InterpretedFunction

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from tests.backbone.gpu.test_steps import CPU, as_on_gpu  # noqa: F401 (a fixture)
from tests.tiny import VOCAB, make_model

# They make another view of a tensor, or room for one, and launch nothing.
NOTHING = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "squeeze", "slice", "select"),
    *("permute", "as_strided", "split", "unbind", "empty", "empty_like", "empty_strided", "new_empty", "unflatten"),
    *("_reshape_alias", "lift_fresh", "split_with_sizes"),
}


class Launches(TorchDispatchMode):
    def __init__(self, kernels):
        super().__init__()
        self.found = Counter()
        self.kernels = kernels

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.partition(".")[0]
        if name not in NOTHING:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))


def of_a_layer(tmp_path, monkeypatch):
    """Launches forward and backward that one more layer of a Llama takes, in int8 products."""
    kernels, usual = Counter(), InterpretedFunction.__getitem__

    def counting(kernel, grid):
        run = usual(kernel, grid)

        def counted(*args, **kwargs):
            kernels[kernel.fn.__name__] += 1
            with _disable_current_modes():  # what the interpreter does itself is no launch
                return run(*args, **kwargs)

        return counted

    monkeypatch.setattr(InterpretedFunction, "__getitem__", counting)
    passes = []
    for layers in (1, 2):
        files = find_model(str(make_model(tmp_path / str(layers), "llama", num_hidden_layers=layers)))
        backbone = host_backbone(
            files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=False, products="int8"
        )
        rng = np.random.default_rng(0)
        prompts = [torch.randn(n, 32, requires_grad=True) for n in (3, 7)]
        rows = prompted.Rows(prompts, [0, 1, 1], [rng.integers(3, VOCAB, n) for n in (5, 2, 9)])
        kernels.clear()
        with Launches(kernels) as count:
            losses = backbone.run(prompted.target_nll, rows, [rng.integers(3, VOCAB, n) for n in (2, 4, 1)])
            forward = count.found + kernels
            torch.autograd.grad(losses.sum(), prompts)
            passes.append((forward, count.found + kernels - forward))
    (forward, backward), (more_forward, more_backward) = passes
    return more_forward - forward, more_backward - backward


def test_a_layer_takes_24_launches_forward_and_30_backward(tmp_path, as_on_gpu, monkeypatch):  # noqa: F811
    forward, backward = of_a_layer(tmp_path, monkeypatch)
    assert forward["_int_mm"] == backward["_int_mm"] == 7
    assert forward.total() <= 24, forward
    assert backward.total() <= 30, backward
