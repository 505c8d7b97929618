"""Our side of a benchmark: all tasks are tuned in the same steps."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from pipeline.backbone import prompted
from pipeline.backbone.host import Backbone
from pipeline.lab.benchmark.side_by_side import Side
from pipeline.lab.benchmark.work import TaskWork
from pipeline.tuning.machine import peak_bytes
from pipeline.tuning.optimise import make_optimizer, update
from pipeline.tuning.step import TrialStep, losses_and_gradients


def tune_together(
    backbone: Backbone,
    tasks: Sequence[TaskWork],
    prompts: Sequence[np.ndarray],
    steps: int,
    token_budget: int,
    nll: Callable[..., Tensor] = prompted.target_nll,
) -> Side:
    """Tune all prompts `[P, H]` together for `steps` steps; `nll` computes the rows' losses."""
    tuned = [Parameter(torch.from_numpy(prompt.copy()).to(backbone.device)) for prompt in prompts]
    optimizers = [make_optimizer(p, t.trial.settings.optimizer) for p, t in zip(tuned, tasks, strict=True)]
    seconds, losses = [], []
    for step in range(steps):
        start = time.perf_counter()
        work = [TrialStep(task.trial, prompt, step, task.train) for task, prompt in zip(tasks, tuned, strict=True)]
        loss, _ = losses_and_gradients(backbone, work, token_budget, nll)
        for optimizer, task in zip(optimizers, tasks, strict=True):
            update(optimizer, task.trial.settings.optimizer, step, steps)
        if backbone.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.tolist())
    tokens = [sum(task.text_tokens(step) for task in tasks) for step in range(steps)]
    return Side(tokens, seconds, losses, [prompt.detach().cpu().numpy() for prompt in tuned], peak_bytes())
