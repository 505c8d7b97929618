"""A prompt that has not learned is told apart in everything that a run leaves, and can be withheld."""

import json
import random
from pathlib import Path

import jsonschema
import pytest
import torch
from rich.console import Console

from pipeline.bank import Metrics, PromptBank, manifest
from pipeline.reporting.watched import read_run
from pipeline.run.checks import check_run
from pipeline.run.job import run_job
from pipeline.run.results import TaskResult
from pipeline.settings import parse_settings
from pipeline.tuning.state import Evaluation
from tests.jobs_data import write_parquet

pytestmark = pytest.mark.usefixtures("local_ray")


def run(project, *overrides):
    return run_job(check_run(parse_settings(project, overrides)), Console(quiet=True))


@pytest.fixture
def hopeless(project, tmp_path, monkeypatch):
    """Film's labels are drawn by chance, four in five of them positive; book is measured by its loss, which falls."""
    monkeypatch.setattr("pipeline.run.job.launch", lambda work, *rest: work(torch.device("cpu"), lambda: False))
    draw = random.Random(5)
    for split in ("train", "dev", "test"):
        rows = [(f"word {draw.random():.9f}", "negative" if i % 5 == 0 else "positive") for i in range(60)]
        write_parquet(tmp_path / "corpora" / "film" / f"{split}.parquet", rows)
    project["tasks"]["film"]["metric"] = "accuracy"
    project["tasks"]["book"] |= {"metric": "loss", "max_steps": 100, "eval_every": 50}
    return project


def test_it_is_published_and_marked_everywhere_and_withheld_when_asked(hopeless, tmp_path):
    outcome = run(hopeless)
    results = {result.task: result for result in outcome.results}
    assert outcome.exit == 0 and outcome.version == 1
    film = results["film"]
    assert (film.status, film.dev_constant, film.test_constant) == ("not learned", 0.8, 0.8)
    assert results["book"].status == "tuned" and results["book"].dev_constant is None

    bank = PromptBank.open(tmp_path / "bank")
    record = bank.load("film").record
    assert (record.status, record.learned, record.state) == ("tuned", False, "not_learned")
    assert record.metrics.dev_constant == record.metrics.test_constant == 0.8 and "has 0.800" in (record.reason or "")
    assert bank.load("book").record.learned is True
    jsonschema.validate(
        json.loads((tmp_path / "bank/versions/1.json").read_text()), json.loads(manifest.manifest_schema())
    )

    folder = Path(hopeless["run"]["storage"]) / "small"
    page = outcome.report.read_text()
    assert "not learned" in page and "constant 0.800" in page
    trials = {trial["trial"]: trial for trial in json.loads((folder / "trials.json").read_text())}
    assert trials["film"]["learned"] is False and trials["film"]["dev_constant"] == 0.8 and trials["book"]["learned"]
    assert read_run(folder, "small").state.trials["film"].status == "not learned"

    assert run(hopeless).results == outcome.results, "measured again at a restart, it is the same"


def test_one_that_is_withheld_is_published_under_no_name_at_all(hopeless, tmp_path):
    hopeless["tasks"]["film"] |= {"sweep": {"seed": [1, 2]}, "max_steps": 20}
    assert run(hopeless, "bank.not_learned=withhold", "bank.publish=all").exit == 3
    current = PromptBank.open(tmp_path / "bank").current
    assert {record.name: record.status for record in current.records()} == {"film": "failed", "book": "tuned"}


def entry_of(make, metric, values, constant, init="random"):
    state = make(metric, init)
    state.history = [Evaluation(step, value, 1.0) for step, value in enumerate(values)]
    state.best_at, state.status = len(values) - 1, "tuned"
    return TaskResult([state], state, {} if constant is None else {"dev": constant}, withholds=True)


@pytest.mark.parametrize(
    ("metric", "values", "constant", "init", "learned"),
    [
        ("accuracy", [0.5, 0.5], 0.4, "random", False),  # no better than its start
        ("accuracy", [0.5, 0.7], 0.8, "random", False),  # worse than a constant answer
        ("accuracy", [0.5, 0.8], 0.8, "random", False),  # which it may well be
        ("accuracy", [0.5, 0.81], 0.8, "random", True),
        ("accuracy", [0.9, 0.9], 0.8, "bank", True),  # the bank's prompt had learned
        ("accuracy", [0.7, 0.7], 0.8, "bank", False),
        ("accuracy", [1.0, 1.0], 0.8, "random", True),  # nothing is better
        ("accuracy", [0.5, 1.0], 1.0, "random", None),  # on dev rows of one class, nobody can tell
        ("accuracy", [0.5, 0.9], 1.0, "random", False),
        ("f1", [0.3, 0.487], 0.487, "random", False),  # always the label of 95 rows in 100
        ("f1", [0.3, 0.488], 0.487, "random", True),
        ("loss", [2.0, 1.0], None, "random", True),
        ("loss", [2.0, 2.0], None, "random", False),
        ("accuracy", [0.5, 0.7], None, "random", None),  # nobody knows the constant answer
    ],
)
def test_the_rule_in_one_table(metric, values, constant, init, learned):
    from types import SimpleNamespace as Has

    def make(metric, init):
        settings = Has(metric=metric, prompt=Has(init=init))
        return Has(trial=Has(settings=settings), reason=None)

    entry = entry_of(make, metric, values, constant, init)
    assert entry.learned is learned and entry.withheld is (learned is False)
    assert (entry.reason is not None) == (learned is False or constant == 1.0), "in one class it is told why"
    assert ("a guess" in (entry.reason or "")) == (metric == "f1" and learned is False)


def test_manifests_of_before_have_neither_field_and_still_open():
    assert Metrics.model_validate({"dev_before": 0.5}).dev_constant is None
    required = json.loads(manifest.manifest_schema())["$defs"]["PromptRecord"]["required"]
    assert "learned" not in required
