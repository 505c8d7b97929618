import copy
import shutil

import pytest
import ray
import torch
from rich.console import Console

from pipeline.refresh.night import run_night
from pipeline.settings import parse_settings
from tests.jobs_data import make_project


@pytest.fixture(scope="module", autouse=True)
def rank_in_this_process():
    """What a worker of Ray Train is given to do, done here: nights take a second. tests/jobs goes the whole way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.refresh.tuned.launch", lambda work, *rest: work(torch.device("cpu"), lambda: False))
        yield


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def night(settings, date, *overrides):
    """A night of the small project; its record."""
    return run_night(parse_settings(settings, overrides), date, Console(quiet=True))


@pytest.fixture(scope="module")
def first_night(tmp_path_factory, local_ray):
    """A project after its first night: its folder, settings and record."""
    folder = tmp_path_factory.mktemp("first")
    settings = make_project(folder, max_steps=300, eval_every=50)
    settings["cluster"] = {"num_workers": 1}
    settings["tasks"]["film"]["metric"] = "loss"  # which a model of random weights learns to lower
    return folder, settings, night(settings, "n1")


@pytest.fixture
def project(first_night, tmp_path):
    """A copy of it: settings to change, and its bank at version 1."""
    folder, settings, _ = first_night
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return _moved(copy.deepcopy(settings), str(folder), str(tmp_path))


def _moved(value, old, new):
    if isinstance(value, dict):
        return {key: _moved(item, old, new) for key, item in value.items()}
    return value.replace(old, new) if isinstance(value, str) else value
