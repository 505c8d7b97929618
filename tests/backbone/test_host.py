"""ZeRO-3 over two ranks against one plain process, and what every rank holds."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import Backbone, held_bytes, held_digest, host_backbone
from pipeline.backbone.offload import Keep, in_files
from pipeline.lab.benchmark.resident import resident
from tests.ranks import run_ranks
from tests.tiny import VOCAB, make_model

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")


def load(folder, sharded: bool, keep: Keep | None = None, share_memory: bool = True) -> Backbone:
    files = find_model(str(folder))
    return host_backbone(
        files,
        read_config(files),
        int8=True,
        dtype=torch.float32,
        device=CPU,
        sharded=sharded,
        keep=keep,
        share_memory=share_memory,
    )


def loss_and_gradients(backbone: Backbone, rank: int, world_size: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Loss per row and every prompt's gradient; rank r of n runs rows r, r+n, …"""
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randn(p, 32, generator=generator, requires_grad=True) for p in (2, 5, 9)]
    of_row = [0, 1, 2, 2, 1, 0, 1, 1]
    inputs = [rng.integers(3, VOCAB, rng.integers(1, 12)) for _ in of_row]
    targets = [np.append(rng.integers(3, VOCAB, rng.integers(1, 4)), 1) for _ in of_row]
    mine = range(rank, len(of_row), world_size)
    losses = torch.zeros(len(of_row))
    for _ in range(2):  # the second pass walks ZeRO's recorded order
        rows = prompted.Rows(prompts, [of_row[b] for b in mine], [inputs[b] for b in mine])
        nll = backbone.run(prompted.target_nll, rows, [targets[b] for b in mine])
        for prompt in prompts:
            prompt.grad = None
        nll.sum().backward()
    losses[list(mine)] = nll.detach()
    gradients = [prompt.grad if prompt.grad is not None else torch.zeros_like(prompt) for prompt in prompts]
    if world_size > 1:
        for tensor in [losses, *gradients]:
            dist.all_reduce(tensor)
    return losses.numpy(), [gradient.numpy() for gradient in gradients]


def on_rank(folder):
    backbone = load(folder, sharded=True)
    before = held_digest(backbone)
    result = loss_and_gradients(backbone, dist.get_rank(), dist.get_world_size())
    return result, held_bytes(backbone), before == held_digest(backbone)


@pytest.mark.parametrize("family", ["llama", "llama_untied", "gpt2", "t5", "t5_tied"])
def test_two_zero3_ranks_give_the_loss_and_gradients_of_one_process_and_hold_half_each(family, tmp_path):
    folder = make_model(tmp_path / family, family)
    whole = load(folder, sharded=False)
    losses, gradients = loss_and_gradients(whole, 0, 1)
    ranks = run_ranks(2, on_rank, folder)
    for (rank_losses, rank_gradients), held, frozen in ranks:
        np.testing.assert_allclose(rank_losses, losses, rtol=1e-4)
        for ours, reference in zip(rank_gradients, gradients, strict=True):
            assert np.linalg.norm(ours - reference) <= 1e-4 * np.linalg.norm(reference)
        assert held["int8"] == held_bytes(whole)["int8"] / 2
        assert frozen, "training changed a frozen weight"


LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 5, "head_dim": 128, "vocab_size": 8000}


def offloaded_on_rank(folder, kept_in):
    load(folder, sharded=True)  # what loading imports and starts is paid for
    kept = []
    before = resident()
    backbone = load(folder, sharded=True, keep=lambda piece: kept.append(1) or in_files(kept_in)(piece))
    after = resident()
    digests = held_digest(backbone), held_digest(load(folder, sharded=True))
    return after.own - before.own, held_bytes(backbone)["int8"], digests, len(kept)


@pytest.mark.slow
def test_weights_kept_in_files_are_the_same_and_take_no_memory_of_a_ranks_own(tmp_path):
    folder, files = make_model(tmp_path / "m", **LARGE), tmp_path / "files"
    for own, held, (offloaded, usual), kept in run_ranks(2, offloaded_on_rank, folder, files):
        assert kept and held > 35 * 2**20
        assert own < held / 2, "the partitions took anonymous memory"
        assert offloaded == usual
    assert not list(files.iterdir()), "files outlive the process"


def offloaded_losses(folder, kept_in):
    return loss_and_gradients(load(folder, True, in_files(kept_in)), dist.get_rank(), dist.get_world_size())


def test_a_backbone_kept_in_files_gives_the_losses_and_gradients_of_one_in_memory_bit_by_bit(tmp_path):
    folder = make_model(tmp_path / "m", "llama")
    (usual, _, _), _ = run_ranks(2, on_rank, folder)
    (offloaded, _) = run_ranks(2, offloaded_losses, folder, tmp_path / "files")
    assert np.array_equal(offloaded[0], usual[0])
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(offloaded[1], usual[1], strict=True))
