"""Whatever ends a job's process, a scheduler gets a code that it can act on, and people one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from pipeline.tuning.interruption.supervision import supervised

def job():
    import atexit, os, signal, time
    print("job", os.getpid(), flush=True)
    {body}

if __name__ == "__main__":
    supervised(job)
"""


def start(folder: Path, body: str) -> subprocess.Popen:
    script = folder / "job.py"
    script.write_text(SCRIPT.format(root=str(ROOT), body=body))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, str(script), "an argument"], **pipes)


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no')", 1, "no"),
        ("assert sys.argv[1:] == ['an argument']", 0, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        # Ray's own end of a driver whose cluster is gone.
        ("os._exit(1)", 5, "error: the job's process was ended by Ray, whose node or cluster is gone; start the same"),
        ("os.abort()", 5, "error: the job's process crashed (SIGABRT); start the same run again"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 5, "error: the job's process was killed from outside"),
        # It has ended; what Ray does to the process at its exit changes nothing.
        ("atexit.register(os._exit, 1); sys.exit(4)", 4, ""),
        # Something that it started lives on, with whatever it inherited.
        ("os.fork() or time.sleep(1); os._exit(1)", 5, "error: the job's process was ended by Ray"),
    ],
)
def test_the_exit_code_is_the_jobs_own_or_says_start_again(tmp_path, body, code, said):
    process = start(tmp_path, body)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert said in errors and (said or not errors)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job_once_also_when_it_is_sent_to_the_whole_group(tmp_path, number):
    body = f"""
    came = []
    signal.signal({int(number)}, lambda *_: came.append(1))
    print("ready", flush=True)
    while not came:
        time.sleep(0.01)
    time.sleep(0.3)
    sys.exit(10 + len(came))"""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(root=str(ROOT), body=body.strip()))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True)
    while process.stdout.readline() != "ready\n":
        pass
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 11


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells of a parent's death on Linux alone")
def test_the_job_does_not_outlive_the_process_that_people_know(tmp_path):
    process = start(tmp_path, "time.sleep(600)")
    job = psutil.Process(int(process.stdout.readline().split()[1]))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while job.is_running() and job.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the job lives on"
        time.sleep(0.05)
