"""Evaluation against what a user would write with transformers: a forward pass of padded batches, and `generate`.

Shapes: N rows of a task, L labels, P prompt tokens, T tokens, H hidden.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pipeline.backbone.files import find_model, read_tokenizer
from pipeline.backbone.host import Backbone
from pipeline.corpus.token_set import TokenSet
from pipeline.errors import SettingsError
from pipeline.lab.benchmark.bench import Bench, OurOptions, as_safetensors, host_for
from pipeline.lab.benchmark.peft_trainer import PeerOptions, load_peer_model
from pipeline.lab.benchmark.ranks import run_ranks
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.lab.benchmark.work import TaskWork
from pipeline.tuning.evaluate import EvalRequest, answer
from pipeline.tuning.machine import device_name

_BATCH = 32
"""Sequences of the other side's batches."""


@dataclass(frozen=True)
class EvaluationSide:
    """What one side took, and what it answered."""

    label_seconds: float
    chosen: list[list[str]]
    """Of each task, the label of each row."""
    decode_seconds: float
    decoded: list[list[str]]
    """Of each task, the text that each row was answered with."""


@dataclass(frozen=True)
class EvaluationResult:
    device: str
    rows: int
    """Rows whose labels were scored, of all tasks together."""
    decoded_rows: int
    tokens: int
    """Tokens of an answer, at most."""
    label_seconds: dict[str, list[float]]
    decode_seconds: dict[str, list[float]]
    label_ratio: float
    """How many times as long the other side took; the median over the rounds."""
    decode_ratio: float
    same_labels: float
    """Share of the rows for which both sides chose the same label. Untuned prompts leave many of them near a tie."""
    same_answers: float


