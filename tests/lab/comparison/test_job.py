"""A whole small comparison in one process with real ranks: its files, and that it resumes where it stopped."""

import json

import numpy as np
import pytest
import ray
from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.errors import BankError, SettingsError
from pipeline.lab.comparison.derived_settings import comparison_settings
from pipeline.lab.comparison.job import run_comparison
from pipeline.lab.comparison.results import read_results
from pipeline.lab.comparison.study import Study
from pipeline.run.checks import check_run
from pipeline.settings import parse_settings
from tests.corpora import reviews
from tests.jobs_data import make_project, write_parquet

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # ranks are started ten times a comparison


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def make_comparison(folder, **compare):
    """Three tasks of reviews, two of them with a test split and the same labels; one is written, not labelled."""
    settings = make_project(folder, max_steps=6, eval_every=3)
    settings["cluster"] = {"num_workers": 1}
    for i, split in enumerate(("train", "dev", "test")):
        write_parquet(folder / "corpora" / "song" / f"{split}.parquet", reviews(60, 40 + i))
    settings["tasks"]["song"] = {split: f"{folder}/corpora/song/{split}.parquet" for split in ("train", "dev", "test")}
    settings["tasks"]["song"] |= {"label_score": "mean", "calibrate": True, "balance": True}
    settings["tasks"]["film"]["sweep"] = {"prompt.length": [2, 4]}
    settings["compare"] = {
        "seeds": 2,
        "test_rows": 40,
        "hard_prompts": {"shots": [2], "text": {"film": "is it good"}},
        "lora": {"rank": 2, "tasks": ["film", "song"], "max_steps": 4, "eval_every": 2},
        "fine_tuning": {"lr": 0.001, "tasks": ["film"], "max_steps": 4, "eval_every": 2},
        "transfer": {"starts": {"song": ["film", "film+book"]}},
        "domain_shift": {"film": ["song"]},
        "panels": ["prompt.length"],
        **compare,
    }
    return settings


def compare(settings, *overrides):
    checked = check_run(comparison_settings(parse_settings(settings, overrides)))
    return run_comparison(checked, Console(quiet=True))


@pytest.fixture(scope="module")
def launches():
    """What was put to the ranks, in turn: the order, and whether the choices were written down by then."""
    return []


@pytest.fixture(scope="module")
def compared(tmp_path_factory, launches):
    folder = tmp_path_factory.mktemp("compared")
    settings = make_comparison(folder)
    real = Study.run_on_ranks

    def watching(study, rank_job, log):
        launches.append((rank_job, (study.folder / "chosen.json").exists()))
        real(study, rank_job, log)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Study, "run_on_ranks", watching)
        return settings, compare(settings)


def test_every_method_is_measured_on_every_task_with_every_seed(compared):
    _, outcome = compared
    found = {}
    for number in outcome.results.numbers:
        found.setdefault((number.method, number.task), []).append(number.seed)
    assert found == {
        ("hard prompt", "film"): [None, 0, 1],
        ("hard prompt", "book"): [None, 0, 1],
        ("hard prompt", "song"): [None, 0, 1],
        ("prompt tuning", "film"): [0, 1, 0, 1],
        ("prompt tuning", "book"): [0, 1],
        ("prompt tuning", "song"): [0, 1],
        ("transferred prompt", "song"): [0, 1, 0, 1],
        ("LoRA", "film"): [0, 1],
        ("LoRA", "song"): [0, 1],
        ("fine-tuning", "film"): [0, 1],
    }
    for number in outcome.results.numbers:
        assert number.failed is None and np.isfinite(number.dev)
        assert (number.test is None) == (number.task == "book"), "book has no test split"
    assert outcome.failed == 0


def test_the_best_choice_by_dev_is_reported_and_one_choice_of_each_method(compared):
    _, outcome = compared
    rows = outcome.results.rows
    for method, task in {(row.method, row.task) for row in rows}:
        own = [row for row in rows if (row.method, row.task) == (method, task)]
        chosen = [row for row in own if row.chosen]
        assert len(chosen) == 1 and chosen[0].dev.mean == max(row.dev.mean for row in own)
    written = json.loads((outcome.folder / "chosen.json").read_text())
    assert {(entry["method"], entry["task"]) for entry in written} == {(row.method, row.task) for row in rows}


