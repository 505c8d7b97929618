"""The job in one process with its real ranks: resumed, repeated, warm-started."""

import os

import pytest
from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.run.checks import check_run
from pipeline.run.job import run_job
from pipeline.settings import parse_settings
from tests.jobs_data import make_project


def run(project, *overrides):
    return run_job(check_run(parse_settings(project, overrides)), Console(quiet=True))


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_every_kind_of_family_goes_the_whole_way(tmp_path, family):
    outcome = run(make_project(tmp_path, family), "run.max_failures=0")
    assert outcome.exit == 0 and outcome.version == 1
    assert PromptBank.open(tmp_path / "bank").load("book").array.shape == (7, 32)


def test_a_finished_run_publishes_nothing_twice_whatever_came_after_it_or_where_it_was_killed(project, tmp_path):
    assert run(project).version == 1
    moves = tmp_path / "bank/aliases/latest"
    (moves / "1.json").unlink()  # as if killed between manifest and alias
    assert run(project).version == 1
    assert PromptBank.open(tmp_path / "bank").version == 1, "the alias follows"
    assert run(project, "run.name=other", "run.seed=1").version == 2
    assert run(project).version == 1
    bank = PromptBank.open(tmp_path / "bank")
    assert bank.versions() == (1, 2) and bank.version == 2, "the alias stays at the later version"


def test_a_prompt_started_from_the_bank_starts_where_that_one_ended_also_when_the_bank_moved_on(project, tmp_path):
    first = {result.trial: result for result in run(project).results}
    warm = ["run.name=warm", "tasks.film.prompt={init: bank, source: film@latest}"]
    outcome = run(project, *warm)
    film = next(result for result in outcome.results if result.trial == "film")
    assert film.dev_before == pytest.approx(first["film"].dev_after)
    assert run(project, *warm).version == outcome.version, "started again, it starts from what it first found"


def test_paths_relative_to_where_the_job_starts_reach_the_ranks(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("train", "dev", "test"):
        project["tasks"]["film"][key] = os.path.relpath(project["tasks"]["film"][key], tmp_path)
    project["model"]["path"] = "./model"
    project["run"]["storage"], project["bank"]["uri"] = "./runs", "./bank"
    assert run(project, "run.max_failures=0").version == 1
