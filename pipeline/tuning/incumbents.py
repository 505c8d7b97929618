"""The bank's prompts measured against the new ones: what each makes of every dev row.

All ranks measure once, after the last step. A prompt of any length, tuned by whatever run, is measured on exactly the
rows that the new one is measured on, with the same products, and by label scores as its own record has them: as it is
served. The file says what it was measured for, so that a run that is started again measures only what it has not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.backbone.host import Backbone
from pipeline.bank import LabelScore, PromptRecord
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.sealed_files import open_tensors, sealed_tensors
from pipeline.tuning.evaluate import LABELLED, Answers, EvalRequest, answer, calibration_rows, eval_request
from pipeline.tuning.metrics import text_metric
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.ranks import rank
from pipeline.tuning.state import TrialState, by_task, winner
from pipeline.whole_files import write_atomically

_FILE = "dev_outcomes.safetensors"
_SCORING = "label_scoring"


@dataclass(frozen=True)
class RecordedScoring:
    """How labels are scored behind a prompt, as its record in the bank tells it."""

    label_score: LabelScore = "sum"
    label_offsets: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Incumbents:
    """The bank's prompts of the tasks that were tuned."""

    digests: Mapping[str, str]
    """By task, of the file that holds the prompt."""
    prompts: Mapping[str, np.ndarray]
    """By task, `[Q, H]` float32; Q need not be the new prompt's length."""
    scorings: Mapping[str, RecordedScoring] = field(default_factory=dict)
    """By task, where labels are scored otherwise than by their sum."""


@dataclass(frozen=True)
class Pair:
    """Row by row outcomes of two prompts on the same dev rows, `[N, 2]` float64 each.

    The two numbers are (answer, wanted) as places in the label set for accuracy and f1, (score, 1) for exact_match and
    rouge_l, (nats, target tokens) for loss: from their sums over rows each metric follows.
    """

    incumbent: np.ndarray
    new: np.ndarray


def measure_against(
    incumbents: Incumbents, run: TuningRun, states: Sequence[TrialState], backbone: Backbone, tokenizer: Any
) -> None:
    """Write down both prompts' outcomes for each task that has an incumbent and a trial that did not fail.

    All ranks call this; rank 0 writes. Raises: StorageError.
    """
    best = best_states(states)
    wanted_pairs = pair_keys(best, incumbents.digests)
    if read_pairs(run.folder, wanted_pairs) is not None:
        return
    requests = []
    for task in wanted_pairs:
        state, corpus = best[task], run.corpora[task]
        settings, dev = state.trial.settings, open_split(corpus.splits["dev"], state.trial.settings.eval_rows)
        new = eval_request(settings, state.best, dev, corpus, state.label_offsets)
        prompt = torch.as_tensor(incumbents.prompts[task], dtype=torch.float32, device=backbone.device)
        scoring = incumbents.scorings.get(task, RecordedScoring())
        requests += [_as_recorded(replace(new, prompt=prompt), scoring, corpus), new]
    answers = answer(backbone, tokenizer, requests, run.token_budget) if requests else []
    outcomes = [row_outcomes(request, given) for request, given in zip(requests, answers, strict=True)]
    tensors: dict[str, np.ndarray] = {}
    for i, task in enumerate(wanted_pairs):
        tensors |= {f"{task}/incumbent": outcomes[2 * i], f"{task}/new": outcomes[2 * i + 1]}
    if rank() == 0:
        data = sealed_tensors(save(tensors, {"measured": json.dumps(wanted_pairs)}))
        write_atomically(run.folder / _FILE, data)


def _as_recorded(request: EvalRequest, scoring: RecordedScoring, corpus: TaskCorpus) -> EvalRequest:
    """The request with labels scored as the record says, and so as the prompt is served.

    Labels that came after the record have no offset in it; then all are measured anew.
    """
    labels, offsets = request.labels or (), scoring.label_offsets
    if offsets is None:
        return replace(request, label_score=scoring.label_score, label_offsets=None, unlabelled=None)
    if all(label in offsets for label in labels):
        known = tuple(offsets[label] for label in labels)
        return replace(request, label_score=scoring.label_score, label_offsets=known, unlabelled=None)
    rows = calibration_rows(corpus.splits["train"])
    return replace(request, label_score=scoring.label_score, label_offsets=None, unlabelled=rows)


def best_states(states: Sequence[TrialState]) -> dict[str, TrialState]:
    """By task, the trial whose prompt would be published; tasks whose every trial failed have none."""
    best = {task: winner(own) for task, own in by_task(states).items()}
    return {task: state for task, state in best.items() if state is not None}


def pair_keys(best: Mapping[str, TrialState], incumbents: Mapping[str, str]) -> dict[str, list[Any]]:
    """By task, what tells one comparison from another: the bank's prompt, the trial and the step of its best."""
    return {
        task: [incumbents[task], state.trial.digest, state.history[state.best_at].step]
        for task, state in best.items()
        if task in incumbents
    }


def read_pairs(folder: Path, keys: Mapping[str, list[Any]]) -> dict[str, Pair] | None:
    """What was measured, by task; None unless it is exactly what the keys ask for."""
    try:
        data = (folder / _FILE).read_bytes()
        if json.loads(open_tensors(data, ("measured",))["measured"]) != dict(keys):
            return None
        outcomes = load(data)
        return {task: Pair(outcomes[f"{task}/incumbent"], outcomes[f"{task}/new"]) for task in keys}
    except (SafetensorError, OSError, ValueError, KeyError):
        return {} if not keys else None


def row_outcomes(request: EvalRequest, answers: Answers) -> np.ndarray:
    """`[N, 2]`, as `Pair` has them."""
    if answers.texts is None:
        return np.stack([answers.nll, request.split.target_lengths], axis=1).astype(np.float64)
    pairs = zip(answers.texts, answers.wanted, strict=True)
    if request.metric in LABELLED:
        place = {label: i for i, label in enumerate(request.labels or ())}
        rows = [(float(place[got]), place[want]) for got, want in pairs]
    else:
        rows = [(text_metric(request.metric, [got], [want]), 1) for got, want in pairs]
    return np.array(rows, dtype=np.float64).reshape(-1, 2)


def encode_incumbent(prompt: np.ndarray, record: PromptRecord) -> bytes:
    """The file by which the ranks get a prompt of the bank: nothing but the prompt where labels are scored by sum."""
    offsets = dict(zip(record.labels or (), record.label_offsets, strict=True)) if record.label_offsets else None
    scoring = RecordedScoring(record.label_score, offsets)
    told = None if scoring == RecordedScoring() else {_SCORING: json.dumps(asdict(scoring))}
    return save({"prompt": prompt}, told)


def decode_incumbent(data: bytes) -> tuple[np.ndarray, RecordedScoring]:
    """The inverse of `encode_incumbent`; data: a file whose digest was verified."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    told = header.get("__metadata__", {}).get(_SCORING)
    return load(data)["prompt"], RecordedScoring() if told is None else RecordedScoring(**json.loads(told))


def prompt_digest(data: bytes) -> str:
    """Of a file that holds a prompt, and at most how labels are scored behind it."""
    return hashlib.sha256(data).hexdigest()
