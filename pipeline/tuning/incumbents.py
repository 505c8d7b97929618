"""The bank's prompts measured against the new ones: what each makes of every dev row.

All ranks measure once, after the last step. A prompt of any length, tuned by whatever run, is measured on exactly the
rows that the new one is measured on, with the same products. The file says what it was measured for, so that a run that
is started again measures only what it has not.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.backbone.host import Backbone
from pipeline.corpus.reader import open_split
from pipeline.sealed_files import open_tensors, sealed_tensors
from pipeline.tuning.evaluate import LABELLED, Answers, EvalRequest, answer, eval_request
from pipeline.tuning.metrics import text_metric
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.ranks import rank
from pipeline.tuning.state import TrialState, by_task, winner
from pipeline.whole_files import write_atomically

_FILE = "dev_outcomes.safetensors"


@dataclass(frozen=True)
class Incumbents:
    """The bank's prompts of the tasks that were tuned."""

    digests: Mapping[str, str]
    """By task, of the file that holds the prompt."""
    prompts: Mapping[str, np.ndarray]
    """By task, `[Q, H]` float32; Q need not be the new prompt's length."""


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
        incumbent = torch.as_tensor(incumbents.prompts[task], dtype=torch.float32, device=backbone.device)
        requests += [eval_request(settings, prompt, dev, corpus) for prompt in (incumbent, state.best)]
    answers = answer(backbone, tokenizer, requests, run.token_budget) if requests else []
    outcomes = [row_outcomes(request, given) for request, given in zip(requests, answers, strict=True)]
    tensors: dict[str, np.ndarray] = {}
    for i, task in enumerate(wanted_pairs):
        tensors |= {f"{task}/incumbent": outcomes[2 * i], f"{task}/new": outcomes[2 * i + 1]}
    if rank() == 0:
        data = sealed_tensors(save(tensors, {"measured": json.dumps(wanted_pairs)}))
        write_atomically(run.folder / _FILE, data)


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


def prompt_digest(data: bytes) -> str:
    """Of a file that holds a prompt and nothing else."""
    return hashlib.sha256(data).hexdigest()
