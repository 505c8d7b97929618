"""One optimizer a prompt: the reference implementations, each with its own schedule and clipping."""

import math

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from pipeline.settings import OptimizerSettings


def make_optimizer(prompt: Parameter, settings: OptimizerSettings) -> Optimizer:
    """Adafactor as in Lester et al. (2021): constant rate, no parameter scaling, decay 0.8; or AdamW."""
    if settings.name == "adamw":
        return AdamW([prompt], lr=settings.lr, weight_decay=settings.weight_decay)
    # Only where prompts are tuned: it imports transformers' Trainer and PEFT, which takes seconds.
    from transformers.optimization import Adafactor

    return Adafactor(
        [prompt],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        decay_rate=-0.8,
        scale_parameter=False,
        relative_step=False,
        warmup_init=False,
    )


def update(optimizer: Optimizer, settings: OptimizerSettings, step: int, max_steps: int) -> None:
    """One update of a prompt from its `.grad` at its own step (from 0)."""
    (group,) = optimizer.param_groups
    group["lr"] = settings.lr * schedule_factor(settings, step, max_steps)
    if settings.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(group["params"], settings.clip_norm)
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
