"""Stores that go away, disks that fill and checkpoints that rot: the run waits, or ends in one sentence and goes on."""

import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.bank import PromptBank
from pipeline.corpus.writing import read_shard
from tests.bank.test_object_store import Visit, serving
from tests.job_process import (
    assert_nothing_is_left,
    assert_same,
    events,
    finish,
    processes_of,
    project_in,
    run,
    start,
    wait_for_step,
)

pytest_plugins = ["tests.bank.s3_server"]

AWAY = {
    "errors": lambda visit: visit.complain(503, "SlowDown"),
    "silence": lambda visit: time.sleep(60),
    "nobody": Visit.reset,
}


class Outage:
    """A proxy before the store that can be told to fail, for so many seconds after it was first asked."""

    def __init__(self, endpoint: str, how: str, seconds: float) -> None:
        self._endpoint, self._fail, self._seconds = endpoint, AWAY[how], seconds
        self._begun = None
        self.ready = Event()
        """From when on the next request finds the store gone."""
        self.refused = 0

    def answer(self, visit: Visit) -> None:
        if self.ready.is_set():
            self._begun = self._begun or time.monotonic()
            if time.monotonic() - self._begun < self._seconds:
                self.refused += 1
                visit.body()
                self._fail(visit)
                return
        visit.forward(self._endpoint)()


@pytest.mark.slow
@pytest.mark.parametrize("how", AWAY)
def test_a_store_that_is_away_for_a_minute_when_the_night_is_published_is_waited_for(undisturbed, s3, how):
    outage, uri = Outage(s3.endpoint, how, seconds=60), s3.new_uri()
    log = undisturbed / "runs/small/events.jsonl"
    before = len(events(log.parent))
    with serving(outage.answer) as proxy:
        environment = {**os.environ, "AWS_ENDPOINT_URL": proxy}
        # Its trials are finished, so that this start only publishes.
        process = start(undisturbed / "settings.yaml", "--set", f"bank.uri={uri}", env=environment)
        while "publish" not in [event.get("name") for event in events(log.parent)[before:]]:
            assert process.poll() is None, finish(process)
            time.sleep(0.01)
        outage.ready.set()
        output = finish(process)
    assert process.returncode == 0, output
    assert outage.refused > 1 and "publish: trying again soon: cannot " in output
    assert PromptBank.open(uri).versions() == (1,)
    assert_same(uri, undisturbed / "bank")
    assert "step" not in {event["event"] for event in events(log.parent)[before:]}, "it trained again"


@pytest.mark.slow
def test_a_store_that_stays_away_is_one_sentence_and_the_next_start_only_publishes(undisturbed, s3, monkeypatch):
    """In this process, where patience can be cut short."""
    import typer

    from jobs.tune_prompts import main
    from pipeline.bank import object_store
    from pipeline.run import stages

    monkeypatch.setattr(stages, "PATIENCE_S", 1.0)
    monkeypatch.setattr(object_store, "_RETRY_SECONDS", 0.5)
    outage, uri = Outage(s3.endpoint, "nobody", seconds=3600), s3.new_uri()
    log = undisturbed / "runs/small"
    before = len(events(log))

    def watch() -> None:
        while "publish" not in [event.get("name") for event in events(log)[before:]]:
            time.sleep(0.005)
        outage.ready.set()

    with serving(outage.answer) as proxy, monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", proxy)
        Thread(target=watch, daemon=True).start()
        with pytest.raises(typer.Exit) as caught:
            main(undisturbed / "settings.yaml", [f"bank.uri={uri}"])
        assert caught.value.exit_code == 5 and outage.refused
    before = len(events(log))
    run(undisturbed / "settings.yaml", "--set", f"bank.uri={uri}")
    assert PromptBank.open(uri).versions() == (1,)
    assert "step" not in {event["event"] for event in events(log)[before:]}, "it trained again"


