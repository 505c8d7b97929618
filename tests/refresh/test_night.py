"""Whole nights in one process with a real rank: what changed is tuned, the rest carried, what is worse stays out."""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.errors import BankError, LeaseError, PromptBankError
from pipeline.refresh import night as nights
from pipeline.refresh.record import read_record, write_record
from pipeline.settings import parse_settings
from tests.corpora import reviews
from tests.jobs_data import write_parquet
from tests.refresh.conftest import night
from tests.tiny import make_model

WORSE = ["tasks.film.prompt.length=1", "tasks.film.max_steps=1", "tasks.film.optimizer.lr=0.0001"]
"""A start from scratch that has no time to learn anything."""


def bank_of(project) -> PromptBank:
    return PromptBank.open(project["bank"]["uri"])


def events(project, date: str) -> list[str]:
    path = Path(project["run"]["storage"]) / f"small-{date}" / "events.jsonl"
    return [json.loads(line)["event"] for line in path.read_text().splitlines()]


def change_corpus(project, task: str = "film") -> None:
    """Other words are wanted from today on, so that the bank's prompt is of little use."""
    other = (
        {"positive": "yes", "negative": "no"} if task == "film" else {"positive": "negative", "negative": "positive"}
    )
    for split, seed in (("train", 99), ("dev", 98), ("test", 97)):
        path = Path(project["tasks"][task]["train"]).with_name(f"{split}.parquet")
        write_parquet(path, [(text, other[label]) for text, label in reviews(60, seed)])


def by_task(record):
    return {task.task: task for task in record.tasks}


def test_the_first_night_tunes_every_task_from_the_start_and_leaves_its_record(first_night):
    folder, settings, record = first_night
    assert (record.exit_code, record.version, record.alias_before, record.alias_after) == (0, 1, None, 1)
    assert {task.decision for task in record.tasks} == {"cold"}
    assert {task.result for task in record.tasks} == {"promoted"}
    assert record == read_record(folder / "runs/small-n1")
    film = by_task(record)["film"]
    assert film.new < film.start and film.rows["train"]["ok"] == 60 and film.trials == ("film",)
    assert {"check", "cluster", "corpus", "tuning", "publish"} == set(record.stages)
    assert all(r.inputs_digest for r in bank_of(settings).manifest(1).prompts.values())


def test_an_unchanged_night_starts_no_rank_loads_no_model_and_publishes_nothing(project, monkeypatch):
    monkeypatch.setattr("pipeline.refresh.tuned.launch", lambda *rest: pytest.fail("ranks were started"))
    # The same rows in files written anew are no change.
    write_parquet(Path(project["tasks"]["film"]["train"]), reviews(60, 0)[::-1])
    record = night(project, "n2")
    assert (record.exit_code, record.version, record.alias_after) == (0, None, 1)
    assert {task.result for task in record.tasks} == {"carried"}
    assert "launch" not in events(project, "n2")
    assert bank_of(project).versions() == (1,)


def test_a_changed_corpus_starts_warm_beside_cold_passes_the_gate_and_the_other_task_keeps_its_blob(project):
    before = bank_of(project).manifest(1).prompts
    change_corpus(project)
    record = night(project, "n2")
    film, book = by_task(record)["film"], by_task(record)["book"]
    assert (film.decision, book.decision) == ("warm", "carried") and film.why == "its corpus changed"
    assert film.trials == ("film.init-sampled_vocab", "film.init-bank")
    assert film.warm_beat_cold in (True, False) and None not in (film.warm, film.cold)
    assert film.p_value > 0.9 and film.dev_rows == 60 and film.new < film.incumbent
    trials = {t["trial"]: t for t in json.loads(Path(project["run"]["storage"], "small-n2/trials.json").read_text())}
    # The warm trial's first evaluation is the bank's prompt, on tonight's rows.
    assert trials["film.init-bank"]["dev_before"] == pytest.approx(film.incumbent)
    after = bank_of(project).manifest(2).prompts
    assert after["book"].digest == before["book"].digest and after["book"].status == "carried_forward"
    assert after["book"].tuned_in == 1 and record.alias_after == record.version == 2
    assert (film.result, after["film"].status, after["film"].tuned_in) == ("promoted", "tuned", 2)
    assert after["film"].metrics.dev_after == pytest.approx(film.new)
    assert night(project, "n3").version is None, "the night after has nothing to do"