def test_costs_are_what_each_method_trains_and_stores(compared):
    _, outcome = compared
    of = {(number.method, number.task, number.written_choice): number for number in outcome.results.numbers}
    prompt = of["prompt tuning", "film", "length 2"]
    assert (prompt.trained_parameters, prompt.stored_bytes, prompt.prompt_tokens) == (64, 256, 2)
    assert prompt.rank_seconds > 0 and prompt.peak_bytes > 2**20
    adapter = of["LoRA", "film", "rank 2, lr 0.001"]
    # q: 32 -> 32, v: 32 -> 16, in two layers.
    assert adapter.trained_parameters == 2 * (2 * (32 + 32) + 2 * (32 + 16)) and adapter.rank_seconds > 0
    assert adapter.stored_bytes == 4 * adapter.trained_parameters and adapter.peak_bytes > 2**20
    tuned = of["fine-tuning", "film", "lr 0.001"]
    assert tuned.trained_parameters > 10_000 and tuned.rank_seconds > 0 and tuned.peak_bytes > 2**20
    assert not list(outcome.folder.glob("fine_tuning/*/tuned")), "what has answered makes room"
    hard = of["hard prompt", "film", "shots 0"]
    assert hard.trained_parameters == 0 and hard.stored_bytes == len("is it good\n\n") and hard.prompt_tokens == 3


def test_ensembles_transfer_likeness_shift_and_panels_are_there(compared):
    _, outcome = compared
    found = outcome.results
    assert {(row.task, row.split) for row in found.ensembles} == {
        ("film", "dev"), ("film", "test"), ("song", "dev"), ("song", "test"), ("book", "dev"),
    }  # fmt: skip
    assert {(cell.prompt_of, cell.on) for cell in found.transfer} == {
        (a, b) for a in ("film", "book", "song") for b in ("film", "book", "song")
    }
    assert len(found.likeness) == 3 and all(abs(pair.mean_token) <= 1 for pair in found.likeness)
    assert {(row.method, row.on) for row in found.shifts} == {
        (method, on) for method in ("hard prompt", "prompt tuning", "LoRA", "fine-tuning") for on in ("film", "song")
    }
    assert [point.value for point in found.panels[0].points] == [2, 4]
    own = {cell.prompt_of: cell for cell in found.transfer if cell.prompt_of == cell.on == "film"}
    best = [n for n in found.numbers if n.method == "prompt tuning" and n.task == "film" and n.chosen]
    assert own["film"].value in [number.test for number in best]


def test_every_trials_prompt_is_in_the_comparisons_own_bank_and_the_users_is_left_alone(compared):
    _, outcome = compared
    names = PromptBank.open(outcome.folder / "bank").names()
    assert {"film", "film.length-2.seed-0", "film.length-4.seed-1", "book.seed-1"} <= set(names)
    assert not (outcome.folder.parent.parent / "bank").exists()


def test_the_page_and_the_tables_tell_the_results(compared):
    _, outcome = compared
    page, text = (outcome.folder / "report.html").read_text(), (outcome.folder / "report.md").read_text()
    plain = read_results(outcome.folder / "results.json")
    assert "LoRA" in page and "## Methods" in text
    for row in plain["rows"]:
        if row["chosen"] and row["test"]:
            assert f"{row['test']['mean']:.3f}" in page and f"{row['test']['mean']:.3f}" in text


def test_a_finished_comparison_started_again_asks_nothing_of_the_ranks(compared, monkeypatch):
    settings, outcome = compared

    def refuse(*_):
        raise AssertionError("ranks were asked")

    monkeypatch.setattr("pipeline.lab.comparison.study.launch", refuse)
    again = compare(settings)
    assert again.results.numbers == outcome.results.numbers and again.results.rows == outcome.results.rows


class _Killed(BaseException):
    pass


def test_a_comparison_killed_before_each_of_its_phases_ends_as_one_left_alone(
    compared, launches, tmp_path, monkeypatch
):
    _, undisturbed = compared
    settings = make_comparison(tmp_path)
    allowed, real = [0], Study.run_on_ranks

    def killing(study, rank_job, log):
        if not allowed[0]:
            raise _Killed
        allowed[0] -= 1
        real(study, rank_job, log)

    monkeypatch.setattr(Study, "run_on_ranks", killing)
    for _ in range(len(launches)):
        with pytest.raises(_Killed):
            compare(settings)
        allowed[0] = 1  # until the next phase that needs ranks
    found = compare(settings).results
    for ours, theirs in zip(found.numbers, undisturbed.results.numbers, strict=True):
        assert (ours.name, ours.dev, ours.test, ours.chosen) == (theirs.name, theirs.dev, theirs.test, theirs.chosen)


