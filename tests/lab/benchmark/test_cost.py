"""The model of what a step costs, against bytes counted at the collectives."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.backbone import prompted
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import host_backbone
from pipeline.lab.benchmark.cost import H100_NODES, TrafficCounter, gathered_bytes, step_cost
from pipeline.lab.benchmark.shapes import published_config
from tests.ranks import run_ranks
from tests.tiny import make_model

CPU = torch.device("cpu")


def count_on_rank(folder) -> int:
    files = find_model(str(folder))
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=CPU, sharded=True, share_memory=False
    )
    prompt = torch.randn(3, 32, requires_grad=True)
    for _ in range(8):  # until ZeRO's recorded order has settled, which begins with that of the proof at loading
        with TrafficCounter() as traffic:
            rows = prompted.Rows([prompt], [0], [np.array([5, 6, 7])])
            backbone.run(prompted.target_nll, rows, [np.array([8, 1])]).sum().backward()
    return traffic.gathered


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
@pytest.mark.processes
def test_a_step_gathers_the_bytes_that_the_model_says(tmp_path, family):
    make_model(tmp_path, family)
    expected = gathered_bytes(read_config(find_model(str(tmp_path))))
    assert run_ranks(2, count_on_rank, tmp_path) == [expected] * 2


def test_one_rank_gathers_nothing_and_slower_networks_cost_more():
    config = published_config("llama-7b")
    assert step_cost(config, 1, 1000, 100, H100_NODES).gathered == 0
    fast, slow = (step_cost(config, 16, 1000, 100, replace(H100_NODES, between=b)) for b in (50e9, 1e9))
    assert slow.gather_seconds > fast.gather_seconds and slow.compute_seconds == fast.compute_seconds
    # Twice the tokens, twice the products for the same gathers.
    assert step_cost(config, 16, 2000, 100, H100_NODES).share < fast.share
