"""Ranks of one machine read each other's weights from memory: the same numbers, no more memory, nothing left over."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.backbone import node_memory, prompted
from pipeline.backbone.host import held_bytes
from pipeline.backbone.node_memory import NodeMemory, join_node_memory
from pipeline.lab.benchmark.resident import resident
from tests.backbone.test_host import LARGE, load, loss_and_gradients
from tests.ranks import run_ranks
from tests.tiny import make_model

pytestmark = pytest.mark.processes


def pieces_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    sizes = {torch.int8: 5, torch.float32: 70_000, torch.bfloat16: 4097}
    return [(100 * torch.randn(size, generator=generator)).to(dtype) for dtype, size in sizes.items()]


def gathered_on_rank() -> list[torch.Tensor]:
    node = join_node_memory()
    assert node is not None
    kept = [node.keep(piece) for piece in pieces_of(dist.get_rank())]
    assert all(node.holds(piece) for piece in kept) and not node.holds(kept[0].clone())
    dist.barrier()
    wholes = [piece.new_empty(len(piece) * dist.get_world_size()) for piece in kept]
    for piece, whole in zip(kept, wholes, strict=True):
        node.gather(piece, whole)
    return wholes


def test_every_rank_gathers_what_all_ranks_kept_in_their_order():
    expected = [torch.cat(parts) for parts in zip(*(pieces_of(rank) for rank in range(3)), strict=True)]
    for wholes in run_ranks(3, gathered_on_rank):
        assert all(torch.equal(whole, parts) for whole, parts in zip(wholes, expected, strict=True))


def on_other_machines(folder: Path) -> NodeMemory | None:
    node_memory._BOOT = folder / str(dist.get_rank())
    node_memory._BOOT.write_text(f"machine {dist.get_rank()}")
    return join_node_memory()


def with_numbers_of_other_processes() -> NodeMemory | None:
    # As in two containers of one machine: this number is another process there, or none.
    os.getpid = lambda: os.getppid() if dist.get_rank() else 2**22 + 1
    return join_node_memory()


def test_ranks_that_cannot_read_each_other_have_no_common_memory(tmp_path):
    assert run_ranks(2, on_other_machines, tmp_path) == [None, None]
    assert run_ranks(2, with_numbers_of_other_processes) == [None, None]


Outcome = tuple[np.ndarray, list[np.ndarray]]


def both_ways(folder: Path) -> list[Outcome]:
    return [
        loss_and_gradients(load(folder, True, share_memory=share), dist.get_rank(), dist.get_world_size())
        for share in (True, False)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_reading_from_memory_and_sending_give_the_same_losses_and_gradients_bit_by_bit(family, tmp_path):
    for (losses, gradients), (sent_losses, sent_gradients) in run_ranks(2, both_ways, make_model(tmp_path, family)):
        assert np.array_equal(losses, sent_losses)
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(gradients, sent_gradients, strict=True))


def memory_of_a_step(folder: Path, share_memory: bool) -> tuple[int, int]:
    load(folder, True)  # what loading imports and starts is paid for
    before = resident().own
    backbone = load(folder, True, share_memory=share_memory)
    prompt = torch.zeros(2, 1024, requires_grad=True)
    rows = prompted.Rows([prompt], [0], [np.array([5, 6, 7])])
    backbone.run(prompted.target_nll, rows, [np.array([8, 1])]).sum().backward()
    return resident().own - before, held_bytes(backbone)["int8"]


@pytest.mark.slow
def test_what_was_read_of_other_ranks_does_not_stay_in_a_ranks_memory(tmp_path):
    folder = make_model(tmp_path, **LARGE)
    (sent, held), _ = run_ranks(2, memory_of_a_step, folder, False)
    for own, _ in run_ranks(2, memory_of_a_step, folder, True):
        assert own < sent + held / 4