@pytest.mark.slow
def test_a_table_that_was_compacted_is_carried_and_one_whose_rows_were_updated_is_tuned(project, tmp_path):
    film, table = project["tasks"]["film"], tmp_path / "lake" / "film"
    rows = pq.read_table(film["train"])
    for part in range(3):
        write_deltalake(table, rows.slice(part * 20, 20), mode="append")
    film["train"] = f"delta://{table}"
    # The first night's settings: the table's rows are those of its Parquet file.
    assert by_task(night(project, "n2"))["film"].decision == "carried"
    DeltaTable(table).optimize.compact()
    compacted = by_task(night(project, "n3"))["film"]
    assert (compacted.decision, compacted.tables) == ("carried", {"train": [f"delta://{table}@3"]})
    change_corpus({"tasks": {"film": {"train": film["dev"]}}})
    DeltaTable(table).update({"label": "case label when 'positive' then 'yes' else 'no' end"})
    tuned = by_task(night(project, "n4"))["film"]
    assert (tuned.decision, tuned.result, tuned.tables) == ("warm", "promoted", {"train": [f"delta://{table}@4"]})
    record = bank_of(project).manifest(2).prompts["film"]
    assert [state.written for state in record.tables["train"]] == [f"delta://{table}@4"]
    report = Path(project["run"]["storage"], "small-n4/report.html").read_text()
    assert f"Train was read from delta://{table}@4" in report


def test_other_unlabelled_rows_are_another_corpus_from_which_a_night_tunes_anew(project, tmp_path):
    more, book = tmp_path / "more.parquet", project["tasks"]["book"]
    book["teacher"] = {"text": "good or bad", "unlabelled": str(more)}
    short = ["tasks.book.max_steps=2", "tasks.book.eval_every=2"]
    decisions = []
    for date, seed in (("n2", 7), ("n3", 7), ("n4", 8)):
        write_parquet(more, reviews(20, seed))
        decisions.append(by_task(night(project, date, *short))["book"].decision)
    assert decisions == ["warm", "carried", "warm"]


def test_a_prompt_that_no_step_makes_better_stays_and_is_not_tried_again(project):
    rows = reviews(60, 0)
    write_parquet(Path(project["tasks"]["film"]["train"]), rows[:50])  # fewer rows of the same kind
    harsh = ["tasks.film.max_steps=1", "tasks.film.optimizer.lr=3", "refresh.cold_side=false"]
    record = night(project, "n2", *harsh)
    film = by_task(record)["film"]
    assert (film.decision, film.result, film.worse, film.p_value) == ("warm", "kept", False, 1.0)
    assert "no step was better" in film.reason and film.new == film.incumbent == film.warm and film.cold is None
    assert (record.exit_code, record.version, record.alias_after) == (0, 2, 2)
    assert by_task(night(project, "n3", *harsh))["film"].decision == "carried"


def test_the_same_vectors_are_another_prompt_once_labels_are_to_be_scored_in_another_way(project):
    before = bank_of(project).manifest(1).prompts["film"]
    harsh = ["tasks.film.max_steps=1", "tasks.film.optimizer.lr=3", "refresh.cold_side=false"]
    film = by_task(night(project, "n2", *harsh, "tasks.film.label_score=mean"))["film"]
    after = bank_of(project).manifest(2).prompts["film"]
    assert (film.decision, film.result, film.p_value) == ("warm", "promoted", 1.0)
    assert (before.label_score, after.label_score, after.digest) == ("sum", "mean", before.digest)


def test_a_worse_prompt_is_kept_out_with_its_reason_and_is_not_tried_again(project, monkeypatch):
    before = bank_of(project).manifest(1).prompts["film"]
    record = night(project, "n2", *WORSE)
    film = by_task(record)["film"]
    assert film.decision == "cold" and "prompt.length is 1 and was 4" in film.why
    assert (film.result, film.worse, film.stays, record.exit_code) == ("kept", True, True, 3)
    assert film.incumbent < film.new and "p =" in film.reason and film.p_value < 0.05
    after = bank_of(project).manifest(2).prompts["film"]
    assert (after.digest, after.status, after.reason) == (before.digest, "kept", film.reason)
    monkeypatch.setattr("pipeline.refresh.tuned.launch", lambda *rest: pytest.fail("ranks were started"))
    again = night(project, "n3", *WORSE)
    assert by_task(again)["film"].decision == "carried" and "not taken" in by_task(again)["film"].why


