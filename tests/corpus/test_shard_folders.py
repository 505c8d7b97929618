"""Folders that are being built, and the removal of those whose builder died."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.corpus.shard_folders import being_built, remove_abandoned

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
BUILDER = """
import sys, time
from pathlib import Path
from pipeline.corpus.shard_folders import being_built
with being_built(Path(sys.argv[1])):
    print("building", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def builder(tmp_path):
    """A process that builds, and what it builds."""
    build = tmp_path / ".build"
    command = [sys.executable, "-c", BUILDER, str(build)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "building\n"
    yield process, build
    process.kill()
    process.communicate()


def die(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()


def test_what_a_killed_builder_left_is_removed_and_a_living_ones_is_not(builder, tmp_path):
    process, build = builder
    remove_abandoned(tmp_path)
    assert build.is_dir()
    die(process)
    remove_abandoned(tmp_path)
    assert not build.exists()


def test_another_hosts_build_is_left_alone_for_a_day(builder, tmp_path):
    process, build = builder
    die(process)
    (lock,) = build.iterdir()
    lock.write_text("another-host")
    assert_left_alone_for_a_day(build, tmp_path)


def test_where_files_cannot_be_locked_a_build_is_left_alone_for_a_day(builder, tmp_path, monkeypatch):
    process, build = builder
    die(process)

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    assert_left_alone_for_a_day(build, tmp_path)


def assert_left_alone_for_a_day(build: Path, parent: Path) -> None:
    remove_abandoned(parent)
    assert build.is_dir()
    os.utime(build, (0, 0))
    remove_abandoned(parent)
    assert not build.exists()


def test_what_is_finished_leaves_the_build_without_its_lock_and_the_rest_goes(tmp_path):
    with being_built(tmp_path / ".good") as build:
        (build / "one").mkdir()
        (build / "one/rows").touch()
        (build / "other").mkdir()
        (build / "one").rename(tmp_path / "one")
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["one", "one/rows"]
    with pytest.raises(KeyError), being_built(tmp_path / ".bad"):
        raise KeyError
    assert not (tmp_path / ".bad").exists()
