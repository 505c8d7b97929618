"""Measure whether a fast step makes prompts worse: dev metrics over several tasks and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from pipeline.backbone.files import find_model, read_tokenizer
from pipeline.backbone.host import Backbone
from pipeline.lab.benchmark.bench import Bench, OurOptions, host_for
from pipeline.lab.benchmark.ours import tune_together
from pipeline.lab.benchmark.peft_trainer import PeerOptions
from pipeline.lab.benchmark.ranks import run_ranks
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.tuning.evaluate import EvalRequest, evaluate
from pipeline.tuning.machine import device_name

_Scores = dict[str, list[float]]
"""By task, over its seeds."""


@dataclass(frozen=True)
class Quality:
    """Dev figures of every task, over its seeds."""

    before: dict[str, list[float]] = field(default_factory=dict)
    """Accuracies."""
    after: dict[str, list[float]] = field(default_factory=dict)
    losses: dict[str, list[float]] = field(default_factory=dict)
    """After tuning, in nats a target token."""
    seconds: float = 0.0
    """Time of tuning alone."""

    @property
    def mean(self) -> float:
        return float(np.mean([value for values in self.after.values() for value in values]))

    @property
    def mean_loss(self) -> float:
        return float(np.mean([value for values in self.losses.values() for value in values]))


def compare_quality(bench: Bench, with_peer: bool, out: Path) -> dict[str, Quality]:
    """Tune the same trials in each way, from the same prompts, on the same rows; results go to `out` as JSON."""
    ways = {
        "int8 products": OurOptions(products="int8"),
        "exact products": OurOptions(products="exact"),
        "int8 products, exact gradients": OurOptions(products="int8_forward"),
        "float32 weights": OurOptions(int8=False),
    }
    sides: dict[str, Quality] = {}
    for side, options in ways.items():
        sides[side] = tune_and_score(bench, options)
        _save(out, bench.steps, sides)  # each way takes minutes, so results are written as they come
    if with_peer:
        peer = bench.peer(PeerOptions())()
        after, losses = score_prompts(bench, peer.prompts, OurOptions(int8=False))
        sides["PEFT + Trainer"] = Quality(sides["float32 weights"].before, after, losses, sum(peer.seconds))
        _save(out, bench.steps, sides)
    return sides


def _save(out: Path, steps: int, sides: Mapping[str, Quality]) -> None:
    plain = {
        side: {**asdict(quality), "mean": quality.mean, "mean_loss": quality.mean_loss}
        for side, quality in sides.items()
    }
    write_figures(out, {"device": device_name(), "steps": steps, "sides": plain})


def tune_and_score(bench: Bench, options: OurOptions) -> Quality:
    """Tune every trial, and measure the prompts before and after on the backbone that they were tuned on."""
    return run_ranks(bench.ranks, _on_rank, bench, options)[0]


def score_prompts(bench: Bench, prompts: Sequence[np.ndarray], options: OurOptions) -> tuple[_Scores, _Scores]:
    """Dev accuracies and losses of prompts that were tuned elsewhere."""
    return run_ranks(bench.ranks, _score_on_rank, bench, prompts, options)[0]


def _on_rank(bench: Bench, options: OurOptions) -> Quality:
    backbone = host_for(bench, options)
    side = tune_together(backbone, bench.tasks, bench.prompts, bench.steps, options.token_budget, options.nll)
    before, _ = _scores(bench, backbone, bench.prompts, options)
    return Quality(before, *_scores(bench, backbone, side.prompts, options), sum(side.seconds))


def _score_on_rank(bench: Bench, prompts: Sequence[np.ndarray], options: OurOptions) -> tuple[_Scores, _Scores]:
    return _scores(bench, host_for(bench, options), prompts, options)


def _scores(
    bench: Bench, backbone: Backbone, prompts: Sequence[np.ndarray], options: OurOptions
) -> tuple[_Scores, _Scores]:
    requests = []
    for task, prompt in zip(bench.tasks, prompts, strict=True):
        assert task.dev is not None
        tensor = torch.from_numpy(np.ascontiguousarray(prompt)).to(backbone.device)
        requests.append(EvalRequest(tensor, task.dev, "accuracy", task.labels, task.label_ids, 8))
    tokenizer = read_tokenizer(find_model(bench.model))
    accuracies: _Scores = {}
    losses: _Scores = {}
    for task, result in zip(bench.tasks, evaluate(backbone, tokenizer, requests, options.token_budget), strict=True):
        accuracies.setdefault(task.trial.name, []).append(result.value)
        losses.setdefault(task.trial.name, []).append(result.loss)
    return accuracies, losses