def test_a_removed_task_leaves_with_a_note_and_a_new_one_starts_cold(project):
    project["tasks"]["paper"] = project["tasks"].pop("book")
    record = night(project, "n2")
    of = by_task(record)
    assert (of["film"].result, of["paper"].result, of["book"].result) == ("carried", "promoted", "removed")
    assert of["paper"].why == "a new task"
    manifest = bank_of(project).manifest(2)
    assert sorted(manifest.prompts) == ["film", "paper"]
    assert manifest.removed == {"book": "the settings have no such task any more"} and record.exit_code == 0


@pytest.mark.slow
def test_a_canary_that_is_worse_leaves_the_alias_and_the_next_night_goes_on_from_where_it_stands(project):
    change_corpus(project, "book")
    canary = ["refresh.canaries=[film]"]
    record = night(project, "n2", *WORSE, *canary)
    assert (record.exit_code, record.version, record.alias_before, record.alias_after) == (6, 2, 1, 1)
    assert [condition.held for condition in record.conditions] == [True, False]
    bank = bank_of(project)
    assert bank.versions() == (1, 2) and bank.version == 1
    # Compared with the alias' version, not with the newest: film is unchanged, book's change is still to be made.
    record = night(project, "n3", *canary)
    assert by_task(record)["film"].result == "carried" and by_task(record)["book"].decision == "warm"
    assert (record.exit_code, record.version, record.alias_after) == (0, 3, 3)
    assert bank.manifest(3).prompts["film"].digest == bank.manifest(1).prompts["film"].digest


@pytest.mark.slow
def test_a_new_backbone_retunes_all(project):
    make_model(Path(project["model"]["path"]), seed=1, scale=1.0)
    record = night(project, "n2")
    assert {task.decision for task in record.tasks} == {"retune"} and record.new_backbone
    assert (record.exit_code, record.alias_after) == (0, 2)
    bank = bank_of(project)
    first, second = bank.manifest(1), bank.manifest(2)
    assert first.backbone.fingerprint != second.backbone.fingerprint == record.backbone
    assert all(prompt.tuned_in == 2 for prompt in second.prompts.values())
    assert night(project, "n3").version is None


@pytest.mark.slow
def test_a_task_that_fails_keeps_its_prompt_is_told_of_and_is_tried_again(project):
    change_corpus(project)
    broken = ["tasks.film.optimizer.lr=1e30"]
    record = night(project, "n2", *broken)
    film = by_task(record)["film"]
    assert (film.result, film.stays, record.exit_code, record.version) == ("failed", True, 4, None)
    assert "lower optimizer.lr" in film.reason
    change_corpus(project, "book")
    record = night(project, "n3", *broken, "refresh.min_refreshed=0")
    assert (record.exit_code, by_task(record)["film"].decision, record.alias_after) == (3, "warm", 2)
    kept = bank_of(project).manifest(2).prompts["film"]
    assert kept.status == "kept" and "lower optimizer.lr" in kept.reason and kept.tuned_in == 1


def test_a_corpus_that_went_missing_stops_no_other_task_and_its_prompt_stays(project):
    Path(project["tasks"]["film"]["train"]).unlink()
    change_corpus(project, "book")
    record = night(project, "n2")
    film, book = by_task(record)["film"], by_task(record)["book"]
    assert (film.decision, film.result, film.stays) == ("unusable", "failed", True) and "train.parquet" in film.reason
    assert book.result in ("promoted", "kept") and record.exit_code == 3
    bank = bank_of(project)
    assert bank.manifest(2).prompts["film"].digest == bank.manifest(1).prompts["film"].digest
    Path(project["tasks"]["book"]["train"]).unlink()
    with pytest.raises(PromptBankError):
        night(project, "n3")
    failed = read_record(Path(project["run"]["storage"]) / "small-n3")
    assert failed.state == "failed" and failed.exit_code == 2 and "film" in failed.failure


def test_a_prompt_that_is_damaged_in_the_bank_is_tuned_from_the_start(project):
    digest = bank_of(project).manifest(1).prompts["film"].digest
    blob = Path(project["bank"]["uri"]) / "blobs/sha256" / f"{digest}.safetensors"
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes()[:-4] + b"oops")
    change_corpus(project)
    film = by_task(night(project, "n2"))["film"]
    assert (film.decision, film.result, film.incumbent) == ("cold", "promoted", None) and "damaged" in film.why


