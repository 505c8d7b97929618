"""A short chaos run; `python tests/faults/chaos.py` makes long ones."""

import random

import pytest

from tests.faults.chaos import Chaos


@pytest.mark.slow
def test_a_run_survives_faults_drawn_at_random(undisturbed, tmp_path):
    chaos = Chaos(random.Random(20), tmp_path, undisturbed)
    chaos.survive_one_run(faults=1)
    assert chaos.survived == 1 and chaos.injected.total() == 1
