"""A run with labels scored by mean and calibrated: the bank's record is enough to answer as the run measured."""

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.run.checks import check_run
from pipeline.run.job import run_job
from pipeline.serving import PromptedModel, load_backbone
from pipeline.settings import parse_settings
from pipeline.tuning.metrics import label_metric
from tests.corpora import TOPICS
from tests.jobs_data import write_parquet

pytestmark = pytest.mark.usefixtures("local_ray")


def skewed(rows: int, salt: str) -> list[tuple[str, str]]:
    """One row in ten is negative; each text is there once."""
    pairs = []
    for i in range(rows):
        label = "negative" if i % 10 == 0 else "positive"
        pairs.append((f"{TOPICS[label][i % 3]} film {salt} {i}", label))
    return pairs


@pytest.fixture
def published(project, tmp_path, monkeypatch):
    """A run whose task is skewed, and is asked for as skewed labels are."""
    monkeypatch.setattr("pipeline.run.job.launch", lambda work, *rest: work(torch.device("cpu"), lambda: False))
    for split in ("train", "dev", "test"):
        write_parquet(tmp_path / "corpora" / "film" / f"{split}.parquet", skewed(60, split))
    project["tasks"]["film"] |= {"metric": "f1", "label_score": "mean", "calibrate": True, "balance": True}
    outcome = run_job(check_run(parse_settings(project, ())), Console(quiet=True))
    assert outcome.version == 1
    return project, outcome


def test_a_service_that_knows_only_the_bank_answers_with_the_score_that_was_published(published, tmp_path):
    project, _ = published
    bank = PromptBank.open(tmp_path / "bank")
    film, book = (bank.load(name).record for name in ("film", "book"))
    assert film.label_score == "mean" and len(film.label_offsets) == len(film.labels) == 2
    assert (book.label_score, book.label_offsets) == ("sum", None)
    model = PromptedModel(load_backbone(project["model"]["path"]), bank)
    for split, figure in (("dev", film.metrics.dev_after), ("test", film.metrics.test)):
        rows = pq.read_table(project["tasks"]["film"][split]).to_pylist()
        answers = model.classify([row["text"] for row in rows], ["film"] * len(rows))
        given = [max(scores, key=lambda label: scores[label]) for scores in answers]
        assert label_metric("f1", given, [row["label"] for row in rows]) == pytest.approx(figure)


def test_what_a_guess_scores_stands_beside_macro_f1_in_the_record_and_on_the_page(published, tmp_path):
    _, outcome = published
    result = next(result for result in outcome.results if result.task == "film")
    # Were all 60 rows called positive, 54 rightly, F1 were 108 / 114 for the one label, and 0 for the other. Who calls
    # each negative with a chance of a tenth, as often as it is right, has about 0.9 and 0.1.
    constant = result.dev_constant
    assert 108 / 114 / 2 < constant == result.test_constant == pytest.approx(0.5, abs=0.01)
    record = PromptBank.open(tmp_path / "bank").load("film").record
    assert record.metrics.dev_constant == record.metrics.test_constant == constant
    assert f"{constant:.3f}" in outcome.report.read_text() and "f1" in outcome.report.read_text()
