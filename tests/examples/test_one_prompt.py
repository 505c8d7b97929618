"""The flat example ends with the prompt that the main job's loop ends with."""

import numpy as np
import pyarrow.parquet as pq
import torch

from examples import one_prompt
from pipeline.backbone.files import find_model, read_config, save_config_and_tokenizer
from pipeline.bank import PromptBank
from pipeline.serving import PromptedModel, load_backbone
from pipeline.settings import Settings, TaskSettings
from pipeline.tuning.hosting import host_on_rank
from pipeline.tuning.loop import tune
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.run_log import RunLog
from pipeline.tuning.trials import make_trial
from tests.corpora import task_corpus
from tests.jobs_data import make_project


def test_it_ends_with_the_main_jobs_prompt_bit_by_bit_and_what_it_published_loads(tmp_path):
    project = make_project(tmp_path)
    files = {split: tmp_path / f"corpora/film/{split}.parquet" for split in ("train", "dev")}
    numbers = {"batch_size": 6, "max_steps": 25, "eval_every": 10}
    one_prompt.main(
        task="film", **files, input="{text}", model=str(tmp_path / "model"), bank=tmp_path / "bank", length=5, lr=0.1,
        eval_rows=40, seed=3, token_budget=256, **numbers,
    )  # fmt: skip

    hosted = load_backbone(str(tmp_path / "model"))
    rows = {split: pq.read_table(path).to_pylist() for split, path in files.items()}
    splits = {split: [(row["text"], row["label"]) for row in own] for split, own in rows.items()}
    corpus = task_corpus(tmp_path / "shards", hosted.tokenizer, "decoder-only", "film", splits)
    settings = TaskSettings.model_validate(
        {
            **{split: str(path) for split, path in files.items()}, "input": "{text}", "metric": "accuracy",
            "prompt": {"length": 5}, "optimizer": {"lr": 0.1, "schedule": "linear"}, "eval_rows": 40, **numbers,
        }
    )  # fmt: skip
    trial = make_trial("film", settings, 3, corpus.digest, hosted.identity.fingerprint)
    run = TuningRun([trial], {"film": corpus}, tmp_path / "run", 1, checkpoint_every=100, token_budget=256)
    job = Settings.model_validate(project)
    files_of_model = find_model(job.model.path)
    model_folder = tmp_path / "run/model"
    save_config_and_tokenizer(read_config(files_of_model), hosted.tokenizer, model_folder)
    backbone = host_on_rank(job, model_folder, torch.device("cpu"), RunLog(tmp_path / "run", silent=True))
    (state,) = tune(run, backbone, hosted.tokenizer)

    bank = PromptBank.open(tmp_path / "bank")
    published = bank.load("film", backbone=hosted.identity)
    np.testing.assert_array_equal(published.array, state.best.numpy())
    best, metrics = state.history[state.best_at], published.record.metrics
    assert state.best_at > 0, "it has learned, or the comparison says little"
    assert (metrics.dev_before, metrics.dev_after) == (state.history[0].value, best.value)
    assert (metrics.dev_loss_after, published.record.steps) == (best.loss, best.step)
    (scores,) = PromptedModel(hosted, bank).classify([{"text": "good film"}], ["film"])
    assert set(scores) == {"negative", "positive"}
