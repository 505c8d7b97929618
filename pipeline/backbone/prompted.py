"""Run the frozen model behind soft prompts, `[P; X]`, with rows of many prompts in one batch.

Every function takes the model first, since it is called through `Backbone.run`. A row's result does not
depend on the rows beside it.

Shapes: B rows, T tokens, L labels.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone import decoder_only, encoder_decoder, growing, padded
from pipeline.backbone.output import summed, target_of_token, token_distillation
from pipeline.backbone.rows import NO_TOKENS, PromptState, Rows, TokenRows, as_indices
from pipeline.backbone.transfer import to_device

__all__ = [
    "PromptState",
    "Rows",
    "greedy_decode",
    "label_log_likelihoods",
    "prompt_state",
    "target_distillation",
    "target_nll",
]


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """Negative log-likelihood of each row's target, summed over its tokens: `[B]` float32, in nats.

    Differentiable in the prompts. Logits are computed at target positions only.
    """
    nll: Tensor = _family(model).target_nll(model, rows, targets)
    return nll


def target_distillation(model: Any, rows: Rows, targets: TokenRows, teacher: Rows, shares: Sequence[float]) -> Tensor:
    """Each row's loss where the same model behind other words teaches it: `[B]` float32, in nats.

    A target's tokens count `(1 - share)` of their negative log-likelihood, and `share` of KL(teacher || student): the
    divergence of the distributions over the vocabulary that stand at that token, behind the target's own tokens before
    it (Snell et al. 2022, "Learning by Distilling Context"; Askell et al. 2021, appendix A, for the document that
    became a prompt). Both are summed over a target's tokens.

    teacher: the same B rows behind the teacher's prompts. They run first, and without gradients; the loss is
    differentiable in the prompts of `rows`. shares: `[B]`, from 0 to 1.
    Logits of student and teacher are there for a bounded number of places at a time.
    """
    family = _family(model)
    with torch.no_grad():
        taught = family.target_states(model, teacher, targets)  # [N, H]
    states = family.target_states(model, rows, targets)
    of_target = target_of_token(targets)
    tokens = as_indices(np.concatenate(targets), states)
    of_token = to_device(np.array(shares)[of_target], states.device, torch.float32)
    return summed(token_distillation(model, states, tokens, taught, of_token), of_target, len(targets))


@torch.no_grad()
def prompt_state(model: Any, prompt: Tensor, beginning: np.ndarray = NO_TOKENS) -> PromptState:
    """Run a soft prompt `[P, H]` of a packed model once, and behind it the tokens `[T]` that its rows begin with.

    `Rows` take the returned state in the prompt's place, and the inputs without these tokens.
    """
    return decoder_only.prompt_state(model, prompt, beginning)


@torch.no_grad()
def label_log_likelihoods(model: Any, rows: Rows, labels: Sequence[TokenRows]) -> list[np.ndarray]:
    """log P(label | prompt, input) for each row's own label set: B arrays `[L_b]` float32, in nats.

    The prompt and input run once a row; only the labels' tokens run once a label.
    """
    pairs = np.concatenate([np.full(len(of_row), b) for b, of_row in enumerate(labels)])
    candidates = [label for of_row in labels for label in of_row]
    scores = -_family(model).label_nll(model, rows, pairs, candidates).float().cpu().numpy()
    return np.split(scores, np.cumsum([len(of_row) for of_row in labels])[:-1])


@torch.no_grad()
def greedy_decode(
    model: Any, rows: Rows, max_new_tokens: int | Sequence[int], eos: int, all_done: Callable[[bool], bool] = bool
) -> list[np.ndarray]:
    """The most likely continuation, token by token, up to and without `eos`: B arrays of token ids.

    `max_new_tokens` holds for all rows, or is given for each.
    `all_done` turns "this rank is done" into "every rank is done": under ZeRO-3 all stop together.
    """
    family = _family(model)
    start, step = (growing if family is decoder_only else family).decoding_steps(model, rows)
    tokens = start()
    limits = np.broadcast_to(max_new_tokens, len(tokens))
    limit = torch.as_tensor(limits.copy(), device=tokens.device)
    out = [tokens]
    done = tokens == eos
    while len(out) < limits.max() and not all_done(bool((done | (limit <= len(out))).all())):
        tokens = step(tokens)
        out.append(tokens)
        done |= tokens == eos
    ids = torch.stack(out, dim=1).cpu().numpy()  # [B, T]
    ended = [row[:most] for row, most in zip(ids, limits, strict=True)]
    return [row[: np.argmax(row == eos)] if (row == eos).any() else row for row in ended]


def _family(model: Any) -> ModuleType:
    if model.config.is_encoder_decoder:
        return encoder_decoder
    return decoder_only if model.way == "packed" else padded
