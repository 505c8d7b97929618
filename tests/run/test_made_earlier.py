"""A bank and a run folder that an earlier commit (adc84b7, 2026-11-29) made: opened, and gone on with.

`data/stopped_at_step_40.tar.gz` holds a project whose run was stopped at step 40 of 100, and as `bank_after` the bank
that the same commit left when it went on.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.run.checks import check_run
from pipeline.run.job import run_job
from pipeline.settings import load_settings

pytestmark = pytest.mark.usefixtures("local_ray")
DEFAULTS_THEN = ["defaults.optimizer.schedule=constant", "defaults.patience=10"]
"""Of keys that the file does not name; since then they have other defaults."""
KEPT = Path(__file__).parent / "data" / "stopped_at_step_40.tar.gz"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    with tarfile.open(KEPT) as kept:
        kept.extractall(tmp_path, filter="data")
    settings = tmp_path / "settings.yaml"
    settings.write_text(settings.read_text().replace("/tmp/before/project", str(tmp_path)))
    return tmp_path


@pytest.mark.slow
def test_a_run_that_an_earlier_commit_left_at_step_40_ends_with_the_prompts_that_it_would_have_had(project):
    outcome = run_job(check_run(load_settings(project / "settings.yaml", DEFAULTS_THEN)), Console(quiet=True))
    events = [json.loads(line) for line in (project / "runs/small/events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "resume"] == [40]
    assert outcome.version == 2
    bank, wanted = PromptBank.open(project / "bank"), PromptBank.open(project / "bank_after")
    assert bank.names() == wanted.names() == ("book", "film")
    for name in bank.names():
        # A processor without instructions for int8 takes exact products, which ends 5e-3 off. A step of an optimizer
        # that lost its state would be ten times as far.
        np.testing.assert_allclose(bank.load(name).array, wanted.load(name).array, atol=1e-2)
        assert bank.load(f"{name}@1").record == wanted.load(f"{name}@1").record


def test_a_bank_that_an_earlier_commit_made_verifies_and_gives_every_version(project):
    bank = PromptBank.open(project / "bank_after")
    assert bank.verify().problems == () and bank.versions() == (1, 2)
    assert {name: bank.load(f"{name}@1").array.shape for name in bank.names()} == {"book": (7, 32), "film": (4, 32)}
