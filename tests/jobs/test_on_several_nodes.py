"""The job on a cluster of several nodes, submitted with `ray job submit` and a token: one rank a node."""

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bank import PromptBank
from tests.corpora import reviews
from tests.job_cluster import JobCluster, job_cluster
from tests.jobs_data import make_project, write_settings

ROOT = Path(__file__).resolve().parents[2]
JOB = "jobs/tune_prompts.py"
FILES = 8
SECRET = "wJalrXUtnFEMIsecretmarker"

pytestmark = pytest.mark.timeout(600)


def make(folder: Path, ranks: int = 2, steps: int = 40) -> Path:
    """A project whose train split is many files, so that reading it is work for several nodes."""
    settings = make_project(folder, max_steps=steps, eval_every=20)
    settings["cluster"]["num_workers"] = ranks
    settings["model"]["products"] = "exact"  # else sums in another order round to other whole numbers
    # Each is worth a Ray task of its own by its size, of which the task uses little.
    rng = np.random.default_rng(0)
    (folder / "corpora/many").mkdir()
    for part in range(FILES):
        texts, labels = zip(*reviews(60, 100 + part), strict=True)
        notes = [rng.bytes(20_000) for _ in texts]
        table = pa.table({"text": texts, "label": labels, "note": notes})
        pq.write_table(table, folder / f"corpora/many/{part}.parquet")
    settings["tasks"]["film"]["train"] = str(folder / "corpora/many")
    return write_settings(folder, settings)


def prompts(bank: Path) -> dict[str, np.ndarray]:
    opened = PromptBank.open(bank)
    return {name: opened.load(name).array for name in opened.names()}


def nodes_of_ranks(cluster: JobCluster, pids_before: set[int]) -> list[str]:
    ranks = [a for a in cluster.listed("actors") if "TrainWorker" in a["class_name"] and a["pid"] not in pids_before]
    return [actor["node_id"] for actor in ranks]


def rank_pids(cluster: JobCluster) -> set[int]:
    return {actor["pid"] for actor in cluster.listed("actors") if "TrainWorker" in actor["class_name"]}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head that only schedules, as in cluster/, and two nodes of one CPU: two ranks cannot be on one."""
    with job_cluster(tmp_path_factory.mktemp("home"), workers=2, AWS_SECRET_ACCESS_KEY=SECRET) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The prompts that one machine tunes with two ranks."""
    folder = tmp_path_factory.mktemp("alone") / "project"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(ROOT / JOB), "--config", str(make(folder))], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return prompts(folder / "bank")


@pytest.fixture(scope="module")
def submitted(cluster, tmp_path_factory):
    """A run on both nodes: its folder, what it printed, and what the cluster knows of it."""
    folder = tmp_path_factory.mktemp("submitted") / "project"
    folder.mkdir()
    name = cluster.submit("two", "python", JOB, "--config", str(make(folder)), folder=ROOT)
    return folder, cluster.finish(name)


@pytest.mark.slow
def test_ranks_run_on_different_nodes_and_tune_what_one_machine_tunes(cluster, submitted, undisturbed):
    folder, output = submitted
    assert "Published version 1" in output
    alive = {node["node_id"]: node for node in cluster.listed("nodes", "state=ALIVE")}
    assert len(alive) == 3
    nodes = nodes_of_ranks(cluster, set())
    assert len(nodes) == len(set(nodes)) == 2 and set(nodes) <= alive.keys()
    assert not any(alive[node]["is_head_node"] for node in nodes)
    for name, array in prompts(folder / "bank").items():
        np.testing.assert_array_equal(array, undisturbed[name])


@pytest.mark.slow
def test_the_corpus_is_read_on_different_nodes(cluster, submitted):
    tasks = [task for task in cluster.listed("tasks") if "_tokenise_units" in (task["name"] or "")]
    assert len(tasks) >= FILES
    assert len({task["node_id"] for task in tasks}) == 2


@pytest.mark.slow
def test_no_token_and_no_credential_is_in_what_a_run_leaves_or_prints(cluster, submitted):
    folder, output = submitted
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name == "events.jsonl" for path in files) and len(files) > 20
    for secret in (cluster.token, SECRET):
        assert secret not in output
        assert not [path for path in files if secret.encode() in path.read_bytes()]


@pytest.mark.slow  # a minute and a half
def test_a_run_for_more_nodes_than_there_are_waits_for_one_and_goes_on(cluster, submitted, undisturbed, tmp_path):
    before = rank_pids(cluster)
    (tmp_path / "project").mkdir()
    settings = make(tmp_path / "project", ranks=3)
    name = cluster.submit("three", "python", JOB, "--config", str(settings), folder=ROOT)
    while "waiting for 3 CPUs where there are 2" not in (log := cluster.ray("job", "logs", name)):
        assert "FAILED" not in cluster.ray("job", "status", name).upper(), log
        time.sleep(1)
    third = cluster.add_node()
    cluster.finish(name)
    nodes = nodes_of_ranks(cluster, before)
    assert len(set(nodes)) == 3
    # Another number of ranks adds up in another order.
    for task, array in prompts(tmp_path / "project/bank").items():
        np.testing.assert_allclose(array, undisturbed[task], atol=1e-3)

    # And with a node fewer than before, the next night runs on those that are left.
    cluster.lose(third)
    (tmp_path / "again").mkdir()
    name = cluster.submit("again", "python", JOB, "--config", str(make(tmp_path / "again")), folder=ROOT)
    assert "Published version 1" in cluster.finish(name)
    for task, array in prompts(tmp_path / "again/bank").items():
        np.testing.assert_array_equal(array, undisturbed[task])
