"""Logits of a large vocabulary take a bounded amount of memory, and blocks of places change no result."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.backbone import output
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.backbone.prompted import Rows, greedy_decode, label_log_likelihoods, target_nll
from pipeline.lab.benchmark.resident import MemoryWatch, resident
from tests.tiny import make_model

ENTRIES = 262_144
"""Gemma's vocabulary: 1 MiB of logits a place."""
PLACES = 192
RNG = np.random.default_rng(0)


class Largest(TorchDispatchMode):
    """Notes the largest tensor of logits that any operation makes, those of the backward pass included."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == ENTRIES:
                self.bytes = max(self.bytes, tensor.nbytes)
        return made


@pytest.fixture(scope="module", params=["int8", "float"])
def backbone(request, tmp_path_factory):
    sizes = {"vocab_size": ENTRIES, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}
    files = find_model(str(make_model(tmp_path_factory.mktemp("m"), "llama", **sizes)))
    config = read_config(files)
    return host_backbone(
        files, config, int8=request.param == "int8", dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )


def tokens(*lengths: int) -> list[np.ndarray]:
    return [RNG.integers(2, ENTRIES, length) for length in lengths]


def prompts_and_rows(rows: int) -> tuple[list[torch.Tensor], Rows]:
    prompts = [torch.randn(3, 16, generator=torch.Generator().manual_seed(s)).requires_grad_() for s in range(2)]
    return prompts, Rows(prompts, RNG.integers(0, 2, rows), tokens(*[2] * rows))


def training(backbone):
    prompts, rows = prompts_and_rows(PLACES // 8)
    targets = tokens(*[8] * (PLACES // 8))

    def run():
        losses = backbone.run(target_nll, rows, targets)
        return [losses.detach(), *torch.autograd.grad((losses * torch.arange(1.0, len(losses) + 1)).sum(), prompts)]

    return run


def scoring(backbone):
    _, rows = prompts_and_rows(PLACES // 8)
    labels = [tokens(1, 2, 3, 2) for _ in rows.inputs]
    return lambda: [torch.as_tensor(np.concatenate(backbone.run(label_log_likelihoods, rows, labels)))]


def decoding(backbone):
    _, rows = prompts_and_rows(PLACES)
    return lambda: [torch.as_tensor(np.stack(backbone.run(greedy_decode, rows, 2, -1)))]


@pytest.mark.parametrize(
    ("work", "way"), [(training, "packed"), (training, "padded"), (scoring, "packed"), (decoding, "packed")]
)
def test_logits_of_a_large_vocabulary_are_bounded_and_blocks_change_no_result(backbone, work, way, monkeypatch):
    monkeypatch.setattr(backbone.hosted.model, "way", way)
    run = work(backbone)
    before = resident().own
    with MemoryWatch() as watch, Largest() as largest:
        found = run()
    assert largest.bytes <= output.LOGIT_BYTES // 2, "no pass has all logits at once"
    assert watch.peak.own - before < 1.25 * output.LOGIT_BYTES
    monkeypatch.setattr(output, "LOGIT_BYTES", 2**40)
    with Largest() as largest:
        expected = run()
    assert largest.bytes >= 4 * ENTRIES * PLACES // 2, "the test asks for many places"
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
