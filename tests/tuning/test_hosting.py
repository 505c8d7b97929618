"""Whether ranks share one backbone: decided once for all of them."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.backbone.files import find_model, read_config
from pipeline.tuning import hosting
from pipeline.tuning.machine import container_bytes
from tests.ranks import run_ranks
from tests.tiny import make_model

CPU = torch.device("cpu")


def decide(folder: Path, setting: str, full_rank: int | None) -> bool:
    if full_rank == dist.get_rank():
        hosting.free_bytes = lambda device: 0
    config = read_config(find_model(str(folder)))
    return hosting.partitions(setting, config, True, torch.float32, CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    make_model(path, "llama")
    return path


@pytest.mark.parametrize(
    "setting, full_rank, partitioned",
    [("auto", None, False), ("auto", 1, True), ("auto", 0, True), ("always", None, True), ("never", 0, False)],
)
@pytest.mark.processes
def test_a_model_is_partitioned_on_all_ranks_as_soon_as_one_lacks_room(folder, setting, full_rank, partitioned):
    assert run_ranks(2, decide, folder, setting, full_rank) == [partitioned] * 2


def test_a_containers_limit_counts_as_the_machines_memory(tmp_path):
    assert container_bytes(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert container_bytes(tmp_path) > 2**60
    (tmp_path / "memory.stat").write_text("anon 300\ninactive_file 700\n")
    assert container_bytes(tmp_path) > 2**60
    (tmp_path / "memory.max").write_text("5000\n")
    assert container_bytes(tmp_path) == 4700
