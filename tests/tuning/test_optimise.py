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
    # transformers' Adafactor factors what has two dimensions, so that it keeps all of a matrix that is laid out flat.
    flat = settings.name == "adafactor" and min(start.shape) < 128
    trained = Parameter(prompt.data.view(-1)) if flat else prompt
    if settings.name == "adamw":
        optimizer = torch.optim.AdamW([trained], lr=settings.lr, weight_decay=settings.weight_decay)
    else:
        optimizer = Adafactor(
            [trained], lr=settings.lr, scale_parameter=False, relative_step=False, weight_decay=settings.weight_decay
        )
    name = {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule)
    schedule = get_scheduler(name, optimizer, settings.warmup_steps, STEPS)
    for step in range(STEPS):
        prompt.grad = gradients(prompt, step)
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_([prompt], settings.clip_norm)
        trained.grad = prompt.grad.view(trained.shape)
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
    shapes = ((1, 8), (20, 8), (128, 129))
    starts = [torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) for shape in shapes]
    prompts = [Parameter(start.clone()) for start in starts]
    optimizers = [make_optimizer(p, s) for p, s in zip(prompts, all_settings, strict=True)]
    for step in range(STEPS):
        for prompt, optimizer, settings in zip(prompts, optimizers, all_settings, strict=True):
            prompt.grad = gradients(prompt, step)
            update(optimizer, settings, step, STEPS)
    for prompt, start, settings in zip(prompts, starts, all_settings, strict=True):
        torch.testing.assert_close(prompt.detach(), reference(settings, start), rtol=1e-6, atol=1e-6)


# optax 0.2.8: optax.adafactor(0.3, min_dim_size_to_factor=128, decay_rate=0.8, multiply_by_parameter_scale=False,
# clipping_threshold=1.0, momentum=None), from START after each of GRADIENTS.
START = [[0.5, -0.25, 0.0], [1.0, 2.0, -1.5]]
GRADIENTS = [
    [[0.1, -2.0, 0.003], [4.0, 0.5, -0.25]],
    [[-0.3, 1.0, 0.2], [0.01, -6.0, 0.25]],
    [[0.7, 0.1, -0.05], [-1.0, 0.2, 3.0]],
]
OF_OPTAX = [
    [[0.19999999, 0.050000012, -0.29999998], [0.7, 1.7, -1.2]],
    [[0.5649846, -0.14070776, -0.67968297], [0.6988973, 2.0787413, -1.48777]],
    [[0.13287604, -0.16666633, -0.5550052], [0.84195393, 2.061542, -1.9510638]],
]


def test_adafactor_steps_a_prompt_as_the_papers_framework_does_and_not_factored():
    settings = OptimizerSettings(name="adafactor", lr=0.3, weight_decay=0, schedule="constant")
    prompt = Parameter(torch.tensor(START))
    optimizer = make_optimizer(prompt, settings)
    for step, (gradient, wanted) in enumerate(zip(GRADIENTS, OF_OPTAX, strict=True)):
        prompt.grad = torch.tensor(gradient)
        update(optimizer, settings, step, 3)
        torch.testing.assert_close(prompt.detach(), torch.tensor(wanted), rtol=1e-6, atol=1e-6)


def test_warm_up_rises_to_the_full_rate():
    settings = OptimizerSettings(lr=1.0, schedule="constant", warmup_steps=4)
    prompt = Parameter(torch.zeros(2, 8))
    optimizer = make_optimizer(prompt, settings)
    rates = []
    for step in range(6):
        prompt.grad = torch.ones(2, 8)
        update(optimizer, settings, step, 6)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
