"""Evaluation: rows of many trials in the same batches, spread over ranks, scored per trial.

Labels are compared by log-likelihood (accuracy, f1); open targets are decoded greedily.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone import prompted
from pipeline.backbone.host import Backbone
from pipeline.backbone.label_scores import label_offsets, label_scores
from pipeline.backbone.rows import common_beginnings
from pipeline.bank import LabelScore
from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.token_set import TokenSet
from pipeline.settings import TaskSettings
from pipeline.tuning.batches import RowCost, one_prompt_each, plan_rows
from pipeline.tuning.metrics import label_metric, text_metric
from pipeline.tuning.ranks import rank, sum_over_ranks, true_on_all, world_size

# Without gradients nothing is stored for a backward pass, so more tokens fit.
_BUDGET_FACTOR = 4
_CALIBRATION_ROWS = 100
LABELLED = ("accuracy", "f1")
"""Metrics of labels; of the others, all but `loss` are of texts."""


@dataclass(frozen=True)
class EvalRequest:
    """A prompt to be measured on a split. L labels."""

    prompt: Tensor
    split: TokenSet
    metric: str
    labels: tuple[str, ...] | None
    label_ids: tuple[tuple[int, ...], ...] | None
    max_target_tokens: int
    label_score: LabelScore = "sum"
    label_offsets: Sequence[float] | None = None
    """[L] nats that are taken off each label's score."""
    unlabelled: TokenSet | None = None
    """Rows from whose inputs the offsets are measured, for a prompt that has none yet; their targets are not used."""


def eval_request(
    settings: TaskSettings,
    prompt: Tensor,
    split: TokenSet,
    corpus: TaskCorpus,
    label_offsets: Sequence[float] | None = None,
) -> EvalRequest:
    """A prompt of a task on one of its splits, measured as the task's settings say.

    label_offsets: those of an earlier evaluation; without them, `calibrate` measures them. Raises: CorpusError.
    """
    return EvalRequest(
        prompt,
        split,
        settings.metric,
        corpus.labels,
        corpus.label_ids,
        settings.max_target_tokens,
        settings.label_score,
        label_offsets,
        calibration_rows(corpus.splits["train"]) if settings.calibrate and label_offsets is None else None,
    )


@cache
def calibration_rows(train: SplitRef) -> TokenSet:
    """The train rows whose inputs label offsets are measured from, a fixed random subset. Raises: CorpusError."""
    return open_split(train, _CALIBRATION_ROWS)


@dataclass(frozen=True)
class Score:
    value: float
    loss: float
    """Nats a target token."""
    label_offsets: tuple[float, ...] | None = field(default=None, compare=False)
    """[L] nats that were taken off each label's score; they belong to the prompt."""


@dataclass(frozen=True)
class Answers:
    """What a prompt made of every row of its split, and what was wanted: this decides its score."""

    nll: np.ndarray
    """[N] nats of each row's target."""
    wanted: list[str]
    """Each row's target; of open ones without special tokens, which decoding leaves out, too."""
    texts: list[str] | None
    """The label chosen, or the text decoded, of each row; None for the metric `loss`."""
    label_scores: np.ndarray | None = None
    """[N, L] what the labels of the request were compared by, for metrics of labels: see `backbone.label_scores`."""
    label_offsets: tuple[float, ...] | None = None
    """[L] nats that were taken off for these scores."""


@dataclass(frozen=True)
class _Item:
    slot: int
    number: int
    cost: RowCost


def evaluate(backbone: Backbone, tokenizer: Any, requests: Sequence[EvalRequest], token_budget: int) -> list[Score]:
    """Score every request. All ranks call this with the same requests and get the same scores."""
    answers = answer(backbone, tokenizer, requests, token_budget)
    return [score(request, given) for request, given in zip(requests, answers, strict=True)]


def score(request: EvalRequest, answers: Answers) -> Score:
    loss = float(answers.nll.sum() / request.split.target_lengths.sum())
    if answers.texts is None:
        return Score(loss, loss)
    return Score(score_texts(request.metric, answers.texts, answers.wanted), loss, answers.label_offsets)


def score_texts(metric: str, texts: Sequence[str], targets: Sequence[str]) -> float:
    """Of the metrics other than `loss`."""
    of_metric = label_metric if metric in LABELLED else text_metric
    return of_metric(metric, texts, targets)


