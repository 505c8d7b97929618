"""Each prompt's optimizer against the reference implementations, beside other prompts."""

import pytest
import torch
from torch.nn import Parameter
from transformers import get_scheduler
from transformers.optimization import Adafactor

from pipeline.settings import OptimizerSettings
from pipeline.tuning.optimise import make_optimizer, update

STEPS = 12


def gradients(prompt: Parameter, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(prompt.shape, generator=generator) * (1 + step) + prompt.detach()


def reference(settings: OptimizerSettings, start: torch.Tensor) -> torch.Tensor:
    """The reference optimizer, driven by transformers' scheduler and torch's clipping."""
    prompt = Parameter(start.clone())
    if settings.name == "adamw":
        optimizer = torch.optim.AdamW([prompt], lr=settings.lr, weight_decay=settings.weight_decay)
    else:
        optimizer = Adafactor(
            [prompt], lr=settings.lr, scale_parameter=False, relative_step=False, weight_decay=settings.weight_decay
        )
    name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    schedule = get_scheduler(name, optimizer, settings.warmup_steps, STEPS)
    for step in range(STEPS):
        prompt.grad = gradients(prompt, step)
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_([prompt], settings.clip_norm)
        optimizer.step()
        schedule.step()
    return prompt.detach()


@pytest.mark.parametrize("name", ["adafactor", "adamw"])
@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_prompts_stepped_side_by_side_end_where_the_reference_ends_alone(name, schedule, clip_norm):
    rates = [0.3, 0.01, 1.0]
    all_settings = [
        OptimizerSettings(name=name, lr=lr, schedule=schedule, clip_norm=clip_norm, weight_decay=0.01) for lr in rates
    ]
    starts = [torch.randn(p, 8, generator=torch.Generator().manual_seed(p)) for p in (1, 5, 20)]
    prompts = [Parameter(start.clone()) for start in starts]
    optimizers = [make_optimizer(p, s) for p, s in zip(prompts, all_settings, strict=True)]
    for step in range(STEPS):
        for prompt, optimizer, settings in zip(prompts, optimizers, all_settings, strict=True):
            prompt.grad = gradients(prompt, step)
            update(optimizer, settings, step, STEPS)
    for prompt, start, settings in zip(prompts, starts, all_settings, strict=True):
        torch.testing.assert_close(prompt.detach(), reference(settings, start), rtol=1e-6, atol=1e-6)


def test_warm_up_rises_to_the_full_rate():
    settings = OptimizerSettings(lr=1.0, warmup_steps=4)
    prompt = Parameter(torch.zeros(2, 8))
    optimizer = make_optimizer(prompt, settings)
    rates = []
    for step in range(6):
        prompt.grad = torch.ones(2, 8)
        update(optimizer, settings, step, 6)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