@pytest.mark.slow
def test_a_store_that_is_away_while_corpora_are_read_is_waited_for(undisturbed, s3, tmp_path):
    outage, uri = Outage(s3.endpoint, "nobody", seconds=15), s3.new_uri()
    settings = project_in(tmp_path / "project", max_steps=20, eval_every=10)
    film = tmp_path / "project/corpora/film"
    for path in film.glob("*.parquet"):
        s3.put(f"{uri}/{path.name}", path.read_bytes())
    with serving(outage.answer) as proxy:
        query = f"?scheme=http&endpoint_override={proxy.removeprefix('http://')}&region=us-east-1"
        paths = [f"tasks.film.{split}={uri}/{split}.parquet{query}" for split in ("train", "dev", "test")]
        process = start(settings, *(argument for path in paths for argument in ("--set", path)))
        while not (tmp_path / "project/runs/small/events.jsonl").exists():
            assert process.poll() is None, finish(process)
            time.sleep(0.01)
        outage.ready.set()
        output = finish(process)
    assert process.returncode == 0, output
    assert outage.refused and "corpus: trying again soon: task 'film'" in output


def with_a_flipped_bit(data: bytes) -> bytes:
    flipped = bytearray(data)
    place = random.Random(time.time_ns()).randrange(8 * len(data))
    flipped[place // 8] ^= 1 << place % 8
    print(f"bit {place} of {8 * len(data)}")
    return bytes(flipped)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [lambda data: data[:-7], with_a_flipped_bit], ids=["cut", "flipped"])
def test_a_damaged_newest_checkpoint_costs_no_more_than_the_steps_since_the_one_before(undisturbed, tmp_path, damage):
    settings = project_in(tmp_path / "project")
    folder = tmp_path / "project/runs/small"
    process = start(settings)
    wait_for_step(folder, 60, process)
    process.kill()
    process.wait()
    assert_nothing_is_left(process)
    before, newest = sorted(folder.glob("checkpoints/*.safetensors"))
    newest.write_bytes(damage(newest.read_bytes()))
    run(settings)
    (resumed,) = events(folder, "resume")
    assert before.stem == f"step-{resumed['step']:09d}"
    assert_same(tmp_path / "project/bank", undisturbed / "bank")


@pytest.mark.slow
def test_a_disk_that_fills_is_one_sentence_and_with_room_again_the_run_goes_on(undisturbed, tmp_path):
    settings = project_in(tmp_path / "project")
    runs = tmp_path / "project/runs"
    runs.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(runs)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        process = start(settings, "--set", "run.max_failures=1")
        wait_for_step(runs / "small", 60, process)
        fill(runs / "filler")
        output = finish(process)
        assert process.returncode == 5, output
        sentence = output.strip().splitlines()[-1]
        assert sentence.startswith("error: cannot write ") and "No space left on device" in sentence, output
        assert_nothing_is_left(process)
        assert not list((tmp_path / "project").glob("bank/versions/*")), "something was published"
        (runs / "filler").unlink()
        run(settings)
        assert events(runs / "small", "resume")[-1]["step"] > 0
        assert_same(tmp_path / "project/bank", undisturbed / "bank")
    finally:
        subprocess.run(["umount", "-l", str(runs)], check=True)


def fill(path: Path) -> None:
    """Take all room on the disk."""
    with suppress(OSError), open(path, "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))


@pytest.mark.slow
def test_a_killed_worker_of_ray_data_is_done_without(tmp_path):
    def project(name: str) -> Path:
        settings = project_in(tmp_path / name, max_steps=20, eval_every=10)
        corpus = tmp_path / name / "corpora/film/train.parquet"
        rows = pq.read_table(corpus)
        with pq.ParquetWriter(corpus, rows.schema) as writer:
            for _ in range(40):
                writer.write_table(pa.concat_tables([rows] * 500))
        return settings

    run(project("undisturbed"))
    process = start(project("killed"))
    while not (tasks := [p for p in processes_of(process) if "MapBatches" in " ".join(p.cmdline())]):
        assert process.poll() is None, finish(process)
        time.sleep(0.005)
    tasks[0].send_signal(signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert_same(tmp_path / "killed/bank", tmp_path / "undisturbed/bank")
    shards = {name: token_shards(tmp_path / name / "runs/token_shards") for name in ("undisturbed", "killed")}
    assert shards["killed"] == shards["undisturbed"], "rows are missing, or there twice"
    assert_nothing_is_left(process)


def token_shards(folder: Path) -> list[tuple[int, list[str]]]:
    """Of each tokenised split: its rows, and what else than shards and a manifest lies there."""
    found = []
    for split in (manifest.parent for manifest in folder.glob("*/manifest.json")):
        rows = sum(batch.num_rows for path in split.glob("*.arrow") for batch in read_shard(path))
        found.append((rows, sorted(path.name for path in split.iterdir() if path.suffix != ".arrow")))
    return sorted(found)
