"""Ranks without Ray end with the process that started them."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from pipeline.lab.benchmark.ranks import run_ranks
from tests.lab.benchmark.test_ranks import compute_for_ever

if __name__ == "__main__":
    run_ranks(2, compute_for_ever, {folder!r})
"""


def compute_for_ever(folder: str) -> None:
    import os

    Path(folder, str(os.getpid())).touch()
    while True:
        pass


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_ranks_of_a_benchmark_that_is_ended_end_with_it(how, tmp_path):
    script, marks = tmp_path / "bench.py", tmp_path / "marks"
    marks.mkdir()
    script.write_text(SCRIPT.format(root=str(ROOT), folder=str(marks)))
    process = subprocess.Popen([sys.executable, str(script)])
    try:
        while len(list(marks.iterdir())) < 2:
            assert process.poll() is None
            time.sleep(0.1)
        ranks = [psutil.Process(int(mark.name)) for mark in marks.iterdir()]
        process.send_signal(how)
        process.wait(60)
        _, left = psutil.wait_procs(ranks, timeout=20)
        assert not left
    finally:
        for mark in marks.iterdir():
            if psutil.pid_exists(int(mark.name)):
                psutil.Process(int(mark.name)).kill()
