"""What only the real small model can show; minutes each, `make test-all` runs them."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.bank import PromptBank
from pipeline.corpus.reader import open_split
from pipeline.errors import BackboneError
from pipeline.tuning.evaluate import EvalRequest, evaluate
from pipeline.tuning.loop import tune
from pipeline.tuning.progress import TuningRun
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


def hosted(files, int8: bool):
    torch.set_num_threads(2)
    config = read_config(files)
    return host_backbone(files, config, int8=int8, dtype=torch.float32, device=torch.device("cpu"), sharded=False)


def make_run(folder: Path, tokenizer) -> TuningRun:
    changes = {
        "prompt": {"length": 16},
        "optimizer": {"lr": 0.03, "schedule": "linear"},
        "batch_size": 8,
        "max_steps": 80,
        "eval_every": 80,
        "eval_rows": 872,
    }
    corpora, trials = {}, []
    for name in ("sst2", "cr"):
        splits = {split: pairs(name, split) for split in ("train", "dev")}
        corpora[name] = task_corpus(folder, tokenizer, "decoder-only", name, splits)
        trials.append(make_trial(name, make_task(**changes), 0, corpora[name].digest, "backbone"))
    return TuningRun(trials, corpora, folder / "run", max_live_trials=8, checkpoint_every=50, token_budget=2048)


def accuracy(backbone, tokenizer, run: TuningRun, states) -> list[float]:
    requests = []
    for state in states:
        corpus = run.corpora[state.trial.task]
        split = open_split(corpus.splits["dev"])
        requests.append(EvalRequest(state.prompt.detach(), split, "accuracy", corpus.labels, corpus.label_ids, 8))
    return [score.value for score in evaluate(backbone, tokenizer, requests, 2048)]


@needs_data
def test_int8_is_within_two_percent_of_the_full_models_loss_and_within_a_point_of_its_metric(real_model, tmp_path):
    tokenizer = read_tokenizer(real_model)
    full, int8 = hosted(real_model, int8=False), hosted(real_model, int8=True)
    run = make_run(tmp_path / "full", tokenizer)
    on_full = tune(run, full, tokenizer)
    on_int8 = tune(make_run(tmp_path / "int8", tokenizer), int8, tokenizer)
    table = zip(
        on_full, on_int8,
        accuracy(full, tokenizer, run, on_full), accuracy(int8, tokenizer, run, on_full),
        accuracy(int8, tokenizer, run, on_int8), accuracy(full, tokenizer, run, on_int8),
        strict=True,
    )  # fmt: skip
    for a, b, full_full, full_int8, int8_int8, int8_full in table:
        print(a.trial.name, "loss before", a.history[0].loss, b.history[0].loss, "accuracy before", a.history[0].value)
        print("  tuned on full, run on full and int8:", full_full, full_int8)
        print("  tuned on int8, run on int8 and full:", int8_int8, int8_full)
        assert b.history[0].loss == pytest.approx(a.history[0].loss, rel=0.02)
        # The same prompt on both: free of where training's noise happened to end.
        assert full_int8 == pytest.approx(full_full, abs=0.01)
        assert int8_full == pytest.approx(int8_int8, abs=0.01)
        assert int8_int8 > b.history[0].value + 0.05


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