def answer(backbone: Backbone, tokenizer: Any, requests: Sequence[EvalRequest], token_budget: int) -> list[Answers]:
    """Answer every row of every request. All ranks call this with the same requests and get the same answers."""
    run = _Runner(backbone, requests, token_budget * _BUDGET_FACTOR)
    wanted = [wanted_texts(request.metric, request.split, tokenizer) for request in requests]
    labelled = [s for s, request in enumerate(requests) if request.metric in LABELLED]
    others = [s for s, request in enumerate(requests) if s not in labelled]
    answers: dict[int, Answers] = {}
    for s, (likelihoods, offsets) in _label_likelihoods(run, labelled).items():
        labels = requests[s].labels or ()
        nll = np.array([-row[labels.index(target)] for row, target in zip(likelihoods, wanted[s], strict=True)])
        scores = label_scores(likelihoods, _label_tokens(requests[s]), requests[s].label_score, offsets)
        # A prompt gone NaN has no best label: it gets the first, and its loss tells.
        best = [labels[int(i)] for i in np.nan_to_num(scores, nan=-np.inf).argmax(axis=1)]
        answers[s] = Answers(nll, wanted[s], best, scores, offsets)
    losses = run.each_row(others, _score_targets, width=1)
    ends = {s: _end_of(requests[s], tokenizer) for s in others if requests[s].metric != "loss"}
    texts: dict[int, list[str]] = {}
    for end in dict.fromkeys(ends.values()):
        texts |= _decode(run, tokenizer, [s for s in ends if ends[s] == end], end)
    answers |= {s: Answers(losses[s][:, 0], wanted[s], texts.get(s)) for s in others}
    return [answers[s] for s in range(len(requests))]


def _label_likelihoods(run: "_Runner", slots: Sequence[int]) -> dict[int, tuple[np.ndarray, tuple[float, ...] | None]]:
    """By request, log P of its labels behind each row, `[N, L]`, and the offsets of its prompt, `[L]`."""
    # Rows that give offsets are rows of one more request each, so that all run in the same batches.
    unlabelled = {s: rows for s in slots if (rows := run.requests[s].unlabelled) is not None}
    more = [replace(run.requests[s], split=rows) for s, rows in unlabelled.items()]
    place = {s: len(run.requests) + i for i, s in enumerate(unlabelled)}
    both = replace(run, requests=[*run.requests, *more])
    most = max((_label_copies(run.requests[s]) for s in slots), default=0)
    outcomes = both.each_row(
        [*slots, *place.values()], partial(_score_labels, width=most), width=most, copies=_label_copies
    )
    found = {}
    for s in slots:
        request, count = run.requests[s], _label_copies(run.requests[s])
        offsets = None if request.label_offsets is None else tuple(request.label_offsets)
        if s in place:
            likelihoods = outcomes[place[s]][:, :count]
            offsets = label_offsets(label_scores(likelihoods, _label_tokens(request), request.label_score, None))
        found[s] = outcomes[s][:, :count], offsets
    return found


def _label_tokens(request: EvalRequest) -> list[int]:
    return [len(ids) for ids in request.label_ids or ()]


def _end_of(request: EvalRequest, tokenizer: Any) -> int:
    """The token that ends an answer: eos, behind which mBART's targets have a language; or that of a chat's turn."""
    target = request.split.target_ids(0)
    return int(tokenizer.eos_token_id if tokenizer.eos_token_id in target else target[-1])


def wanted_texts(metric: str, split: TokenSet, tokenizer: Any) -> list[str]:
    """Each row's target; of open ones what its own tokens decode to, for no answer can be more."""
    if metric in LABELLED:
        return [split.target(i) for i in range(len(split))]
    return [spoken(split.target_ids(i), tokenizer) for i in range(len(split))]


def spoken(target_ids: Sequence[int] | np.ndarray, tokenizer: Any) -> str:
    """The answer that an open target's tokens, [T] with eos, are.

    `<extra_id_0> yes` is `yes`, and to a tokenizer of small letters `Yes` is, too.
    """
    return str(tokenizer.decode(list(target_ids[:-1]), skip_special_tokens=True)).strip()


def _label_copies(request: EvalRequest) -> int:
    return len(request.label_ids or ())


def _item(slot: int, number: int, request: EvalRequest, copies: int, shared: int) -> _Item:
    split = request.split
    own = len(split.input_ids(number)) + copies * len(split.target_ids(number))
    return _Item(slot, number, RowCost(slot, len(request.prompt), own, shared=shared))