def test_started_again_with_other_settings_it_ends_as_one_that_had_them_from_the_start(tmp_path):
    found = []
    for name, begun_otherwise in (("changed", True), ("fresh", False)):
        settings, test = make_comparison(tmp_path / name), tmp_path / name / "corpora/song/test.parquet"
        if begun_otherwise:
            shorter = ("tasks.song.max_input_tokens=6", "tasks.song.max_bad_rows=0.9")
            compare(settings, "compare.test_rows=20", "tasks.film.max_steps=3", *shorter)
        write_parquet(test, reviews(50, 99))  # another test split, and longer tuning of what song's prompts start from
        found.append(compare(settings).results)
    changed, fresh = found
    for ours, theirs in zip(changed.numbers, fresh.numbers, strict=True):
        assert (ours.name, ours.dev, ours.test, ours.chosen) == (theirs.name, theirs.dev, theirs.test, theirs.chosen)
    for table in ("shifts", "starts", "transfer", "ensembles", "panels"):
        assert getattr(changed, table) == getattr(fresh, table)
    for ours, theirs in zip(changed.rows, fresh.rows, strict=True):
        assert (ours.rank_seconds > 0) == (theirs.rank_seconds > 0) and ours.stored_bytes == theirs.stored_bytes


def test_the_bank_holds_under_a_tasks_name_the_prompt_that_the_report_calls_its_best(compared):
    _, outcome = compared
    bank = PromptBank.open(outcome.folder / "bank")
    for task in ("film", "book", "song"):
        own = [n for n in outcome.results.numbers if (n.method, n.task, n.chosen) == ("prompt tuning", task, True)]
        best = max(own, key=lambda number: (number.dev, -number.dev_loss))
        assert np.array_equal(bank.load(task).array, bank.load(best.name).array)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hard_prompts": {"shots": [61]}}, "shots: 61 is more than the 60 train rows of 'film'"),
        ({"domain_shift": {"film": ["book"]}}, "domain_shift.film: 'book' has no test split"),
        ({"domain_shift": {"song": ["film"]}}, "'film' has the labels 'bad', 'good' and 'song' 'negative', 'positive'"),
    ],
)
def test_what_the_rows_rule_out_is_refused_before_anything_is_tuned(tmp_path, changes, sentence):
    settings = make_comparison(tmp_path, **changes)
    if "labels" in sentence:
        for split in ("train", "dev", "test"):
            rows = [(text, {"positive": "good", "negative": "bad"}[label]) for text, label in reviews(60, 3)]
            write_parquet(tmp_path / "corpora/film" / f"{split}.parquet", rows)
    with pytest.raises(SettingsError) as caught:
        compare(settings)
    assert sentence in str(caught.value)
    assert not (tmp_path / "runs/small/prompts/checkpoints").exists()


def test_a_store_that_can_hold_no_bank_is_refused_before_anything_is_tuned(tmp_path, monkeypatch):
    def unfit(bank):
        raise BankError(f"{bank.uri} is unfit")

    monkeypatch.setattr(PromptBank, "check_fit", unfit)
    monkeypatch.setattr(Study, "run_on_ranks", lambda *rest: pytest.fail("ranks were started"))
    with pytest.raises(BankError, match=r"runs/small/bank is unfit"):
        compare(make_comparison(tmp_path))


def test_no_rank_is_given_a_test_row_before_the_choices_are_written_down(compared, launches):
    asked_on_test = False
    for rank_job, chosen in launches:
        asked = [question.split for question in getattr(rank_job, "questions", ())]
        asked += [question.split for lora in getattr(rank_job, "jobs", ()) for question in lora.questions]
        asked_on_test |= "test" in asked
        assert chosen or "test" not in asked
        if not asked:  # it tunes
            corpora = getattr(rank_job, "corpora", None) or {"": rank_job.corpus}
            assert not any("test" in corpus["splits"] for corpus in corpora.values())
    assert asked_on_test and not launches[0][1]


def test_a_hard_prompt_too_long_for_the_model_is_refused_before_anything_is_tuned(tmp_path):
    settings = make_comparison(tmp_path, hard_prompts={"shots": [40]})
    with pytest.raises(SettingsError, match=r"longer than the model's context of 256 tokens"):
        compare(settings)
    assert not (tmp_path / "runs/small/prompts/checkpoints").exists()
