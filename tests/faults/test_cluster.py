"""A run on a cluster of several nodes outlives the loss of a node; after the loss of the whole cluster it goes on."""

import time

import pytest

from tests.job_process import (
    assert_nothing_is_left,
    assert_same,
    events,
    finish,
    processes_of,
    project_in,
    run,
    start,
    steps_written,
    wait_for_step,
)
from tests.ray_cluster import RayCluster, ray_cluster

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(tmp_path):
    with ray_cluster(tmp_path, workers=2) as started:
        yield started


def ranks_on(cluster: RayCluster):
    import psutil

    below = [p for node in cluster.nodes for p in psutil.Process(node.pid).children(recursive=True)]
    return [p for p in below if "RayTrainWorker" in " ".join(p.cmdline())]


def worker_node_with_a_rank(cluster: RayCluster):
    nodes = [cluster.node_of(rank) for rank in ranks_on(cluster)]
    assert len(nodes) == 2
    return next(node for node in nodes if node is not cluster.nodes[0])


def test_a_node_that_dies_is_done_without(undisturbed, cluster, tmp_path):
    settings = project_in(tmp_path / "project")
    process = start(settings, env=cluster.environment)
    wait_for_step(tmp_path / "project/runs/small", 60, process)
    cluster.kill(worker_node_with_a_rank(cluster))
    output = finish(process)
    assert process.returncode == 0, output
    assert events(tmp_path / "project/runs/small", "resume"), "nothing was resumed"
    assert_same(tmp_path / "project/bank", undisturbed / "bank")
    assert not ranks_on(cluster), "a rank outlived its run"


def test_a_node_that_is_taken_away_leaves_a_checkpoint_in_time(undisturbed, cluster, tmp_path):
    settings = project_in(tmp_path / "project")
    # No other checkpoint is written before the evaluation at half time.
    process = start(settings, "--set", "run.checkpoint_every=100000", "--set", "defaults.max_steps=40000",
                    "--set", "defaults.eval_every=20000", env=cluster.environment)  # fmt: skip
    folder = tmp_path / "project/runs/small"
    wait_for_step(folder, 60, process)
    cluster.tell_to_leave(worker_node_with_a_rank(cluster))
    deadline = time.monotonic() + 30
    while not [path for path in folder.glob("checkpoints/step-*") if path.stem != "step-000000000"]:
        assert time.monotonic() < deadline and process.poll() is None, "no checkpoint in time"
        time.sleep(0.1)
    deadline = time.monotonic() + 120
    while not events(folder, "resume"):
        assert time.monotonic() < deadline and process.poll() is None, "the run did not go on"
        time.sleep(0.1)
    (resumed,) = events(folder, "resume")
    assert resumed["step"] > 0
    process.terminate()
    finish(process)
    assert process.returncode == 5


def test_after_the_loss_of_the_whole_cluster_the_run_goes_on_where_it_was(undisturbed, cluster, tmp_path):
    settings = project_in(tmp_path / "project")
    process = start(settings, env=cluster.environment)
    wait_for_step(tmp_path / "project/runs/small", 60, process)
    for node in cluster.nodes[::-1]:
        cluster.kill(node)
    output = finish(process)
    assert process.returncode == 5, output
    assert output.strip().splitlines()[-1].startswith("error: "), output
    assert not list((tmp_path / "project").glob("bank/versions/*")), "something was published"
    assert_nothing_is_left(process)
    with ray_cluster(tmp_path, workers=1) as other:
        run(settings, env=other.environment)
    assert events(tmp_path / "project/runs/small", "resume")[0]["step"] > 0
    assert steps_written(tmp_path / "project/runs/small") == list(range(1, 401))
    assert_same(tmp_path / "project/bank", undisturbed / "bank")
    assert not processes_of(process)
