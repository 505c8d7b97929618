"""Logits of a large vocabulary take a bounded amount of memory, and blocks of places change no result."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.backbone import output
from pipeline.backbone.allocator import configure_allocator_for_loading
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.backbone.prompted import Rows, greedy_decode, label_log_likelihoods, target_distillation, target_nll
from pipeline.lab.benchmark.resident import MemoryWatch, resident
from tests.ranks import run_ranks
from tests.tiny import VOCAB, make_model

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


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 4}


def large_vocabulary(folder, family, int8, **sizes):
    files = find_model(str(make_model(folder, family, vocab_size=ENTRIES, **sizes)))
    config, device = read_config(files), torch.device("cpu")
    return host_backbone(files, config, int8=int8, dtype=torch.float32, device=device, sharded=False)


@pytest.fixture(scope="module", params=["int8", "float"])
def backbone(request, tmp_path_factory):
    return large_vocabulary(tmp_path_factory.mktemp("m"), "llama", request.param == "int8", **SIZES)


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


def distilling(backbone):
    prompts, rows = prompts_and_rows(PLACES // 8)
    targets = tokens(*[8] * (PLACES // 8))
    teacher = Rows([torch.randn(5, 16, generator=torch.Generator().manual_seed(2))], [0] * len(targets), rows.inputs)
    shares = [0.25, 1.0] * (len(targets) // 2)

    def run():
        losses = backbone.run(target_distillation, rows, targets, teacher, shares)
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
    ("work", "way"),
    [
        *[(training, "packed"), (training, "padded"), (distilling, "packed"), (distilling, "padded")],
        *[(scoring, "packed"), (decoding, "packed")],
    ],
)
def test_logits_of_a_large_vocabulary_are_bounded_and_blocks_change_no_result(backbone, work, way, monkeypatch):
    monkeypatch.setattr(backbone.hosted.model, "way", way)
    check_bounded(work(backbone), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("work", [training, distilling, scoring, decoding])
def test_logits_of_an_encoder_decoder_are_bounded_alike(tmp_path, work, monkeypatch):
    backbone = large_vocabulary(tmp_path, "t5", False, d_model=16, d_ff=16, d_kv=4, num_layers=1, num_decoder_layers=1)
    check_bounded(work(backbone), monkeypatch)


def check_bounded(run, monkeypatch):
    configure_allocator_for_loading()  # a test before may have let freed memory stay, in holes in which nothing fits
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


def losses_on_rank(folder, share_memory):
    """Of rows whose targets fill one block of places on rank 0, and three on rank 1; and what they answer."""
    output.LOGIT_BYTES = 4 * output.logit_bytes(read_config(find_model(str(folder))), 1)
    files, rng = find_model(str(folder)), np.random.default_rng(0)
    backbone = host_backbone(
        files,
        read_config(files),
        int8=True,
        dtype=torch.float32,
        device=torch.device("cpu"),
        sharded=dist.is_initialized(),
        share_memory=share_memory,
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    lengths = ((1,), (6, 6))
    targets = [[rng.integers(3, VOCAB, n) for n in of_rank] for of_rank in lengths]
    inputs = [[rng.integers(3, VOCAB, 4) for _ in of_rank] for of_rank in lengths]
    found = []
    for mine in [rank] if dist.is_initialized() else [0, 1]:
        prompt = torch.ones(2, 32, requires_grad=True)
        rows = Rows([prompt], [0] * len(inputs[mine]), inputs[mine])
        losses = backbone.run(target_nll, rows, targets[mine])
        losses.sum().backward()
        teacher = Rows([torch.full((3, 32), 0.5)], [0] * len(inputs[mine]), inputs[mine])
        taught = backbone.run(target_distillation, rows, targets[mine], teacher, [0.75] * len(inputs[mine]))
        (gradient,) = torch.autograd.grad(taught.sum(), prompt)
        labels = backbone.run(label_log_likelihoods, rows, [targets[mine]] * len(inputs[mine]))
        answers = backbone.run(greedy_decode, rows, 3, -1)
        distilled = [taught.detach().numpy(), gradient.numpy()]
        found.append([losses.detach().numpy(), prompt.grad.numpy(), *distilled, *labels, *answers])
    return found


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("share_memory", [True, False])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_ranks_with_other_numbers_of_blocks_gather_alike_and_reach_one_process(tmp_path, family, share_memory):
    folder = make_model(tmp_path / "m", family)
    usual = output.LOGIT_BYTES
    alone = losses_on_rank(folder, True)
    output.LOGIT_BYTES = usual
    for (of_rank,), expected in zip(run_ranks(2, losses_on_rank, folder, share_memory), alone, strict=True):
        for mine, theirs in zip(of_rank, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
