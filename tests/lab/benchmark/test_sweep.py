"""The sweep's benchmark: its sides tune the same trials, and halving spends fewer steps on them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import CorpusError
from pipeline.lab.benchmark.sweep import SweepOptions, compare_sweeps
from tests.corpora import reviews
from tests.tiny import make_model


def options(folder, tasks=("film", "book")) -> SweepOptions:
    return SweepOptions(
        model=str(make_model(folder / "model", "llama", scale=1.0)),
        data=folder / "data",
        tasks=tasks,
        lengths=[2, 5],
        rates=[0.01, 0.1],
        seeds=2,
        batch_size=3,
        steps=8,
        eval_every=2,
        dev_rows=10,
        factor=2,
        sample=4,
        rounds=1,
        ranks=1,
        threads=1,
    )


@pytest.mark.slow
@pytest.mark.processes
def test_trials_together_alone_and_under_halving_end_with_the_same_prompts(tmp_path):
    files = [f"{task}/{split}.parquet" for task in ("film", "book") for split in ("train", "dev")]
    for seed, path in enumerate(tmp_path / "data" / file for file in files):
        path.parent.mkdir(parents=True, exist_ok=True)
        texts, labels = zip(*reviews(30, seed), strict=True)
        pq.write_table(pa.table({"text": texts, "label": labels}), path)
    result = compare_sweeps(options(tmp_path), tmp_path / "sweep.json")
    assert (result.trials, result.together.steps, result.alone.trials) == (16, 16 * 8, 4)
    assert set(result.alone_apart) == {0.01, 0.1}
    for apart in [*result.alone_apart.values(), *result.survivors_apart.values()]:
        assert apart.prompt < 1e-3 and apart.last_loss < 1e-3
    assert result.halving.steps < 0.7 * result.together.steps and result.halving.ends["tuned"] >= 2
    assert result.alone.tokens < result.together.tokens and result.alone_seconds == [
        4 * s for s in result.alone.seconds
    ]
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert written["together"]["best"] == result.together.best and set(written["ratios"]) == set(result.ratios)


def test_data_that_is_not_there_gets_one_sentence(tmp_path):
    with pytest.raises(CorpusError, match=r"nothing/train\.parquet cannot be read"):
        compare_sweeps(options(tmp_path, ["nothing"]), tmp_path / "sweep.json")
