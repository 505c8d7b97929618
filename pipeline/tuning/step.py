"""One step of many trials: a batch of each trial's rows, one gradient a prompt, one all-reduce."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone import prompted
from pipeline.backbone.host import Backbone
from pipeline.corpus.reader import TokenSet
from pipeline.tuning.batches import RowCost, plan_rows, rows_of_step
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size
from pipeline.tuning.trials import Trial


@dataclass(frozen=True)
class TrialStep:
    """A trial's part of a step."""

    trial: Trial
    prompt: Tensor
    step: int
    train: TokenSet


@dataclass(frozen=True)
class BatchRow:
    """One row of a batch, and the share of its trial's loss that each of its target tokens has."""

    slot: int
    split: TokenSet
    number: int
    length: int
    """Input and target tokens."""
    weight: float


@dataclass(frozen=True)
class TokenCounts:
    """What one step ran, over all ranks and micro-batches."""

    text: int = 0
    """Of inputs and targets, each once."""
    computed: int = 0
    """That passed through the model: text, each prompt as often as it ran, padding."""
    padding: int = 0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(self.text + other.text, self.computed + other.computed, self.padding + other.padding)


def batch_of_step(work: Sequence[TrialStep]) -> list[BatchRow]:
    """Every trial's rows at its own step; `slot` is the trial's place in `work`."""
    rows = []
    for slot, part in enumerate(work):
        numbers = rows_of_step(part.trial, len(part.train), part.step)
        # Mean over the target tokens of this trial's rows on all ranks, as the trial alone would have.
        weight = 1.0 / sum(len(part.train.target_ids(number)) for number in numbers)
        for number in numbers:
            length = len(part.train.input_ids(number)) + len(part.train.target_ids(number))
            rows.append(BatchRow(slot, part.train, int(number), length, weight))
    return rows


def losses_and_gradients(
    backbone: Backbone, work: Sequence[TrialStep], token_budget: int, nll: Callable[..., Tensor] = prompted.target_nll
) -> tuple[np.ndarray, TokenCounts]:
    """Each trial's loss `[S]` (nats a target token), its gradient left in its prompt's `.grad`; what was run.

    Every rank must call this with the same work; all ranks end with the same numbers. `nll` computes the rows' losses.
    """
    rows = batch_of_step(work)
    prompts = [part.prompt for part in work]
    losses = torch.zeros(len(work), device=backbone.device)
    for prompt in prompts:
        prompt.grad = None
    loads = [RowCost(row.slot, len(prompts[row.slot]), row.length) for row in rows]
    tokens = TokenCounts()
    for shares in plan_rows(loads, world_size(), token_budget, backbone.pads_rows):
        tokens = sum((_tokens_of([loads[i] for i in share], backbone.pads_rows) for share in shares), tokens)
        # A rank without a share runs another's first row at weight zero: all gather weights together.
        mine = [rows[i] for i in shares[rank()]]
        _accumulate(backbone, prompts, mine or [rows[shares[0][0]]], 1.0 if mine else 0.0, losses, nll)
    flat = torch.cat([losses, *(_gradient(prompt).flatten() for prompt in prompts)])
    sum_over_ranks(flat)
    sizes = [len(work), *(prompt.numel() for prompt in prompts)]
    summed, *gradients = flat.split(sizes)
    for prompt, gradient in zip(prompts, gradients, strict=True):
        prompt.grad = gradient.view_as(prompt).clone()
    return summed.cpu().numpy(), tokens


def _tokens_of(share: Sequence[RowCost], padded: bool) -> TokenCounts:
    """Of one rank's rows in one micro-batch (see `plan_rows`)."""
    text = sum(load.own for load in share)
    if not padded:
        return TokenCounts(text, text + sum({load.slot: load.prompt for load in share}.values()))
    lengths = [load.prompt + load.own for load in share]
    computed = len(share) * max(lengths, default=0)
    return TokenCounts(text, computed, computed - sum(lengths))


def _accumulate(
    backbone: Backbone,
    prompts: Sequence[Tensor],
    rows: Sequence[BatchRow],
    factor: float,
    losses: Tensor,
    row_nll: Callable[..., Tensor],
) -> None:
    slots = [row.slot for row in rows]
    run = prompted.Rows(prompts, slots, [row.split.input_ids(row.number) for row in rows])
    nll = backbone.run(row_nll, run, [row.split.target_ids(row.number) for row in rows])  # [B]
    weighted = nll * torch.tensor([row.weight * factor for row in rows], device=nll.device)
    losses.index_add_(0, torch.tensor(slots, device=nll.device), weighted.detach())
    weighted.sum().backward()


def _gradient(prompt: Tensor) -> Tensor:
    return torch.zeros_like(prompt) if prompt.grad is None else prompt.grad
