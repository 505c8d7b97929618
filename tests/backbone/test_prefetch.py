"""Gathers of the next layer while a layer runs, over training, evaluation and training again, on two ranks."""

from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from pipeline.backbone import output, prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from tests.ranks import run_ranks
from tests.tiny import VOCAB, make_model

pytestmark = [pytest.mark.processes, pytest.mark.slow]

LAYERS = 4
STACKS = {"llama": {"num_hidden_layers": LAYERS}, "t5": {"num_layers": LAYERS}}


def load(folder, prefetch):
    files = find_model(str(folder))
    return host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=torch.device("cpu"), sharded=True,
        share_memory=False, prefetch=prefetch,
    )  # fmt: skip


def rows_of(seed, count):
    """This rank's rows behind two prompts, which are the same on all ranks."""
    prompts = [torch.randn(n, 32, generator=torch.Generator().manual_seed(seed + n)).requires_grad_() for n in (3, 6)]
    rng = np.random.default_rng([seed, dist.get_rank()])
    inputs = [rng.integers(3, VOCAB, rng.integers(1, 9)) for _ in range(count)]
    targets = [np.append(rng.integers(3, VOCAB, rng.integers(1, 4)), 1) for _ in range(count)]
    return prompted.Rows(prompts, [i % 2 for i in range(count)], inputs), targets


def step(backbone, seed, micro_batches):
    """Losses and gradients of a step of some micro-batches."""
    made = []
    for number in range(micro_batches):
        rows, targets = rows_of(10 * seed + number, 3 + number)
        losses = backbone.run(prompted.target_nll, rows, targets)
        losses.sum().backward()
        made += [losses.detach(), *(prompt.grad for prompt in rows.prompts)]
    return made


def evaluation(backbone, seed):
    """Labels scored, losses without a gradient, and rows decoded."""
    rows, targets = rows_of(seed, 4)
    with torch.no_grad():
        losses = backbone.run(prompted.target_nll, rows, targets)
    scores = backbone.run(prompted.label_log_likelihoods, rows, [[np.array([5]), np.array([7, 9])]] * 4)

    def all_done(done):
        flag = torch.tensor(float(done))
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)

    decoded = backbone.run(prompted.greedy_decode, rows, 4, 1, all_done)
    return [losses, *map(torch.from_numpy, scores), *map(torch.from_numpy, decoded)]


@contextmanager
def counting(backbone):
    """Counts how often a layer's own gather found it on its way or there, or had to begin it; and voided traces."""
    found = Counter()
    modules = {id(module): name for name, module in backbone.hosted.named_modules()}
    fetch, void = PartitionedParameterCoordinator.fetch_sub_module, PartitionedParameterCoordinator._invalidate_trace

    def counted(self, module, forward):
        mine = [p for p in module.parameters() if not p.ds_persist]
        name = modules[id(module)]
        if mine and name.split(".")[-1].isdigit():
            ready = all(p.ds_status.name != "NOT_AVAILABLE" for p in mine)
            found["forward" if forward else "backward", "ahead" if ready else "late"] += 1
        return fetch(self, module, forward)

    def voided(self):
        found["voided"] += 1
        return void(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartitionedParameterCoordinator, "fetch_sub_module", counted)
        patch.setattr(PartitionedParameterCoordinator, "_invalidate_trace", voided)
        yield found


STAGES = {
    "train": lambda backbone: [*step(backbone, 1, 1), *step(backbone, 2, 3)],
    "evaluate": lambda backbone: evaluation(backbone, 3),
    "train again": lambda backbone: step(backbone, 4, 2),
    "evaluate again": lambda backbone: evaluation(backbone, 5),
    "train with blocks of logits": lambda backbone: step(backbone, 6, 2),
}


def one_way(folder, prefetch):
    """What each stage gave, and counted."""
    backbone, told = load(folder, prefetch), {}
    with counting(backbone) as found, pytest.MonkeyPatch.context() as patch:
        for stage, run in STAGES.items():
            if stage == "train with blocks of logits":
                patch.setattr(output, "LOGIT_BYTES", 5 * output.logit_bytes(backbone.config, 1))
            found.clear()
            before = replace(backbone.traffic)
            numbers = [number.numpy() for number in run(backbone)]
            traffic = backbone.traffic
            told[stage] = (
                numbers, dict(found), traffic.gathered - before.gathered, traffic.ahead - before.ahead
            )  # fmt: skip
    return told


def both_ways(folder):
    return one_way(folder, False), one_way(folder, True)


@pytest.mark.parametrize("family", STACKS)
def test_layers_are_gathered_ahead_in_training_and_evaluation_whatever_ran_before(family, tmp_path):
    stacks = 2 if family == "t5" else 1
    for off, on in run_ranks(2, both_ways, make_model(tmp_path, family, **STACKS[family])):
        for stage in STAGES:
            (plain, without, gathered, none), (numbers, found, as_much, ahead) = off[stage], on[stage]
            assert all(np.array_equal(one, other) for one, other in zip(plain, numbers, strict=True)), stage
            assert none == 0 and as_much == gathered, "a gather was in vain"
            assert ahead > 0.7 * gathered
            for way in ("forward", "backward"):
                layers = without.get((way, "late"), 0)
                assert (way, "ahead") not in without
                assert found.get((way, "late"), 0) + found.get((way, "ahead"), 0) == layers
            # Who comes first in a forward pass is late, and nobody in a backward pass.
            passes = found["forward", "late"]
            if "train" in stage:
                assert (
                    found["forward", "ahead"] == found["backward", "ahead"] - passes == passes * (stacks * LAYERS - 1)
                )
            else:
                assert found["forward", "ahead"] >= passes * (LAYERS - 1)
            assert ("backward", "late") not in found
        assert all(on[stage][1]["voided"] for stage in STAGES if "evaluate" in stage), "the trace of DeepSpeed lived on"


def test_a_model_on_a_cpu_gathers_ahead_only_where_it_is_told_to(tmp_path):
    assert run_ranks(2, default_ahead, make_model(tmp_path, "llama")) == [0, 0]


def default_ahead(folder):
    backbone = load(folder, None)
    step(backbone, 1, 1)
    return backbone.traffic.ahead
