"""`runs ls`, `show` and `tail`: what the events of runs say to whoever looks from outside."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.cli.run_figures import run_document, run_fields, run_row
from pipeline.reporting.events import EventLog, EventTail
from pipeline.reporting.html.run_files import faults_of, stages_of
from pipeline.reporting.sentences import Narrator
from pipeline.reporting.watched import read_run
from tests.cli.conftest import COMMAND, ROOT, environment, start


def write(folder: Path, events: list[dict], ago: float = 0.0) -> None:
    """An event log whose newest event is so many seconds old."""
    folder.mkdir(parents=True, exist_ok=True)
    shift = time.time() - ago - events[-1]["time"]
    lines = [
        json.dumps({"time": event["time"] + shift, **{k: v for k, v in event.items() if k != "time"}})
        for event in events
    ]
    (folder / "events.jsonl").write_text("".join(line + "\n" for line in lines))


def going(trials: int = 2, steps: int = 30) -> list[dict]:
    """A run of 100 steps, two seconds each, that has come some way."""
    names = [f"t{n}" for n in range(trials)]
    events: list[dict] = [
        {"time": 0, "event": "begin", "tasks": trials},
        {"time": 1, "event": "stage", "name": "corpus", "text": "t0: 60 train rows"},
        {"time": 1, "event": "launch", "trials": [{"trial": n, "task": n, "max_steps": 100} for n in names]},
        {"time": 3, "event": "stage", "name": "backbone", "text": "loading"},
        {"time": 4, "event": "stage", "name": "tuning", "text": "rank 0 of 2 holds 64 MiB of int8"},
    ]
    for n in names:
        events.append(
            {"time": 4, "event": "eval", "trial": n, "step": 0, "metric": "accuracy", "value": 0.5, "loss": 2}
        )
    for step in range(1, steps + 1):
        running = {n: {"step": step, "loss": 1.5} for n in names}
        more = {"step": step, "live": trials, "tokens_per_second": 310.2, "trials": running}
        events.append({"time": 4 + 2 * step, "event": "step", **more})
    return events


def failed(trial: str) -> dict:
    return {"event": "finished", "trial": trial, "status": "failed", "reason": "the loss was nan at step 31"}


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """Runs in every condition; one lies a folder deeper."""
    storage = tmp_path / "runs"
    end = {"time": 70, "event": "end", "version": 3, "exit": 3}
    write(storage / "going", going(), ago=1)
    write(storage / "quiet", going(), ago=720)
    write(storage / "over", [*going(), {"time": 66, **failed("t1")}, end], ago=4000)
    write(
        storage / "nightly" / "2026-11-25",
        [*going(), {"time": 66, "event": "stopped", "reason": "the disk is full"}],
        90,
    )
    (storage / "token_shards" / "abc").mkdir(parents=True)
    return storage


@pytest.fixture
def runs(run, storage):
    """Runs `promptbank runs …` on the storage."""
    return lambda *words: run("runs", words[0], *words[1:], "--storage", storage, bank=None)


def test_ls_says_of_every_run_whether_it_runs_how_far_it_is_and_when_it_will_be_done(runs):
    code, stdout, stderr = runs("ls")
    assert (code, stderr) == (0, "")
    rows = [re.split(r" {2,}", line) for line in stdout.splitlines()]
    assert rows == [
        ["run", "state", "stage", "step", "tokens/s", "done in", "finished", "failed", "last event"],
        ["going", "running", "tuning", "30/100", "310", "2 min", "0/2", "-", rows[1][-1]],
        ["nightly/2026-11-25", "stopped", "tuning", "30", "-", "-", "0/2", "-", "1 min ago"],
        ["quiet", "silent", "tuning", "30/100", "-", "-", "0/2", "-", "12 min ago"],
        ["over", "done", "tuning", "30", "-", "-", "1/2", "1", "1 h 06 min ago"],
    ]


def test_a_silent_run_is_called_silent_and_not_dead(runs):
    stdout = runs("show", "quiet")[1]
    assert re.search("^state +silent for 12 min; lately never for more than 2 s$", stdout, re.MULTILINE)
    assert "dead" not in stdout and "at the latest" not in stdout


def test_show_says_when_it_will_be_done_and_from_what(runs):
    shown = dict(
        re.split(r" {2,}", line, maxsplit=1) for line in runs("show", "going")[1].split("\n\n")[0].splitlines()
    )
    assert re.fullmatch(
        r"tuning in 2 min at the latest \(\S+Z\): 70 steps to go at 2 s each, the pace of the last 60 events",
        shown["done"],
    )
    assert shown["state"].startswith("running: last event ") and shown["trials"] == "2 live"


def test_show_tells_every_trial_and_why_one_failed(runs):
    table = runs("show", "over")[1].split("\n\n")[1]
    assert [re.split(r" {2,}", line) for line in table.splitlines()] == [
        ["trial", "status", "step", "of", "loss", "metric", "dev", "reason"],
        ["t0", "waiting", "30", "100", "-", "accuracy", "0.500", "-"],
        ["t1", "failed", "30", "100", "-", "accuracy", "0.500", "the loss was nan at step 31"],
    ]


def test_show_tells_how_a_run_ended(runs):
    assert "done: published version 3, exit code 3" in runs("show", "over")[1]
    assert "stopped: the disk is full" in runs("show", "nightly/2026-11-25")[1]


def test_a_run_may_be_named_by_its_folder(run, storage):
    assert "running" in run("runs", "show", storage / "going", bank=None)[1]


def test_json_holds_the_same_as_numbers(runs):
    document = json.loads(runs("show", "going", "--json")[1])
    assert (document["state"], document["step"], document["steps_to_go"], document["seconds_per_step"]) == (
        "running", 30, 70, 2.0,
    )  # fmt: skip
    assert document["done_at"] == pytest.approx(document["last_event"] + 140)
    assert document["trials"][0] == {
        "trial": "t0", "task": "t0", "status": "live", "step": 30, "max_steps": 100, "loss": 1.5, "metric": "accuracy",
        "value": 0.5, "reason": None,
    }  # fmt: skip
    listed = json.loads(runs("ls", "--json")[1])["runs"]
    assert [one["state"] for one in listed] == ["running", "stopped", "silent", "done"]
    assert {**document, "quiet_seconds": 0} == {**listed[0], "quiet_seconds": 0, "trials": document["trials"]}


def test_what_is_not_there_is_one_sentence_with_what_is(run, runs, tmp_path):
    code, _, stderr = runs("show", "goin")
    assert code == 2 and stderr.endswith("known: going, nightly/2026-11-25, over, quiet\n")
    code, _, stderr = run("runs", "ls", "--storage", tmp_path / "nowhere", bank=None)
    assert (
        code == 2
        and stderr == f"error: there is no folder {tmp_path}/nowhere: name the runs' folder with --storage DIR\n"
    )


def test_tail_without_following_tells_the_last_lines(runs):
    code, stdout, _ = runs("tail", "over", "--no-follow", "-n", "3")
    assert code == 0
    assert [line.split(" · ")[0] for line in stdout.splitlines()] == ["step 26/100", "t1", "ended: published version 3"]
    assert runs("tail", "over", "-n", "0")[1] == "", "it has ended, so there is nothing to follow"
    events = [json.loads(line) for line in runs("tail", "over", "--json", "-n", "2")[1].splitlines()]
    assert [event["event"] for event in events] == ["finished", "end"]


@pytest.mark.processes
def test_tail_follows_until_the_run_ends(storage):
    words = [*COMMAND, "runs", "tail", "going", "--storage", str(storage), "-n", "1"]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment())
    assert child.stdout is not None and child.stdout.readline().startswith("step 26/100")
    with EventLog(storage / "going" / "events.jsonl") as log:
        log.write("finished", trial="t0", status="tuned", reason=None)
        assert child.stdout.readline() == "t0 · tuned\n"
        log.write("end", version=None, exit=4)
    assert child.communicate(timeout=20)[0] == "ended: nothing was published\n" and child.returncode == 0


@pytest.mark.processes
def test_tail_says_that_a_run_is_silent_and_goes_on(storage):
    words = [*COMMAND, "runs", "tail", "quiet", "--storage", str(storage), "-n", "0"]
    child = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment()
    )
    assert child.stderr is not None and child.stderr.readline().startswith("silent for 12 min; ")
    with EventLog(storage / "quiet" / "events.jsonl") as log:
        log.write("stopped", reason="interrupted")
    assert child.communicate(timeout=20) == ("stopped: interrupted\n", "")


@pytest.mark.parametrize("command", ["ls", "show", "tail"])
@pytest.mark.processes
def test_every_command_has_examples_and_a_summary_that_fits_its_line(command):
    assert f"Examples:\n\n  promptbank runs {command}" in start("runs", command, "--help").stdout
    line = next(line for line in start("runs", "--help").stdout.splitlines() if line.startswith(f"  {command} "))
    assert not line.endswith("...")
    assert start("runs").stdout == start("runs", "--help").stdout


@pytest.mark.processes
def test_a_shell_is_offered_the_runs(storage):
    asked = {"_PROMPTBANK_COMPLETE": "complete_bash", "COMP_WORDS": "promptbank runs show ", "COMP_CWORD": "3"}
    done = start(PROMPT_BANK_RUNS=str(storage), **asked)
    assert (done.stdout.split(), done.stderr) == (["going", "nightly/2026-11-25", "over", "quiet"], "")
    asked["COMP_WORDS"] = "promptbank runs show o"
    assert start(PROMPT_BANK_RUNS=str(storage), **asked).stdout.split() == ["over"]
    assert start(PROMPT_BANK_RUNS="/nowhere", **asked).stderr == ""


@pytest.mark.parametrize("command", [["ls"], ["show", "over"], ["tail", "over"]], ids=" ".join)
@pytest.mark.processes
def test_neither_torch_nor_ray_nor_jinja2_is_imported(storage, command):
    code = (
        "import sys; from pipeline.cli.app import app\n"
        "try: app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'ray', 'pyarrow', 'jinja2'} & set(sys.modules)), file=sys.stderr)"
    )
    words = [sys.executable, "-c", code, "runs", *command, "--storage", str(storage)]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(), check=False)
    assert (done.returncode, done.stderr) == (0, "[]\n")


def test_texts_of_a_run_cannot_steer_a_terminal(runs, storage):
    evil = [*going(), {"time": 66, "event": "finished", "trial": "t0", "status": "failed", "reason": "\x1b[2J\rgone"}]
    write(storage / "evil", evil)
    for command in (["show", "evil"], ["tail", "evil", "--no-follow"]):
        stdout = runs(*command)[1]
        assert "\\x1b[2J" in stdout and all(sign.isprintable() or sign == "\n" for sign in stdout)


DAMAGED = [
    b'{"time": "soon", "event": "step", "step": 3}',
    b'{"time": 1e400, "event": "step", "step": 3}',
    b'{"time": NaN, "event": "begin"}',
    b'{"time": 1e300, "event": "begin"}',
    b'{"time": 5, "event": "step", "step": "many"}',
    b'{"time": 5, "event": "step", "step": ' + b"9" * 400 + b"}",
    b'{"time": 5, "event": "step", "step": 3, "trials": [1, 2]}',
    b'{"time": 5, "event": "step", "step": 3, "trials": {"t0": 5}}',
    b'{"time": 5, "event": "launch", "trials": [{"task": "t0"}]}',
    b'{"time": 5, "event": "eval", "trial": ["t0"], "step": 3}',
    b'{"time": 5, "event": "eval", "trial": "t0", "step": 3, "metric": "loss", "value": "low"}',
    b'{"time": 5, "event": ["step"]}',
    b'{"time": 5, "event": "end", "not_learned": ["t0"]}',
    b'{"time": 5, "event": "end", "not_learned": {"t0": 5}}',
    b'{"time": 5, "event": "stage", "name": {"a": 1}}',
    b'{"time": 5, "event": "step", "trials": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"time": 5, "event": "memory", "stage": "tuning", "peak_bytes": "much"}',
    b'{"time": 5, "event": "memory", "stage": ["tuning"], "peak_bytes": 3}',
    b'{"time": 5, "event": "end", "not_learned": 5}',
    b'{"time": 5, "event": "end", "not_learned": ["t0"]}',
    b'{"time": 5, "event": "end", "not_learned": {"t0": ["a"]}}',
    b"\xff\xfe\x00",
]


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("line", DAMAGED, ids=[line[:44].decode(errors="replace") for line in DAMAGED])
def test_a_damaged_line_of_one_run_is_passed_over(storage, line, place):
    path = storage / "going" / "events.jsonl"
    whole, told = read_run(path.parent, "going"), path.read_bytes()
    path.write_bytes(line + b"\n" + told if place == "first" else told + line + b"\n")
    run, narrator, now = read_run(path.parent, "going"), Narrator(), time.time()
    assert run == whole or run.state == whole.state
    run_row(run, now), run_fields(run, now), run_document(run, now)
    told_again = EventTail(path, whole=True).read()
    for event in told_again:
        narrator.tell(event)
    stages_of(told_again), faults_of(told_again)


def test_a_run_that_cannot_be_read_hides_no_other(runs, storage):
    (storage / "odd" / "events.jsonl").mkdir(parents=True)
    (storage / "pipe").mkdir()
    os.mkfifo(storage / "pipe" / "events.jsonl")
    code, stdout, _ = runs("ls")
    assert code == 0 and {"going", "quiet", "over"} <= {line.split(" ")[0] for line in stdout.splitlines()}
