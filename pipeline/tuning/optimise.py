"""One optimizer a prompt: the reference implementations, each with its own schedule and clipping."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from pipeline.settings import OptimizerSettings


class Group(TypedDict):
    """What an optimizer trains at one rate."""

    params: list[Tensor]
    relative_rate: float
    """Their rate as a share of the optimizer's own."""


AUTO_RATE = 0.3
"""`lr: auto`, as a share of the RMS of the model's embeddings.

Both optimizers' steps are in the prompt's own units, whatever the gradient's size, and a prompt stands beside
embeddings. Measured (docs/quality.md): at this share of their RMS the rate is near its best on models whose embeddings
have an RMS of 0.12 and of 1.03; at 0.5 some short tasks learn less, at 1 many."""


def make_optimizer(
    trained: Parameter | Sequence[Group], settings: OptimizerSettings, rate: float | None = None
) -> Optimizer:
    """Adafactor as in Lester et al. (2021): constant rate, no parameter scaling, decay 0.8; or AdamW.

    `trained` is a prompt, or what folds into one. `rate` stands in for the settings' `lr`.
    """
    if isinstance(trained, Tensor):
        trained = [Group(params=[trained], relative_rate=1.0)]
    groups: list[dict[str, Any]] = [{**group} for group in trained]
    if settings.name == "adamw":
        return AdamW(groups, lr=settings.rate if rate is None else rate, weight_decay=settings.weight_decay)
    # Only where prompts are tuned: its import takes seconds.
    from pipeline.tuning.adafactor import T5XAdafactor

    return T5XAdafactor(
        groups,
        lr=settings.rate if rate is None else rate,
        weight_decay=settings.weight_decay,
        decay_rate=-0.8,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def resume_optimizer(optimizer: Optimizer, states: Sequence[dict[str, Any]]) -> None:
    """Give an optimizer just made the recorded states of its parameters, in their order."""
    for group, state in zip(optimizer.param_groups, states, strict=True):
        if "exp_avg_sq_row" in state:  # begun factored, as every matrix was before T5X's rule was kept: it stays so
            group["factored_from"] = 1
    whole = optimizer.state_dict()
    whole["state"] = {place: state for place, state in enumerate(states) if state}
    optimizer.load_state_dict(whole)


def update(optimizer: Optimizer, settings: OptimizerSettings, step: int, max_steps: int) -> None:
    """One update of a prompt from its `.grad` at its own step (from 0)."""
    clip_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]], settings)
    take_step(optimizer, settings, settings.rate, step, max_steps)


def clip_gradients(parameters: Iterable[Tensor], settings: OptimizerSettings) -> None:
    """Shorten the gradients to the largest norm that they may have together, if one is set."""
    if settings.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)


def take_step(optimizer: Optimizer, settings: OptimizerSettings, rate: float, step: int, max_steps: int) -> None:
    """One update from the gradients as they are, at this step's share of the rate."""
    share = schedule_factor(settings, step, max_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * share * group.get("relative_rate", 1.0)
    optimizer.step()


def schedule_factor(settings: OptimizerSettings, step: int, max_steps: int) -> float:
    """Share of the learning rate at a step: linear warm-up, then constant, linear or cosine decay to 0."""
    if step < settings.warmup_steps:
        return (step + 1) / settings.warmup_steps
    done = (step - settings.warmup_steps) / max(1, max_steps - settings.warmup_steps)
    match settings.schedule:
        case "constant":
            return 1.0
        case "linear":
            return 1.0 - done
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * done))
