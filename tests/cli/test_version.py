"""`promptbank --version`."""

import subprocess
import sys
from importlib.metadata import version

import pytest

pytestmark = pytest.mark.processes


def test_the_version_is_told_and_nothing_else():
    command = [sys.executable, "-m", "pipeline.cli.main", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"promptbank {version('promptbank')}\n", "")