def test_a_night_that_was_stopped_while_it_published_is_completed_and_one_that_is_done_does_nothing(project):
    change_corpus(project)
    record = night(project, "n2")
    folder = Path(project["run"]["storage"]) / "small-n2"
    moves = Path(project["bank"]["uri"]) / "aliases/latest"
    (moves / "2.json").unlink()  # as if it was killed between manifest and alias
    stopped = replace(record, state="publishing", version=None, alias_after=None, exit_code=None)
    write_record(folder, stopped)
    completed = night(project, "n2")
    assert (completed.version, completed.alias_after, completed.exit_code) == (2, 2, 0)
    assert completed.tasks == record.tasks and completed.attempts == 2
    assert night(project, "n2") == completed and bank_of(project).versions() == (1, 2)


def test_a_night_that_was_stopped_before_it_published_goes_on_without_new_steps(project, monkeypatch):
    change_corpus(project)

    def stopped(*rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(nights, "decide", stopped)
    with pytest.raises(KeyboardInterrupt):
        night(project, "n2")
    record = read_record(Path(project["run"]["storage"]) / "small-n2")
    assert (record.state, record.exit_code, record.failure) == ("failed", 5, "interrupted")
    monkeypatch.undo()
    monkeypatch.setattr("pipeline.refresh.tuned.launch", lambda *rest: pytest.fail("ranks were started again"))
    record = night(project, "n2")
    assert (record.version, record.attempts, record.failure) == (2, 2, None)


def test_a_night_that_lost_its_lease_publishes_nothing_and_leaves_the_others_record_alone(project, monkeypatch):
    change_corpus(project)
    storage = Path(project["run"]["storage"])
    real = nights.decide

    def overtaken(*rest):
        lease = storage / ".leases/small"
        newest = max(lease.glob("*.json"), key=lambda path: int(path.stem))
        other = {**json.loads(newest.read_text()), "run": "small-other"}
        (lease / f"{int(newest.stem) + 1}.json").write_text(json.dumps(other))
        return real(*rest)

    monkeypatch.setattr(nights, "decide", overtaken)
    with pytest.raises(LeaseError, match="small-other"):
        night(project, "n2")
    assert bank_of(project).versions() == (1,)
    assert read_record(storage / "small-n2").state == "running"


def test_a_store_that_can_hold_no_bank_is_refused_before_anything_is_done_and_only_by_a_night(project, monkeypatch):
    def unfit(bank):
        raise BankError(f"{bank.uri} is unfit")

    change_corpus(project)
    monkeypatch.setattr(PromptBank, "check_fit", unfit)
    monkeypatch.setattr(nights, "read_inputs", lambda *rest: pytest.fail("the night went on"))
    with pytest.raises(BankError, match="bank is unfit"):
        night(project, "n2")
    assert read_record(Path(project["run"]["storage"]) / "small-n2").exit_code == 2
    monkeypatch.setattr(nights, "read_inputs", lambda *rest: "looked at")
    folder = Path(project["run"]["storage"])
    assert nights.plan_night_only(parse_settings(project), "n2", folder, Console(quiet=True)) == "looked at"


def test_a_night_leaves_nothing_temporary_behind(first_night):
    folder, _, _ = first_night
    hidden = [path for path in folder.rglob(".*") if path.name != ".leases"]
    assert hidden == [] and os.listdir(folder / "runs/.leases/small") == ["1.json"]


def test_warm_prompts_are_those_of_a_night_of_their_own(project):
    """What is tuned beside a cold start ends as it does alone."""
    change_corpus(project)
    night(project, "n2", "refresh.margin=null")
    record = night({**project, "bank": {"uri": project["bank"]["uri"]}}, "n3", "refresh.cold_side=false")
    assert record.version is None  # n2 has published: nothing to do
    trials = json.loads(Path(project["run"]["storage"], "small-n2/trials.json").read_text())
    beside = next(t for t in trials if t["trial"] == "film.init-bank")
    PromptBank.open(project["bank"]["uri"]).promote(1, "latest", "test")
    night(project, "n4", "refresh.cold_side=false")
    (alone,) = json.loads(Path(project["run"]["storage"], "small-n4/trials.json").read_text())
    np.testing.assert_allclose(alone["dev_loss_after"], beside["dev_loss_after"], rtol=1e-3)