def compare_evaluation(bench: Bench, tokens: int, decoded_rows: int, rounds: int) -> EvaluationResult:
    """Score labels of all dev rows, and decode answers to `decoded_rows` of them, on both sides in turn.

    Raises: SettingsError for an encoder-decoder.
    """
    if bench.config.is_encoder_decoder:
        raise SettingsError("--model: the other side is written for decoder-only models; give one")
    sides: dict[str, Callable[[], EvaluationSide]] = {
        "ours": lambda: run_ranks(bench.ranks, _ours, bench, tokens, decoded_rows)[0],
        "transformers": lambda: run_ranks(1, _theirs, bench, tokens, decoded_rows)[0],
    }
    done: dict[str, list[EvaluationSide]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            done[name].append(side())
    ours, theirs = done.values()
    return EvaluationResult(
        device_name(),
        sum(map(len, ours[0].chosen)),
        sum(map(len, ours[0].decoded)),
        tokens,
        {name: [round(side.label_seconds, 2) for side in runs] for name, runs in done.items()},
        {name: [round(side.decode_seconds, 2) for side in runs] for name, runs in done.items()},
        statistics.median(b.label_seconds / a.label_seconds for a, b in zip(ours, theirs, strict=True)),
        statistics.median(b.decode_seconds / a.decode_seconds for a, b in zip(ours, theirs, strict=True)),
        _share_alike(ours[0].chosen, theirs[0].chosen),
        _share_alike(ours[0].decoded, theirs[0].decoded),
    )


def save_evaluation(path: Path, result: EvaluationResult) -> None:
    write_figures(path, asdict(result))


def _share_alike(one: Sequence[Sequence[str]], other: Sequence[Sequence[str]]) -> float:
    pairs = [pair for both in zip(one, other, strict=True) for pair in zip(*both, strict=True)]
    return sum(mine == theirs for mine, theirs in pairs) / len(pairs)


def _ours(bench: Bench, tokens: int, decoded_rows: int) -> EvaluationSide:
    backbone, tokenizer = host_for(bench, OurOptions()), read_tokenizer(find_model(bench.model))
    return evaluated_here(backbone, tokenizer, bench.tasks, bench.prompts, tokens, decoded_rows)


def _theirs(bench: Bench, tokens: int, decoded_rows: int) -> EvaluationSide:
    torch.set_num_threads(bench.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = load_peer_model(as_safetensors(bench.model, Path(folder)), PeerOptions()).eval()
    tokenizer = read_tokenizer(find_model(bench.model))
    return evaluated_by_transformers(model, tokenizer, bench.tasks, bench.prompts, tokens, decoded_rows)


def evaluated_here(
    backbone: Backbone,
    tokenizer: Any,
    tasks: Sequence[TaskWork],
    prompts: Sequence[np.ndarray],
    tokens: int,
    decoded_rows: int,
) -> EvaluationSide:
    """As a run evaluates. Answers in words take the loss of every target, too."""
    tensors = [torch.from_numpy(prompt.copy()).to(backbone.device) for prompt in prompts]

    def timed(metric: str, tasks: Sequence[TaskWork]) -> tuple[float, list[list[str]]]:
        requests = [
            EvalRequest(prompt, _dev(task), metric, task.labels, task.label_ids, tokens)
            for prompt, task in zip(tensors, tasks, strict=True)
        ]
        start = time.perf_counter()
        answers = answer(backbone, tokenizer, requests, OurOptions().token_budget)
        return time.perf_counter() - start, [given.texts or [] for given in answers]

    timed("accuracy", [_first(task, 8) for task in tasks])  # settles
    return EvaluationSide(*timed("accuracy", tasks), *timed("exact_match", _share(tasks, decoded_rows)))


@torch.no_grad()
def evaluated_by_transformers(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskWork],
    prompts: Sequence[np.ndarray],
    tokens: int,
    decoded_rows: int,
) -> EvaluationSide:
    """The same by transformers' own model in batches of like length."""
    tensors = [torch.from_numpy(prompt.copy()) for prompt in prompts]

    def timed(function: Callable[..., list[str]], tasks: Sequence[TaskWork]) -> tuple[float, list[list[str]]]:
        start = time.perf_counter()
        found = [function(model, tokenizer, prompt, task) for prompt, task in zip(tensors, tasks, strict=True)]
        return time.perf_counter() - start, found

    timed(_best_labels, [_first(task, 8) for task in tasks])
    decode = partial(_generated, tokens=tokens)
    return EvaluationSide(*timed(_best_labels, tasks), *timed(decode, _share(tasks, decoded_rows)))


def _dev(task: TaskWork) -> TokenSet:
    assert task.dev is not None, "the bench was opened with dev rows"
    return task.dev


def _first(task: TaskWork, rows: int) -> TaskWork:
    return replace(task, dev=_dev(task).head(rows))


def _share(tasks: Sequence[TaskWork], rows: int) -> list[TaskWork]:
    """So many rows of all tasks together."""
    return [_first(task, rows // len(tasks)) for task in tasks]


def _best_labels(model: Any, tokenizer: Any, prompt: Tensor, task: TaskWork) -> list[str]:
    """Each row's most likely label: every label of every row is a sequence of its own."""
    split, labels = _dev(task), [torch.tensor(ids) for ids in task.label_ids]
    pairs = [(row, label) for row in _by_length(split) for label in range(len(labels))]
    scores = np.zeros((len(split), len(labels)))
    for start in range(0, len(pairs), _BATCH):
        batch = pairs[start : start + _BATCH]
        ids = [torch.cat([torch.as_tensor(split.input_ids(row)).long(), labels[label]]) for row, label in batch]
        given = _embedded(model, prompt, ids)
        mask = _mask([len(of) for of in given])
        logits = model(inputs_embeds=pad_sequence(given, batch_first=True), attention_mask=mask).logits
        for (row, label), own, length in zip(batch, logits, mask.sum(1).tolist(), strict=True):
            target = labels[label]
            likelihoods = own[length - len(target) - 1 : length - 1].log_softmax(-1)
            scores[row, label] = likelihoods.gather(1, target[:, None]).sum()
    return [task.labels[int(best)] for best in scores.argmax(1)]


def _generated(model: Any, tokenizer: Any, prompt: Tensor, task: TaskWork, tokens: int) -> list[str]:
    """Each row's greedy answer by `generate`, padded on the left as it asks for."""
    split, order = _dev(task), _by_length(_dev(task))
    answers: dict[int, str] = {}
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        given = _embedded(model, prompt, [torch.as_tensor(split.input_ids(row)).long() for row in batch])
        ids = model.generate(
            inputs_embeds=pad_sequence(given, batch_first=True, padding_side="left"),
            attention_mask=_mask([len(of) for of in given]).flip(1),
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        answers |= dict(zip(batch, (text.strip() for text in texts), strict=True))
    return [answers[row] for row in range(len(split))]


def _embedded(model: Any, prompt: Tensor, ids: Sequence[Tensor]) -> list[Tensor]:
    """Input embeddings `[P + T, H]` of each sequence behind the prompt."""
    words = model.get_input_embeddings()
    return [torch.cat([prompt, words(of)]) for of in ids]


def _mask(lengths: Sequence[int]) -> Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def _by_length(split: TokenSet) -> list[int]:
    """Rows of like length stand beside each other, so that little is padded."""
    return sorted(range(len(split)), key=lambda row: -len(split.input_ids(row)))
