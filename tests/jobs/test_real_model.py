"""What only the real small model can show; minutes each, `make test-all` runs them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.bank import PromptBank
from pipeline.errors import BackboneError
from pipeline.tuning.loop import TuningRun, tune
from pipeline.tuning.trials import make_trial
from tests.corpora import make_task, task_corpus

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
needs_data = pytest.mark.skipif(not DATA.exists(), reason="../shared/data is not there")


@pytest.fixture(scope="module")
def real_model():
    try:
        return find_model("smollm2-135m")
    except BackboneError as error:
        pytest.skip(str(error))


def pairs(task: str, split: str) -> list[tuple[str, str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(DATA / task / f"{split}.parquet")
    return list(zip(table["text"].to_pylist(), table["label"].to_pylist(), strict=True))


def tuned(folder: Path, files, int8: bool) -> dict[str, tuple[float, float, float]]:
    """For each task (dev loss before, dev metric before, dev metric after) on all dev rows."""
    config, tokenizer = read_config(files), read_tokenizer(files)
    backbone = host_backbone(files, config, int8=int8, dtype=torch.float32, device=torch.device("cpu"), sharded=False)
    torch.set_num_threads(2)
    changes = {
        "prompt": {"length": 16}, "optimizer": {"lr": 0.03}, "batch_size": 8,
        "max_steps": 100, "eval_every": 100, "eval_rows": 872,
    }  # fmt: skip
    corpora, trials = {}, []
    for name in ("sst2", "cr"):
        corpora[name] = task_corpus(
            folder, tokenizer, "decoder-only", name, {s: pairs(name, s) for s in ("train", "dev")}
        )
        trials.append(make_trial(name, make_task(**changes), 0, corpora[name].digest, "backbone"))
    run = TuningRun(trials, corpora, folder / "run", max_live_trials=8, checkpoint_every=50, token_budget=2048)
    return {
        s.trial.name: (s.history[0].loss, s.history[0].value, s.history[-1].value)
        for s in tune(run, backbone, tokenizer)
    }


@needs_data
def test_int8_starts_within_two_percent_of_the_full_models_loss_and_ends_within_a_point(real_model, tmp_path):
    full = tuned(tmp_path / "full", real_model, int8=False)
    int8 = tuned(tmp_path / "int8", real_model, int8=True)
    print({"full": full, "int8": int8})
    for task, (loss, before, after) in full.items():
        assert int8[task][0] == pytest.approx(loss, rel=0.02)
        assert int8[task][2] >= after - 0.01, "int8 costs more than a point"
        assert after > before
    assert np.mean([int8[t][2] - full[t][2] for t in full]) == pytest.approx(0, abs=0.01)


@needs_data
def test_the_config_of_the_readme_runs_as_it_stands_and_improves_every_task(real_model, tmp_path):
    command = [sys.executable, "jobs/tune_prompts.py", "--config", "jobs/configs/sentiment.yaml"]
    # Only where it writes is moved, so that no earlier run is resumed.
    place = ["--set", f"run.storage={tmp_path}/runs", "--set", f"bank.uri={tmp_path}/bank"]
    done = subprocess.run([*command, *place], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-3000:])
    assert done.returncode == 0, done.stdout + done.stderr
    bank = PromptBank.open(tmp_path / "bank")
    assert bank.names() == ("cr", "sst2", "trec")
    for name in bank.names():
        record = bank.load(name).record
        assert record.metrics.dev_after > record.metrics.dev_before
    assert bank.load("trec").record.metrics.test is not None
    assert bank.load("cr").array.shape == (32, 576)
