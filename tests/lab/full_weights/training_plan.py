"""A short training of all weights of a tiny model, in this process or on a rank."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.lab.full_weights.checkpoint import TrainingProgress
from pipeline.lab.full_weights.loading import load_trained
from pipeline.lab.full_weights.model_folder import save_model_folder
from pipeline.lab.full_weights.step import Examples
from pipeline.lab.full_weights.training import TrainingPlan, train
from pipeline.lab.full_weights.training_log import TrainingLog
from pipeline.settings import OptimizerSettings
from pipeline.tuning.ranks import rank
from tests.tiny import VOCAB

CPU = torch.device("cpu")
STEPS = 12
ADAFACTOR = OptimizerSettings(lr=0.05, weight_decay=1e-3)
ADAMW = OptimizerSettings(name="adamw", lr=1e-3, clip_norm=0.5, schedule="linear", warmup_steps=2)


def examples(step: int) -> Examples:
    """Five rows: three tokens of the target follow from the input's first."""
    rng = np.random.default_rng(step)
    inputs = [rng.integers(3, VOCAB, rng.integers(2, 9)) for _ in range(5)]
    return Examples(inputs, [np.array([3 + (x[0] - 3 + k) % 30 for k in range(2)] + [1]) for x in inputs])


def make_plan(folder: Path, optimizer: OptimizerSettings = ADAFACTOR, **changes) -> TrainingPlan:
    usual = TrainingPlan(
        "digest", folder / "checkpoints", examples, STEPS, optimizer, checkpoint_every=4, token_budget=24
    )
    return replace(usual, **changes)


def trained(model_folder: Path, what: TrainingPlan, pause=lambda progress: True, dtype=torch.float32, save=None):
    """Train to the end; every weight by name, the losses that were written down, and how far it came."""
    files = find_model(str(model_folder))
    model = load_trained(files, read_config(files), what.optimizer, dtype=dtype, device=CPU)
    run = what.checkpoints.parent
    progress = train(model, what, TrainingLog(run, "course", silent=rank() != 0), pause)
    if save is not None:
        save_model_folder(model, read_tokenizer(files), save)
    weights = {name: weight.float().numpy().copy() for name, weight in model.weights()}
    return weights, losses(run), progress or TrainingProgress()


def losses(run: Path) -> list[float]:
    import json

    lines = (run / "metrics/course.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]
