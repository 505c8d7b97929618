"""The job in one process with its real ranks: resumed, repeated, warm-started."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console
from safetensors.numpy import load_file

from pipeline.bank import PromptBank
from pipeline.errors import LeaseError, PromptBankError, UnreachableError
from pipeline.reporting.watched import read_run
from pipeline.run.checks import check_run
from pipeline.run.job import run_job
from pipeline.serving.prompted_model import PromptedModel
from pipeline.serving.served_backbone import load_backbone
from pipeline.settings import parse_settings
from tests.corpora import reviews
from tests.families import DECODERS, make_decoder
from tests.jobs_data import make_project
from tests.seq2seq_families import make_seq2seq
from tests.tiny import make_model

pytestmark = pytest.mark.usefixtures("local_ray")


def read_events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(project, *overrides):
    return run_job(check_run(parse_settings(project, overrides)), Console(quiet=True))


@pytest.mark.parametrize(
    ("family", "rows_run"),
    [
        pytest.param("t5", "packed", marks=pytest.mark.slow),
        pytest.param("lfm2", "padded", marks=pytest.mark.slow),  # a hybrid
        pytest.param("qwen3_moe", "packed", marks=pytest.mark.slow),
        pytest.param("gpt2", "packed", marks=pytest.mark.slow),
        pytest.param("gemma3_text", "packed", marks=pytest.mark.slow),
        pytest.param("gpt_oss, sinks", "packed", marks=pytest.mark.slow),
        pytest.param("mamba2", "padded", marks=pytest.mark.slow),
    ],
)
def test_every_kind_of_family_goes_the_whole_way_over_two_ranks(tmp_path, family, rows_run):
    project = make_project(tmp_path)
    shutil.rmtree(tmp_path / "model")
    make_decoder(tmp_path / "model", DECODERS[family]) if family in DECODERS else make_model(tmp_path / "model", family)
    outcome = run(project, "run.max_failures=0")
    assert outcome.exit == 0 and outcome.version == 1
    prompt = PromptBank.open(tmp_path / "bank").load("book")
    assert prompt.array.shape == (7, 32)
    assert prompt.record.rows_run == rows_run
    told = [event.get("text", "") for event in read_events(tmp_path / "runs" / "small" / "events.jsonl")]
    assert any(f"rows run {rows_run}, " in text for text in told)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bart", "switch", "t5gemma2"])
def test_an_encoder_decoder_unlike_t5_goes_the_whole_way_and_answers(tmp_path, family):
    project = make_project(tmp_path, "t5")
    project["model"]["path"] = str(make_seq2seq(tmp_path / "other", family))
    assert run(project, "run.max_failures=0").version == 1
    model = PromptedModel(load_backbone(project["model"]["path"]), PromptBank.open(tmp_path / "bank"))
    texts, tasks = ["good film", "awful food and plain story"], ["film", "book"]
    assert all(np.isfinite(list(scores.values())).all() for scores in model.classify(texts, tasks))
    assert len(model.generate(texts, tasks, max_new_tokens=4)) == 2


@pytest.mark.slow
def test_prompts_with_teachers_of_words_solved_and_unlabelled_rows_go_the_whole_way_over_two_ranks(tmp_path):
    project = make_project(tmp_path)
    (tmp_path / "manual.txt").write_text("the film is good or bad " * 5)
    pq.write_table(pa.table({"text": [text for text, _ in reviews(30, 9)]}), tmp_path / "more.parquet")
    teacher = {"text_file": str(tmp_path / "manual.txt"), "unlabelled": str(tmp_path / "more.parquet")}
    project["tasks"]["film"]["teacher"] = teacher
    project["tasks"]["film"] |= {"max_input_tokens": 64, "max_target_tokens": 8}
    project["tasks"]["book"]["teacher"] = {"examples": 3}
    outcome = run(project, "run.max_failures=0")
    assert outcome.exit == 0 and outcome.version == 1, outcome


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_start_that_loses_its_lease_while_it_waits_for_the_store_publishes_nothing(project, tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.run.job.launch", lambda work, *rest: work(torch.device("cpu"), lambda: False))
    tries = []

    def away(*rest):
        tries.append(rest)
        lease = Path(project["run"]["storage"]) / "small/lease"
        (lease / "2.json").write_text((lease / "1.json").read_text().replace("small", "taker"))
        raise UnreachableError("the store is away")

    monkeypatch.setattr("pipeline.run.job.publish_prompts", away)
    with pytest.raises(LeaseError, match="taker"):
        run(project)
    assert len(tries) == 1, "it may not try again"


def events_of(project):
    return [
        json.loads(line) for line in (Path(project["run"]["storage"]) / "small/events.jsonl").read_text().splitlines()
    ]


@pytest.mark.slow
def test_a_run_leaves_a_page_with_its_curves_and_rows_and_says_that_it_has_ended(project):
    outcome = run(project)
    page = outcome.report.read_text()
    for text in ("Training loss of film", "Dev rouge_l of book", "Version 1 is published.", "usable", "rank-seconds"):
        assert text in page
    begun, *_, end = events_of(project)
    assert (begun["event"], end["event"], end["version"], end["exit"]) == ("begin", "end", 1, 0)
    held = {event["stage"]: event["peak_bytes"] for event in events_of(project) if event["event"] == "memory"}
    assert set(held) == {"backbone", "tuning"} and min(held.values()) > 2**20
    run(project, "run.name=other", "run.seed=1", "cluster.price_per_rank_hour=2")
    page = outcome.report.parents[1].joinpath("other", "report.html").read_text()
    assert "was at 1" in page and "version 1: " in page and "version 2: " in page and "2.00 per rank-hour" in page


@pytest.mark.slow
def test_a_run_that_cannot_go_on_says_so_to_whoever_watches_it(project, tmp_path):
    checked = check_run(parse_settings(project, ()))
    (tmp_path / "bank").write_text("a file where the bank should be")
    with pytest.raises(PromptBankError) as refusal:
        run_job(checked, Console(quiet=True))
    assert events_of(project)[-1]["event"] == "stopped" and events_of(project)[-1]["reason"] == str(refusal.value)
    (tmp_path / "bank").unlink()
    assert run(project).version == 1
    state = read_run(tmp_path / "runs" / "small", "small").state
    assert (
        state.ended
        and state.stopped is None
        and {trial.status for trial in state.trials.values()} <= {"tuned", "no gain", "not learned"}
    )


@pytest.mark.slow
def test_a_prompt_started_from_the_bank_starts_where_that_one_ended_also_when_the_bank_moved_on(project, tmp_path):
    first = {result.trial: result for result in run(project).results}
    warm = ["run.name=warm", "tasks.film.prompt={init: bank, source: film@latest}"]
    outcome = run(project, *warm)
    film = next(result for result in outcome.results if result.trial == "film")
    assert film.dev_before == pytest.approx(first["film"].dev_after)
    assert run(project, *warm).version == outcome.version, "started again, it starts from what it first found"


SWEPT = [
    "tasks.film.sweep={prompt.length: [2, 4, 6], optimizer.lr: [0.05, 0.5]}",
    "tasks.film.halving={first: 1, factor: 3}",
    "tasks.book.sweep={seed: [3, 4], optimizer.lr: [1e30, 0.1]}",
    "defaults.eval_every=4",
    "run.max_live_trials=4",
]


@pytest.mark.slow
def test_of_a_sweep_the_best_trial_is_published_under_the_tasks_name_and_once(project, tmp_path):
    outcome = run(project, *SWEPT)
    assert outcome.exit == 0 and outcome.version == 1
    trials = json.loads((tmp_path / "runs/small/trials.json").read_text())
    assert len(trials) == 10
    bank = PromptBank.open(tmp_path / "bank")
    assert bank.names() == ("book", "film")
    for result in outcome.results:
        own = [t for t in trials if t["task"] == result.task]
        (best,) = [t for t in own if t["published"]]
        record = bank.load(result.task).record
        assert result.trial == best["trial"] and result.dev_after == best["dev_after"] == record.metrics.dev_after
        assert best["dev_after"] == max(t["dev_after"] for t in own if t["status"] != "failed")
        assert (record.length, record.seed, record.settings_digest, record.steps) == (
            best["prompt"]["length"],
            best["seed"],
            best["settings_digest"],
            best["best_step"],
        )
    film, book = outcome.results
    halved = sum(t["status"] == "halved" for t in trials)
    assert halved >= 3 and film.among == f"best of 6 ({halved} halved)" and book.among == "best of 4 (2 failed)"
    assert film.test is not None
    assert run(project, *SWEPT).version == 1, "started again it publishes nothing new"


@pytest.mark.slow
def test_a_sweeps_winner_is_the_prompt_of_a_task_given_its_choice_alone(project, tmp_path):
    run(project, *SWEPT[:1])
    swept = PromptBank.open(tmp_path / "bank").load("film")
    trials = json.loads((tmp_path / "runs/small/trials.json").read_text())
    best = next(t for t in trials if t["task"] == "film" and t["published"])
    chosen = (
        f"tasks.film.prompt.length={best['prompt']['length']}",
        f"tasks.film.optimizer.lr={best['optimizer']['lr']}",
    )
    run(project, *chosen, "run.name=alone", f"bank.uri={tmp_path}/other")
    alone = PromptBank.open(tmp_path / "other").load("film")
    assert np.linalg.norm(swept.array - alone.array) <= 1e-4 * np.linalg.norm(alone.array)
    assert swept.record.settings_digest == alone.record.settings_digest


@pytest.mark.slow
def test_a_sweep_over_prompts_of_the_bank_starts_each_trial_from_its_own(project, tmp_path):
    project["tasks"]["book"] |= {"metric": "accuracy", "prompt": {"length": 4}}
    first = run(project).results
    project["tasks"]["film"]["sweep"] = {"prompt.init": ["bank"], "prompt.source": ["film@1", "book@1"]}
    run(project, "run.name=warm")
    trials = json.loads((tmp_path / "runs/warm/trials.json").read_text())
    before = {t["prompt"]["source"]: t["dev_before"] for t in trials if t["task"] == "film"}
    assert before["film@1"] == pytest.approx(first[0].dev_after)
    assert set(before) == {"film@1", "book@1"}
    (film, book) = (load_file(path)["prompt"] for path in sorted(tmp_path.glob("runs/warm/warm_starts/film.*"))[::-1])
    bank = PromptBank.open(tmp_path / "bank")
    np.testing.assert_array_equal(film, bank.load("film@1").array)
    np.testing.assert_array_equal(book, bank.load("book@1").array)


@pytest.mark.slow
def test_a_prompt_started_from_a_mix_of_the_banks_starts_at_their_mean(project, tmp_path):
    project["tasks"]["book"] |= {"metric": "accuracy", "prompt": {"length": 4}}
    run(project)
    project["tasks"]["film"]["prompt"] = {"init": "bank", "source": "film@1+book@1"}
    run(project, "run.name=warm")
    (path,) = tmp_path.glob("runs/warm/warm_starts/film.*")
    bank = PromptBank.open(tmp_path / "bank")
    mean = (bank.load("film@1").array + bank.load("book@1").array) / 2
    np.testing.assert_allclose(load_file(path)["prompt"], mean, rtol=1e-6)


@pytest.mark.slow
def test_asked_for_all_the_bank_gets_every_trials_prompt_under_its_own_name_and_once(project, tmp_path):
    every = [*SWEPT, "bank.publish=all"]
    assert run(project, *every).version == 1
    trials = json.loads((tmp_path / "runs/small/trials.json").read_text())
    whole = {trial["trial"]: trial for trial in trials if trial["status"] != "failed"}
    bank = PromptBank.open(tmp_path / "bank")
    assert len(whole) == 8 and set(bank.names()) == {"book", "film", *whole}
    for name, trial in whole.items():
        record = bank.load(name).record
        assert (record.task, record.length, record.seed) == (trial["task"], trial["prompt"]["length"], trial["seed"])
        assert record.metrics.dev_after == trial["dev_after"] and record.settings_digest == trial["settings_digest"]
    for task in ("book", "film"):
        (best,) = [trial["trial"] for trial in trials if trial["task"] == task and trial["published"]]
        np.testing.assert_array_equal(bank.load(task).array, bank.load(best).array)
    assert run(project, *every).version == 1, "started again it publishes nothing new"


@pytest.mark.slow
def test_a_task_whose_every_trial_fails_has_failed_and_says_of_how_many(project):
    outcome = run(project, "tasks.film.sweep={optimizer.lr: [1e30, 1e29]}")
    assert outcome.exit == 3
    film = outcome.results[0]
    assert film.status == "failed" and film.trial == "film" and film.among == "best of 2 (2 failed)"
    assert film.reason.startswith("all of its 2 trials failed; of the first, the loss was")


@pytest.mark.slow
def test_paths_relative_to_where_the_job_starts_reach_the_ranks(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key in ("train", "dev", "test"):
        project["tasks"]["film"][key] = os.path.relpath(project["tasks"]["film"][key], tmp_path)
    project["model"]["path"] = "./model"
    project["run"]["storage"], project["bank"]["uri"] = "./runs", "./bank"
    assert run(project, "run.max_failures=0").version == 1
