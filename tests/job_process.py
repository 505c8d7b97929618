"""The job as a process of its own, watched from outside: started, waited for, and what it leaves behind."""

import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil

from pipeline.bank import PromptBank
from tests.jobs_data import make_project, write_settings

ROOT = Path(__file__).resolve().parents[1]
STEPS = 400
_MARK = "TESTED_JOB"
_started: list[subprocess.Popen] = []


def start(settings: Path, *arguments: str, job: str = "tune_prompts.py", **kwargs) -> subprocess.Popen:
    """Start a script of `jobs/`; whatever it starts can be told by a mark in its environment (`processes_of`)."""
    command = [sys.executable, str(ROOT / "jobs" / job), "--config", str(settings), *arguments]
    mark = uuid.uuid4().hex
    environment = {**kwargs.pop("env", os.environ), _MARK: mark}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=settings.parent,
        env=environment,
        **kwargs,
    )
    process.mark = mark
    _started.append(process)
    return process


def kill_what_is_left() -> None:
    """After a test that failed: every job that was started, and what it started."""
    while _started:
        process = _started.pop()
        if process.poll() is None:
            process.kill()
            process.communicate()
        for other in processes_of(process):
            with suppress(psutil.NoSuchProcess):
                other.kill()


def finish(process: subprocess.Popen, timeout: float = 400) -> str:
    output, _ = process.communicate(timeout=timeout)
    return output


def run(settings: Path, *arguments: str, code: int = 0, **kwargs) -> str:
    process = start(settings, *arguments, **kwargs)
    output = finish(process)
    assert process.returncode == code, output
    return output


def processes_of(process: subprocess.Popen) -> list[psutil.Process]:
    """Everything alive that this job started, also what it is no parent of any more."""
    found = []
    for other in psutil.process_iter():
        try:
            if other.environ().get(_MARK) == process.mark and other.status() != psutil.STATUS_ZOMBIE:
                found.append(other)
        except psutil.Error:
            continue
    return found


def ranks_of(process: subprocess.Popen) -> list[psutil.Process]:
    """The ranks' processes, by age."""
    workers = [p for p in processes_of(process) if "RayTrainWorker" in _command(p)]
    return sorted(workers, key=lambda worker: worker.create_time())


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def assert_nothing_is_left(process: subprocess.Popen, timeout: float = 40) -> None:
    """No process of the job outlives it for long."""
    deadline = time.monotonic() + timeout
    while left := processes_of(process):
        assert time.monotonic() < deadline, [_command(other) for other in left]
        time.sleep(0.3)


def assert_no_temporary_files(project: Path) -> None:
    """A run that ended leaves its results and nothing half-written."""
    run_folder = project / "runs" / "small"
    known = {"events.jsonl", "metrics", "trials.json", "checkpoints", "model", "report.html"}
    assert {path.name for path in run_folder.iterdir()} - {"warm_starts", "hangs", "lease"} <= known
    hidden = [path for folder in (project / "runs", project / "bank") for path in folder.rglob(".*")]
    assert not hidden, hidden


def prompts(bank: Path, names=("film", "book")) -> dict[str, np.ndarray]:
    opened = PromptBank.open(bank)
    return {name: opened.load(name).array for name in names}


def assert_same(bank: Path, reference: Path) -> None:
    for name, prompt in prompts(bank).items():
        np.testing.assert_array_equal(prompt, prompts(reference)[name])


def distance(bank: Path, reference: Path) -> float:
    """The largest relative distance of a prompt from the one that it should be."""
    ours, theirs = prompts(bank), prompts(reference)
    return max(float(np.linalg.norm(ours[n] - theirs[n]) / np.linalg.norm(theirs[n])) for n in ours)


def events(run_folder: Path, kind: str | None = None) -> list[dict]:
    path = run_folder / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event for event in found if kind in (None, event["event"])]


def steps_written(run_folder: Path, trial: str = "film") -> list[int]:
    """The steps in a trial's series of losses."""
    return [line["step"] for line in _series(run_folder / "metrics" / f"{trial}.jsonl") if "loss" in line]


def _series(path: Path) -> list[dict]:
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(run_folder: Path, step: int, process: subprocess.Popen) -> None:
    """Until a trial has taken so many steps. (Events tell of steps every two seconds only.)"""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert process.poll() is None, finish(process)
        if any(line["step"] >= step for path in run_folder.glob("metrics/*.jsonl") for line in _series(path)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} was not reached in time")


def project_in(folder: Path, **defaults) -> Path:
    """A small project whose run takes some seconds of steps; its settings file."""
    folder.mkdir()
    settings = make_project(folder, **{"max_steps": STEPS, "eval_every": 200, "patience": None, **defaults})
    return write_settings(folder, settings)
