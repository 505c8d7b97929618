import pytest
import ray

from tests.jobs_data import make_project


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def project(tmp_path):
    """Settings of a small project that runs on one rank."""
    settings = make_project(tmp_path)
    settings["cluster"]["num_workers"] = 1
    return settings
