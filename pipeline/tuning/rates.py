"""The learning rate of a trial whose `optimizer.lr` is `auto`, found from its own loss before its first step.

How far a step may go depends on the model, the task and the start. It does not follow from the size of the embeddings:
a third of it is right for one model, and ten times too much for another. What can be measured is how the loss changes
along the first step's own direction. Both optimizers begin with the sign of the gradient, whatever its size, so the
distance at which the loss is lowest is a rate; a line search (Nocedal & Wright 2006, chapter 3) over a few distances
finds it. It costs as much as a few steps.

Shapes: S trials, P prompt tokens, H hidden.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor
from torch.nn import Parameter

from pipeline.corpus.reader import TokenSet
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.evaluate import EvalRequest, evaluate
from pipeline.tuning.progress import Progress
from pipeline.tuning.step import TrialStep, losses_and_gradients
from pipeline.tuning.trials import Trial

DISTANCES = tuple(0.003 * 10 ** (power / 3) for power in range(9))
"""The rates that are tried: 0.003 to 1.4."""
LOOKED_AT = 32
"""Train rows whose loss is looked at."""
SHARE = 1.0
"""The rate as a share of the best distance."""


def found_rates(progress: Progress, starts: Sequence[tuple[Trial, Tensor]]) -> list[float]:
    """A rate for each trial at its first prompt `[P, H]`: `[S]`. All ranks call this alike and get the same ones."""
    backbone, run = progress.backbone, progress.run
    work = [TrialStep(trial, Parameter(prompt.clone()), 0, progress.split(trial, "train")) for trial, prompt in starts]
    losses_and_gradients(backbone, work, run.token_budget)
    requests = []
    for step in work:
        gradient, few = step.prompt.grad, _few_rows(step)
        assert gradient is not None
        moved = [step.prompt.detach() - distance * gradient.sign() for distance in DISTANCES]
        requests += [EvalRequest(prompt, few, "loss", None, None, 1) for prompt in moved]
    scores = evaluate(backbone, progress.tokenizer, requests, run.token_budget)
    losses = np.nan_to_num([score.loss for score in scores], nan=np.inf).reshape(len(starts), len(DISTANCES))
    return [SHARE * DISTANCES[int(of_trial.argmin())] for of_trial in losses]


def _few_rows(work: TrialStep) -> TokenSet:
    """Train rows that the trial's first steps after this one would take."""
    size = work.trial.settings.batch_size
    steps = range(1, 1 + -(-LOOKED_AT // size))
    rows = np.concatenate([rows_of_step(work.trial, work.train, step) for step in steps])
    return work.train.take(rows[:LOOKED_AT])
