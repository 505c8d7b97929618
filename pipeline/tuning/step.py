"""One step of many trials: a batch of each trial's rows, one gradient a prompt, one all-reduce.

Shapes: S trials, B rows of a micro-batch, P prompt tokens, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone import prompted
from pipeline.backbone.host import Backbone
from pipeline.backbone.output import most_places
from pipeline.backbone.rows import common_beginnings
from pipeline.backbone.transfer import to_device
from pipeline.corpus.token_set import TokenSet
from pipeline.tuning.batches import (
    Plan,
    RowCost,
    one_prompt_each,
    pass_budget,
    plan_rows,
    rows_of_step,
    unlabelled_rows_of_step,
)
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size
from pipeline.tuning.teaching import Teacher
from pipeline.tuning.trials import Trial


@dataclass(frozen=True)
class TrialStep:
    """A trial's part of a step."""

    trial: Trial
    prompt: Tensor
    """`[P, H]`, a leaf of autograd."""
    step: int
    """Steps that this trial has taken."""
    train: TokenSet
    teacher: Teacher | None = None
    unlabelled: TokenSet | None = None
    """More rows that the teacher teaches by (see `asked_at_labels`)."""


@dataclass(frozen=True)
class BatchRow:
    """One row of a batch, and what each of its target tokens weighs in its trial's loss."""

    slot: int
    split: TokenSet
    number: int
    length: int
    """Input and target tokens."""
    weight: float
    teacher: Teacher | None
    """Of the trial, where it teaches by this row."""
    share: float
    """The teacher's share of this row's loss."""

    def cost(self, prompt: int, shared: int) -> RowCost:
        """Behind a prompt of so many tokens, where the slot's rows begin with so many alike."""
        return RowCost(self.slot, prompt, self.length, len(self.teacher.words) if self.teacher else None, shared)


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

    @classmethod
    def of(cls, share: Sequence[RowCost], padded: bool) -> "TokenCounts":
        """Of one rank's rows in one micro-batch (see `plan_rows`)."""
        text = sum(cost.own for cost in share)
        if not padded:
            prompts = {cost.slot: cost.prompts for cost in share}
            return cls(text, sum(cost.run for cost in share) + sum(prompts.values()))
        passes = [
            [cost.prompt + cost.own for cost in share],
            [cost.words + cost.own for cost in share if cost.words is not None],
        ]
        computed = sum(len(lengths) * max(lengths, default=0) for lengths in passes)
        return cls(text, computed, computed - sum(map(sum, passes)))


def batch_of_step(work: Sequence[TrialStep]) -> list[BatchRow]:
    """Every trial's rows at its own step; `slot` is the trial's place in `work`."""
    return [row for slot, part in enumerate(work) for row in _rows_of_trial(slot, part)]


def _rows_of_trial(slot: int, part: TrialStep) -> list[BatchRow]:
    """A trial's rows at its own step, those of train before the unlabelled ones."""
    settings, train, more = part.trial.settings, part.train, part.unlabelled
    asked = [] if more is None else unlabelled_rows_of_step(part.trial, more, part.step).tolist()
    numbers = rows_of_step(part.trial, train, part.step, settings.batch_size - len(asked)).tolist()
    # A trial's loss is the mean over the target tokens of its own rows, whichever ranks run them. Were it the mean
    # over a rank's or a micro-batch's rows, it would depend on how many ranks there are and who runs beside it.
    labelled = sum(len(train.target_ids(number)) for number in numbers)
    tokens = labelled + (0 if more is None else sum(len(more.target_ids(number)) for number in asked))
    # What the labels say is a mean over tokens that have one, and what the teacher says a mean over all. So both keep
    # the shares that the settings give them: with one mean for both, unlabelled rows would halve that of the labels.
    weight = 0.0 if part.teacher is None or settings.teacher is None else settings.teacher.weight
    taught = weight * (labelled / tokens)  # exactly the weight where no row is unlabelled
    whole = 1.0 - weight + taught
    rows = []
    for number in numbers:
        teacher = part.teacher if part.teacher is not None and part.teacher.teaches(train, number) else None
        share = 0.0 if teacher is None else taught / whole
        rows.append(BatchRow(slot, train, number, _length(train, number), whole / labelled, teacher, share))
    if more is not None:
        rows += [BatchRow(slot, more, n, _length(more, n), weight / tokens, part.teacher, 1.0) for n in asked]
    return rows


def _length(split: TokenSet, number: int) -> int:
    return len(split.input_ids(number)) + len(split.target_ids(number))


