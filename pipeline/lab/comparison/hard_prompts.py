"""Hard prompts, which are made of words: the embeddings of their tokens are the prompt, and nothing is tuned.

They go through the same evaluator as soft prompts. A row behind a hard prompt has exactly the tokens that the tokenizer
gives for the whole text, special tokens included (`with_shared_prefix`). The tokens that all rows begin with are the
prompt, and they run once for all rows.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, Literal

import numpy as np
import torch

from pipeline.backbone.host import Backbone
from pipeline.corpus.encoding import Architecture, decode_inputs, encode_inputs, missing_embedding
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.token_set import TokenSet, flat_column
from pipeline.errors import SettingsError
from pipeline.lab.comparison.candidates import Candidate
from pipeline.settings import HardPromptSettings, TaskSettings
from pipeline.tuning.evaluate import EvalRequest, eval_request
from pipeline.tuning.teaching import joined, solved_rows
from pipeline.tuning.trials import random_numbers


@dataclass(frozen=True)
class HardPrompt:
    candidate: Candidate
    text: str
    """The text before every row."""
    rank_seconds: float = 0.0
    """What it took to find the text, summed over ranks; 0 where it was written."""


def hard_prompts(
    settings: HardPromptSettings,
    tasks: Mapping[str, TaskSettings],
    corpora: Mapping[str, TaskCorpus],
    seeds: int,
    tokenizer: Any,
    architecture: Architecture,
) -> Iterator[HardPrompt]:
    """Every task's hard prompts: for each of its texts one without solved rows, and one for each number and seed."""
    for task, corpus in corpora.items():
        texts = written_texts(settings, task)
        train = open_split(corpus.splits["train"]) if settings.shots else None
        for place, own in enumerate(texts, start=1):
            name, choice = (f"hard.{task}", {}) if len(texts) == 1 else (f"hard.{task}.text-{place}", {"text": place})
            if settings.zero_shot:
                candidate = Candidate(f"{name}.shots-0", "hard prompt", task, {**choice, "shots": 0}, None)
                yield HardPrompt(candidate, joined([own] if own else [], settings.between))
            for shots, seed in product(settings.shots, range(seeds)):
                assert train is not None
                rows = drawn_rows(task, seed, shots, train, settings.draw)
                solved = solved_rows(train, rows, tasks[task].separator, tokenizer, architecture)
                chosen = {**choice, "shots": shots}
                candidate = Candidate(f"{name}.shots-{shots}.seed-{seed}", "hard prompt", task, chosen, seed)
                yield HardPrompt(candidate, joined([own, *solved] if own else solved, settings.between))


def written_texts(settings: HardPromptSettings, task: str) -> tuple[str, ...]:
    """The user's own texts for a task; an empty one where there is none."""
    given = settings.text.get(task, "")
    return (given,) if isinstance(given, str) else given


def drawn_rows(
    task: str, seed: int, shots: int, train: TokenSet, draw: Literal["random", "balanced"] = "random"
) -> np.ndarray:
    """Row numbers `[shots]` of the train split. Fewer shots of a seed are the first ones of more shots."""
    order = random_numbers(seed, task, "shots").permutation(len(train))
    if draw == "balanced":
        place_of = np.argsort(order)
        # How many rows of its own target come before a row: the first of every target, then the second of each.
        turn = np.empty(len(train), dtype=np.int64)
        for rows in train.rows_by_target.values():
            turn[rows] = np.argsort(np.argsort(place_of[rows]))
        order = order[np.argsort(turn[order], kind="stable")]
    return order[:shots]


def with_shared_prefix(
    text: str, splits: Sequence[TokenSet], tokenizer: Any, architecture: Architecture
) -> tuple[np.ndarray, list[TokenSet]]:
    """The tokens `[P]` that all rows begin with when the text stands before them, and the splits of their remainders.

    Those tokens and a row's remainder together are the tokenizer's ids for the joined texts.
    """
    rows = [split.input_ids(row).tolist() for split in splits for row in range(len(split))]
    inputs = decode_inputs(tokenizer, architecture, rows)
    whole = [np.array(ids, np.int32) for ids in encode_inputs(tokenizer, architecture, [text + own for own in inputs])]
    shared = _shared(whole) if text else 0
    rest = iter([ids[shared:] for ids in whole])
    return whole[0][:shared], [_with_inputs(split, list(islice(rest, len(split)))) for split in splits]


def instructed_request(
    task: TaskSettings, text: str, rows: TokenSet, corpus: TaskCorpus, backbone: Backbone, tokenizer: Any
) -> EvalRequest:
    """Rows of a task behind a text, measured as the task's settings say. Raises: CorpusError."""
    request = eval_request(task, backbone.no_prompt(), rows, corpus)
    unlabelled = [] if request.unlabelled is None else [request.unlabelled]
    ids, (split, *unlabelled) = with_shared_prefix(text, [rows, *unlabelled], tokenizer, backbone.architecture)
    prompt = backbone.embed(torch.as_tensor(ids, dtype=torch.long))  # [P, H]
    return replace(request, prompt=prompt, split=split, unlabelled=unlabelled[0] if unlabelled else None)


def _with_inputs(split: TokenSet, inputs: Sequence[np.ndarray]) -> TokenSet:
    offsets = np.concatenate([[0], np.cumsum([len(ids) for ids in inputs])]).astype(np.int64)
    return replace(split, inputs=flat_column(np.concatenate(inputs), offsets))


def check_hard_prompt(
    prompt: HardPrompt,
    task: TaskSettings,
    tokenizer: Any,
    architecture: Architecture,
    context: int | None,
    rows: int | None = None,
) -> int:
    """The number of tokens of the text.

    Raises: SettingsError when text, row and target may not fit into the model's context, or the text has a token beyond
    the model's `rows` of embeddings.
    """
    ids = encode_inputs(tokenizer, architecture, [prompt.text])[0]
    if (reason := missing_embedding(tokenizer, ids, rows)) is not None:
        raise SettingsError(f"task '{prompt.candidate.task}': its hard prompt ({prompt.candidate.name}) {reason}")
    tokens = len(ids)
    most = tokens + task.max_input_tokens + task.max_target_tokens
    if context is not None and most > context:
        raise SettingsError(
            f"task '{prompt.candidate.task}': a hard prompt of {tokens} tokens ({prompt.candidate.name}) + "
            f"max_input_tokens {task.max_input_tokens} + max_target_tokens {task.max_target_tokens} = {most} is longer "
            f"than the model's context of {context} tokens; lower compare.hard_prompts.shots or one of them"
        )
    return tokens


def _shared(rows: Sequence[np.ndarray]) -> int:
    """How many tokens all rows begin with; each row keeps at least one of its own."""
    most = min(map(len, rows)) - 1
    table = np.stack([row[:most] for row in rows])
    differs = (table != table[0]).any(axis=0)
    return int(differs.argmax()) if differs.any() else most
