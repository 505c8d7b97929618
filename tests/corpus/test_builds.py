"""Folders being built, and what becomes of those whose builder died."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.corpus.builds import being_built, finished, remove_abandoned

ROOT = Path(__file__).resolve().parents[2]
BUILDER = """
import sys, time
from pathlib import Path
from pipeline.corpus.builds import being_built
with being_built(Path(sys.argv[1])):
    print("building", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def builder(tmp_path):
    """A process that builds `.build` in the folder."""
    command = [sys.executable, "-c", BUILDER, str(tmp_path / ".build")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout.readline() == "building\n"
    yield process
    process.kill()
    process.communicate()


def test_what_a_killed_builder_left_is_removed_and_a_living_ones_is_not(builder, tmp_path):
    remove_abandoned(tmp_path)
    assert (tmp_path / ".build").is_dir()
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    remove_abandoned(tmp_path)
    assert not (tmp_path / ".build").exists()


def test_another_hosts_build_is_left_alone_for_a_day(builder, tmp_path):
    builder.kill()
    builder.wait()
    (lock,) = (tmp_path / ".build").iterdir()
    lock.write_text("another-host")
    remove_abandoned(tmp_path)
    assert (tmp_path / ".build").is_dir()
    os.utime(tmp_path / ".build", (0, 0))
    remove_abandoned(tmp_path)
    assert not (tmp_path / ".build").exists()


def test_a_finished_build_moves_without_its_lock_and_a_failed_one_goes(tmp_path):
    with being_built(tmp_path / ".good"):
        (tmp_path / ".good/rows").touch()
        finished(tmp_path / ".good")
        (tmp_path / ".good").rename(tmp_path / "good")
    assert [path.name for path in (tmp_path / "good").iterdir()] == ["rows"]
    with pytest.raises(KeyError), being_built(tmp_path / ".bad"):
        raise KeyError
    assert not (tmp_path / ".bad").exists()