def plan_of_step(rows: Sequence[BatchRow], costs: Sequence[RowCost], token_budget: int, padded: bool) -> Plan:
    """The rows' plan (see `plan_rows`), where a micro-batch has rows with teachers, or rows without.

    So all ranks run the teachers' pass in the same micro-batches, and who has no teacher runs as if there were none.
    """
    plan: Plan = []
    for taught in (False, True):
        chosen = [i for i, row in enumerate(rows) if (row.teacher is not None) == taught]
        for shares in plan_rows([costs[i] for i in chosen], world_size(), token_budget, padded):
            plan.append([[chosen[i] for i in share] for share in shares])
    return plan


def behind_teachers(batch: Sequence[BatchRow], packed: bool) -> tuple[prompted.Rows, list[float]]:
    """Rows with teachers as these read them, and the share `[B]` of each row's loss that is its teacher's."""
    of_row = [row.teacher for row in batch if row.teacher is not None]
    places = {teacher: place for place, teacher in enumerate(dict.fromkeys(of_row))}  # each one's words run once
    inputs = [teacher.input_ids(row.split, row.number) for teacher, row in zip(of_row, batch, strict=True)]
    groups = [places[teacher] for teacher in of_row]
    shared = common_beginnings(inputs, groups, len(places)) if packed else []
    return prompted.Rows([teacher.words for teacher in places], groups, inputs, shared), [row.share for row in batch]


def losses_and_gradients(
    backbone: Backbone, work: Sequence[TrialStep], token_budget: int, nll: Callable[..., Tensor] = prompted.target_nll
) -> tuple[np.ndarray, TokenCounts]:
    """Each trial's loss `[S]` (nats a target token) and what was run; gradients `[P, H]` are left in the prompts.

    A trial whose gradient is not finite has a loss of NaN: so a GPU is waited for once a step, when losses are read.
    Every rank must call this with the same work; all ranks end with the same numbers. `nll` computes the losses of rows
    that have no teacher.
    """
    rows, prompts = batch_of_step(work), [part.prompt for part in work]
    packed = backbone.shares_prompts
    # Of all rows of a step, not of a micro-batch's: so a row's numbers do not depend on which rows are dealt with it.
    shared = [0] * len(work)
    if packed:
        shared = common_beginnings(
            [row.split.input_ids(row.number) for row in rows], [row.slot for row in rows], len(work)
        )
    costs = [row.cost(len(prompts[row.slot]), shared[row.slot]) for row in rows]
    costs = costs if packed else one_prompt_each(costs)
    if backbone.device.type == "cpu" and not backbone.partitioned:
        token_budget = pass_budget(costs, token_budget)
    losses, tokens = torch.zeros(len(work), device=backbone.device), TokenCounts()
    for prompt in prompts:
        prompt.grad = None
    for shares in plan_of_step(rows, costs, token_budget, backbone.pads_rows):
        tokens = sum((TokenCounts.of([costs[i] for i in share], backbone.pads_rows) for share in shares), tokens)
        # Under ZeRO-3 every rank must run every layer, for each holds a part of its weights. A rank that has no rows
        # in this micro-batch runs another's first row, at weight zero.
        mine = [rows[i] for i in shares[rank()]]
        batch, factor = mine or [rows[shares[0][0]]], 1.0 if mine else 0.0
        slots = [row.slot for row in batch]
        inputs = prompted.Rows(prompts, slots, [row.split.input_ids(row.number) for row in batch], shared)
        targets = [row.split.target_ids(row.number) for row in batch]
        with most_places(max(sum(len(rows[i].split.target_ids(rows[i].number)) for i in share) for share in shares)):
            if batch[0].teacher is None:
                row_losses = backbone.run(nll, inputs, targets)  # [B]
            else:
                behind = behind_teachers(batch, packed)
                row_losses = backbone.run(prompted.target_distillation, inputs, targets, *behind)
        weights = np.array([row.weight * factor for row in batch])
        weighted = row_losses * to_device(weights, losses.device, torch.float32)
        losses.index_add_(0, to_device(np.array(slots), losses.device), weighted.detach())
        # The batch's sum, and yet each prompt gets the gradient of its own loss: no row looks at another's prompt.
        weighted.sum().backward()
    # One all-reduce a step: prompts are small, and a message costs more than what is in it. The weights are frozen, so
    # no gradient of theirs is computed or sent.
    gradients = [torch.zeros_like(prompt) if prompt.grad is None else prompt.grad for prompt in prompts]
    flat = sum_over_ranks(torch.cat([losses, *(gradient.flatten() for gradient in gradients)]))
    losses, *summed = flat.split([len(work), *(prompt.numel() for prompt in prompts)])
    for prompt, gradient in zip(prompts, summed, strict=True):
        prompt.grad = gradient.view_as(prompt).clone()
    finite = torch.stack([gradient.isfinite().all() for gradient in summed])
    losses = losses.where(finite, torch.nan)
    return losses.cpu().numpy(), tokens