@dataclass(frozen=True)
class _Runner:
    backbone: Backbone
    requests: Sequence[EvalRequest]
    token_budget: int

    @cached_property
    def shared(self) -> list[int]:
        """For each request, the tokens that its rows begin with alike and that run once; 0 where nothing does."""
        if not self.backbone.shares_prompts:
            return [0] * len(self.requests)
        splits = {id(request.split): request.split for request in self.requests}  # trials of a task have the same
        rows = [(split.input_ids(i), place) for place, split in enumerate(splits.values()) for i in range(len(split))]
        inputs, of_split = zip(*rows, strict=True)
        tokens = dict(zip(splits, common_beginnings(inputs, of_split, len(splits)), strict=True))
        return [tokens[id(request.split)] for request in self.requests]

    def each_row(
        self,
        slots: Sequence[int],
        outcomes: Callable[["_Runner", list[_Item]], np.ndarray],
        width: int,
        copies: Callable[[EvalRequest], int] = lambda request: 1,
        padded: bool = False,
    ) -> dict[int, np.ndarray]:
        """`outcomes` (`[B, width]`) of every row of these requests, by request: `[rows, width]`."""
        items = [
            _item(s, i, self.requests[s], copies(self.requests[s]), self.shared[s])
            for s in slots
            for i in range(len(self.requests[s].split))
        ]
        table = torch.zeros(len(items), width, dtype=torch.float64, device=self.backbone.device)
        costs = [item.cost for item in items]
        costs = costs if self.backbone.shares_prompts else one_prompt_each(costs)
        for shares in plan_rows(costs, world_size(), self.token_budget, padded or self.backbone.pads_rows):
            mine = shares[rank()]
            result = outcomes(self, [items[i] for i in mine or shares[0][:1]])
            if mine:
                table[torch.as_tensor(mine)] = torch.as_tensor(result, dtype=torch.float64, device=table.device)
        sum_over_ranks(table)
        of_slot = np.array([item.slot for item in items])
        return {s: table.cpu().numpy()[of_slot == s] for s in slots}

    def rows(self, items: Sequence[_Item]) -> prompted.Rows:
        inputs = [self.requests[item.slot].split.input_ids(item.number) for item in items]
        prompts = [request.prompt.detach() for request in self.requests]
        return prompted.Rows(prompts, [item.slot for item in items], inputs, self.shared)


def _score_labels(run: _Runner, items: list[_Item], width: int) -> np.ndarray:
    requests = [run.requests[item.slot] for item in items]
    labels = [[np.array(ids) for ids in request.label_ids or ()] for request in requests]
    scores = run.backbone.run(prompted.label_log_likelihoods, run.rows(items), labels)
    table = np.zeros((len(items), width))
    for row, of_row in zip(table, scores, strict=True):
        row[: len(of_row)] = of_row
    return table


def _score_targets(run: _Runner, items: list[_Item]) -> np.ndarray:
    targets = [run.requests[item.slot].split.target_ids(item.number) for item in items]
    with torch.no_grad():
        nll = run.backbone.run(prompted.target_nll, run.rows(items), targets)
    return nll.cpu().numpy()[:, None]


def _decode(run: _Runner, tokenizer: Any, slots: Sequence[int], end: int) -> dict[int, list[str]]:
    """Answers up to the token `end` to every row of these requests."""
    longest = max(run.requests[s].max_target_tokens for s in slots)

    def outcomes(run: _Runner, items: list[_Item]) -> np.ndarray:
        ids = run.backbone.run(
            prompted.greedy_decode,
            run.rows(items),
            longest,
            end,
            lambda done: true_on_all(done, run.backbone.device),
        )
        table = np.full((len(items), longest + 1), -1)
        for b, row in enumerate(ids):
            kept = row[: run.requests[items[b].slot].max_target_tokens]
            table[b, 0], table[b, 1 : 1 + len(kept)] = len(kept), kept
        return table

    def text(row: np.ndarray) -> str:
        return str(tokenizer.decode(row[1 : 1 + int(row[0])].astype(int), skip_special_tokens=True)).strip()

    tables = run.each_row(slots, outcomes, width=longest + 1, padded=True)
    return {s: [text(row) for row in table] for s, table in tables.items()}
