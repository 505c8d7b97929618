"""One night, one submission: whoever submits it again finds it. On a real cluster of two nodes, with a token."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.submit_nightly import exit_code
from tests.job_cluster import JobCluster, job_cluster
from tests.ray_cluster import free_port

ROOT = Path(__file__).resolve().parents[2]
SUBMIT = [sys.executable, str(ROOT / "jobs" / "submit_nightly.py")]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with job_cluster(tmp_path_factory.mktemp("home"), workers=1) as running:
        yield running


def start(cluster: JobCluster, night: str, script: str, *options: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [*SUBMIT, "--night", night, "--patience", "60", "--pause", "0", *options, "--", "sh", "-c", script],
        env={**cluster.environment, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def submit(cluster: JobCluster, night: str, script: str, *options: str, **environment: str) -> tuple[int, str]:
    process = start(cluster, night, script, *options, **environment)
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def test_a_night_leaves_with_the_exit_code_of_its_job_and_shows_what_it_printed(cluster):
    code, output = submit(cluster, "2026-01-01", "echo the night of {night}; exit 3")
    assert code == 3, output
    assert "the night of 2026-01-01" in output and "refresh-2026-01-01 ended with exit code 3" in output


def test_a_night_submitted_again_is_the_same_submission_and_runs_once(cluster, tmp_path):
    script = f"echo ran >> {tmp_path}/runs; sleep 5; exit 4"
    both = [start(cluster, "2026-01-02", script) for _ in range(2)]
    outputs = [process.communicate(timeout=180)[0] for process in both]
    assert [process.returncode for process in both] == [4, 4], outputs
    assert submit(cluster, "2026-01-02", script)[0] == 4
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_an_interrupted_night_is_started_again_and_a_finished_attempt_is_not(cluster, tmp_path):
    runs = tmp_path / "runs"
    script = f"echo ran >> {runs}; test $(wc -l < {runs}) -ge 3 || exit 5"
    code, output = submit(cluster, "2026-01-03", script, "--attempts", "2")
    assert code == 5 and "its attempts are used up" in output
    code, output = submit(cluster, "2026-01-03", script, "--attempts", "3")
    assert code == 0 and "refresh-2026-01-03-3 was submitted" in output, output
    assert runs.read_text() == "ran\n" * 3


def test_a_job_whose_driver_is_killed_is_started_again(cluster, tmp_path):
    runs = tmp_path / "runs"
    script = f"echo ran >> {runs}; test $(wc -l < {runs}) -ge 2 || kill -9 $$"
    code, output = submit(cluster, "2026-01-04", script)
    assert code == 0 and "refresh-2026-01-04-2 was submitted" in output, output


def test_a_job_that_an_operator_stops_is_not_started_again(cluster, tmp_path):
    runs = tmp_path / "runs"
    process = start(cluster, "2026-01-05", f"echo ran >> {runs}; sleep 600")
    while not runs.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.2)
    cluster.ray("job", "stop", "refresh-2026-01-05")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143, output
    assert submit(cluster, "2026-01-05", f"echo ran >> {runs}")[0] == 143
    assert runs.read_text() == "ran\n"


def test_a_night_ends_at_its_deadline_and_its_job_with_it(cluster):
    code, output = submit(cluster, "2026-01-06", "echo begun; sleep 600", "--deadline-hours", "0.002")
    assert code == 124 and "stopped at its deadline" in output, output
    assert "STOPPED" in cluster.ray("job", "status", "refresh-2026-01-06").upper()


def test_a_submitter_that_is_killed_leaves_its_job_running_and_the_next_one_follows_it(cluster, tmp_path):
    runs = tmp_path / "runs"
    script = f"echo ran >> {runs}; sleep 8; echo the end"
    first = start(cluster, "2026-01-07", script)
    while not runs.exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.2)
    first.kill()
    first.wait()
    code, output = submit(cluster, "2026-01-07", script)
    assert code == 0 and "the end" in output, output
    assert runs.read_text() == "ran\n"


def test_a_wrong_token_is_one_sentence_and_no_submission(cluster):
    code, output = submit(cluster, "2026-01-08", "true", RAY_AUTH_TOKEN="f" * 32)
    assert code == 2 and "refuses the token; set RAY_AUTH_MODE=token" in output, output
    assert "Traceback" not in output and "f" * 32 not in output
    assert "refresh-2026-01-08" not in cluster.ray("job", "list")


def test_a_cluster_that_does_not_answer_asks_for_another_try(tmp_path):
    # Without what a Ray of this process has set: a token that is asked for and missing is another mistake.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    address = f"http://127.0.0.1:{free_port()}"
    process = subprocess.run(
        [*SUBMIT, "--address", address, "--patience", "1", "--", "true"],
        env={**environment, "HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert process.returncode == 5 and "does not answer" in process.stderr, process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", None, 5),
        ("FAILED", -9, 5),
        ("FAILED", 137, 5),
        ("STOPPED", -15, 143),
    ],
)
def test_what_a_job_that_ended_stands_for(status, driver, code):
    assert exit_code(status, driver) == code


def test_a_working_folder_goes_along(cluster, tmp_path):
    (tmp_path / "hello.txt").write_text("from the folder")
    code, output = submit(cluster, "2026-01-09", "cat hello.txt", "--working-dir", str(tmp_path))
    assert code == 0 and "from the folder" in output, output
