"""The job in one process with its real ranks: resumed, repeated, warm-started."""

import os

import numpy as np
import pytest
from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.run.checks import check_run
from pipeline.run.job import run_job
from pipeline.settings import parse_settings


def run(project, *overrides):
    return run_job(check_run(parse_settings(project, overrides)), Console(quiet=True))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_every_family_goes_the_whole_way(tmp_path, family):
    from tests.jobs_data import make_project

    outcome = run(make_project(tmp_path, family), "run.max_failures=0")
    assert outcome.exit == 0 and outcome.version == 1
    assert PromptBank.open(tmp_path / "bank").load("book").array.shape == (7, 32)


def test_a_finished_run_publishes_nothing_twice_also_when_another_came_after_it(project, tmp_path):
    assert run(project).version == 1
    assert run(project, "run.name=other", "run.seed=1").version == 2
    assert run(project).version == 1
    bank = PromptBank.open(tmp_path / "bank")
    assert bank.versions() == (1, 2) and bank.version == 2, "the alias stays at the later version"


def test_a_run_killed_between_manifest_and_alias_moves_the_alias_when_started_again(project, tmp_path):
    run(project)
    for move in (tmp_path / "bank/aliases/latest").iterdir():
        move.unlink()
    assert run(project).version == 1
    assert PromptBank.open(tmp_path / "bank").version == 1


def test_a_prompt_started_from_the_bank_starts_where_that_one_ended(project, tmp_path):
    first = {result.trial: result for result in run(project).results}
    second = run(project, "run.name=warm", "tasks.film.prompt={init: bank, source: film@latest}")
    film = next(result for result in second.results if result.trial == "film")
    assert film.dev_before == pytest.approx(first["film"].dev_after)
    longer = run(project, "run.name=long", "tasks.film.prompt={init: bank, source: film@1, length: 6}")
    assert longer.exit == 0 and PromptBank.open(tmp_path / "bank").load("film").array.shape == (6, 32)


def test_a_run_restarted_after_the_bank_moved_on_keeps_what_it_started_from(project, tmp_path):
    run(project)
    warm = ["run.name=warm", "tasks.film.prompt={init: bank, source: film@latest}"]
    version = run(project, *warm).version
    assert run(project, "run.name=other", "run.seed=1").version == version + 1
    assert run(project, *warm).version == version, "its start is the prompt that it first found"


def test_paths_relative_to_where_the_job_starts_reach_the_ranks(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("train", "dev", "test"):
        project["tasks"]["film"][key] = os.path.relpath(project["tasks"]["film"][key], tmp_path)
    project["model"]["path"] = "./model"
    project["run"]["storage"], project["bank"]["uri"] = "./runs", "./bank"
    assert run(project, "run.max_failures=0").version == 1


def test_the_seed_decides_the_prompts_and_nothing_else_does(project, tmp_path):
    run(project)
    run(project, "run.name=again", "tasks.film.seed=0")
    run(project, "run.name=other", "tasks.film.seed=1")
    bank = PromptBank.open(tmp_path / "bank")
    film = [bank.load(f"film@{version}").array for version in (1, 2, 3)]
    np.testing.assert_array_equal(film[0], film[1])
    assert not np.array_equal(film[0], film[2])
