"""A search over instructions by GEPA (Agrawal et al. 2025, "GEPA: Reflective Prompt Evolution Can Outperform
Reinforcement Learning"), in which the frozen model writes the instructions, too: nothing is asked of another model.

An instruction is changed by what it did on a few solved rows of train, is kept when it then answers them better, and is
judged on other rows of train. What is found becomes a hard prompt like a written one: dev decides between them.

All ranks carry out the same search together. GEPA draws from a generator with the search's seed, and all ranks see the
same scores, so that they stay in step.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipeline.backbone.files import context_length
from pipeline.backbone.host import Backbone
from pipeline.corpus.chat import bind_chat, parse_chat
from pipeline.corpus.encoding import decode_inputs, encode_inputs
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.token_set import TokenSet, flat_column
from pipeline.errors import CorpusError, SettingsError
from pipeline.lab.comparison.candidates import Candidate
from pipeline.lab.comparison.eval_job import frozen_rank
from pipeline.lab.comparison.hard_prompts import HardPrompt, instructed_request, written_texts
from pipeline.lab.comparison.study import Study, without_test_splits
from pipeline.run.stages import settings_for_ranks
from pipeline.settings import InstructionSearchSettings, Settings, TaskSettings
from pipeline.tuning.evaluate import LABELLED, EvalRequest, answer, score_texts
from pipeline.tuning.ranks import rank, world_size
from pipeline.tuning.teaching import joined
from pipeline.tuning.trials import random_numbers
from pipeline.whole_files import write_atomically

PHASE = "instructions"
_PART = "instruction"
# GEPA's own request to the model that proposes has about 300 tokens, and a solved row some 40 beside its texts.
_REQUEST_TOKENS, _ROW_TOKENS = 300, 40


@dataclass(frozen=True)
class Search:
    """One task's search from one seed."""

    task: str
    seed: int
    file: str
    """Name of the file with what it found: the digest of all that decides it."""


@dataclass(frozen=True)
class FoundInstruction:
    text: str
    value: float
    """Mean score of the rows of train that it was judged on."""
    tried: int
    """Instructions that were judged on all of these rows, the first one included."""
    rank_seconds: float


@dataclass(frozen=True)
class SearchJob:
    """Searches as sent to the ranks; plain values only."""

    settings: dict[str, Any]
    corpora: dict[str, dict[str, Any]]
    run_folder: str
    model_folder: str
    searches: tuple[Search, ...]

    def path(self, search: Search) -> Path:
        return Path(self.run_folder) / "files" / f"{search.file}.json"

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """Search on a rank. Raises: StorageError, BackboneError."""
        with frozen_rank(self, PHASE, device, node_leaves) as own:
            for place, search in enumerate(self.searches, 1):
                text = f"{search.task}, seed {search.seed} ({place} of {len(self.searches)})"
                own.run_log.event("stage", name=PHASE, text=text)
                corpus = TaskCorpus.from_dict(self.corpora[search.task])
                found = find_instruction(own.settings, corpus, search, own.backbone, own.tokenizer, own.stops)
                if found is None:
                    return
                if rank() == 0:
                    write_atomically(self.path(search), json.dumps(asdict(found)).encode())


def searched_prompts(study: Study, search: InstructionSearchSettings) -> list[HardPrompt]:
    """What a search of each task and seed found. Raises: PromptBankError."""
    context = context_length(study.checked.config)
    hard, encode = study.settings.compare.hard_prompts, partial(encode_inputs, study.checked.tokenizer)
    assert hard is not None
    for task in study.corpora:
        (first,) = encode(study.checked.architecture, [written_texts(hard, task)[0]])
        _check_room(task, study.settings.tasks[task], search, len(first), context)
    corpora = without_test_splits(study.corpora)
    with study.phase(PHASE) as (folder, log):
        log.write("begin", tasks=len(corpora))
        job = SearchJob(
            settings=settings_for_ranks(study.settings),
            corpora={task: corpus.to_dict() for task, corpus in corpora.items()},
            run_folder=str(folder),
            model_folder=str(study.model_folder),
            searches=tuple(_searches(study, search)),
        )
        missing = tuple(one for one in job.searches if _load(job.path(one)) is None)
        if missing:
            study.run_on_ranks(replace(job, searches=missing), log)
        found = [_load(job.path(one)) for one in job.searches]
        log.write("end", version=None, exit=0)
    if any(one is None for one in found):
        raise study.told_to_stop(PHASE)
    pairs = zip(job.searches, found, strict=True)
    return [_hard_prompt(study, one, instruction) for one, instruction in pairs if instruction is not None]


def _hard_prompt(study: Study, search: Search, found: FoundInstruction) -> HardPrompt:
    hard = study.settings.compare.hard_prompts
    assert hard is not None
    name = f"hard.{search.task}.searched.seed-{search.seed}"
    candidate = Candidate(name, "hard prompt", search.task, {"text": "searched", "shots": 0}, search.seed)
    return HardPrompt(candidate, joined([found.text] if found.text else [], hard.between), found.rank_seconds)


def _searches(study: Study, search: InstructionSearchSettings) -> Iterator[Search]:
    hard = study.settings.compare.hard_prompts
    assert hard is not None
    fixed = [search.model_dump(mode="json"), hard.between, study.checked.identity.fingerprint]
    for task in study.corpora:
        for seed in range(study.settings.compare.seeds):
            own = [task, seed, written_texts(hard, task), *study.deciding(task), study.settings.model.products]
            digest = hashlib.sha256(json.dumps([*fixed, *own], sort_keys=True).encode()).hexdigest()[:32]
            yield Search(task, seed, digest)


def _check_room(
    task: str, settings: TaskSettings, search: InstructionSearchSettings, first: int, context: int | None
) -> None:
    """first: tokens of the text that the search begins with."""
    row = settings.max_input_tokens + 2 * settings.max_target_tokens + _ROW_TOKENS
    most = _REQUEST_TOKENS + max(first, search.max_tokens) + search.max_tokens + search.shown * row
    if context is not None and most > context:
        raise SettingsError(
            f"compare.hard_prompts.search: {search.shown} solved rows of '{task}', its text of {first} tokens, a new "
            f"one of {search.max_tokens} and the request may take {most} tokens, longer than the model's context "
            f"of {context} tokens; lower shown, max_tokens or the task's max_input_tokens, or shorten the text"
        )


def _load(path: Path) -> FoundInstruction | None:
    try:
        return FoundInstruction(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def find_instruction(
    settings: Settings,
    corpus: TaskCorpus,
    search: Search,
    backbone: Backbone,
    tokenizer: Any,
    stops: Callable[[], bool] = lambda: False,
) -> FoundInstruction | None:
    """Search on all ranks together; None when `stops` said so before a proposal. Raises: CorpusError."""
    from gepa.api import optimize  # an optional package, and ranks of other phases need none

    hard = settings.compare.hard_prompts
    assert hard is not None and hard.search is not None
    wanted, started = hard.search, time.perf_counter()
    train = open_split(corpus.splits["train"])
    order = random_numbers(search.seed, search.task, "instructions").permutation(len(train))
    # Half of a small train split is left to learn from.
    judged = min(wanted.rows, len(train) // 2) if len(train) > 1 else 1
    told = False

    def told_to_stop(gepa_state: Any) -> bool:
        nonlocal told
        told = told or stops()
        return told

    program: Any = _Program(settings, search.task, corpus, train, backbone, tokenizer)
    result: Any = optimize(
        seed_candidate={_PART: _first_text(written_texts(hard, search.task), corpus)},
        trainset=order[judged:].tolist() or order.tolist(),
        valset=order[:judged].tolist(),
        adapter=program,
        reflection_lm=partial(_propose, backbone, tokenizer, wanted.max_tokens, settings.cluster.tokens_per_microbatch),
        reflection_minibatch_size=wanted.shown,
        max_metric_calls=wanted.answers,
        stop_callbacks=told_to_stop,
        logger=_Silent(),
        seed=search.seed,
    )
    if told:
        return None
    best, seconds = int(result.best_idx), time.perf_counter() - started
    return FoundInstruction(
        text=result.candidates[best][_PART].strip(),
        value=float(result.val_aggregate_scores[best]),
        tried=len(result.candidates),
        rank_seconds=seconds * world_size(),
    )


def _first_text(texts: Sequence[str], corpus: TaskCorpus) -> str:
    """What a search begins with: the user's first text, else the labels."""
    if texts[0] or corpus.labels is None:
        return texts[0]
    return f"Answer with one of: {', '.join(corpus.labels)}."


class _Silent:
    def log(self, message: str) -> None:
        """GEPA tells of every proposal; the run's own log tells of every search."""


@dataclass(frozen=True)
class _Program:
    """What GEPA optimises: the frozen model behind an instruction. Its examples are numbers of train rows."""

    settings: Settings
    task: str
    corpus: TaskCorpus
    train: TokenSet
    backbone: Backbone
    tokenizer: Any
    propose_new_texts: None = None
    """GEPA's own request to the model that proposes."""

    def evaluate(self, batch: list[int], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        from gepa.core.adapter import EvaluationBatch

        hard, own = self.settings.compare.hard_prompts, self.settings.tasks[self.task]
        assert hard is not None
        text = joined([candidate[_PART]] if candidate[_PART] else [], hard.between)
        rows = self.train.take(np.array(batch))
        request = instructed_request(own, text, rows, self.corpus, self.backbone, self.tokenizer)
        budget = self.settings.cluster.tokens_per_microbatch
        (given,) = answer(self.backbone, self.tokenizer, [request], budget)
        said = [""] * len(batch) if given.texts is None else given.texts
        losses = given.nll / rows.target_lengths
        scores = [_row_score(own.metric, *row) for row in zip(said, given.wanted, losses, strict=True)]
        traces = list(zip(batch, said, given.wanted, scores, strict=True))
        return EvaluationBatch(outputs=said, scores=scores, trajectories=traces if capture_traces else None)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> Mapping[str, Sequence[Mapping[str, str]]]:
        traces = eval_batch.trajectories
        ids = [self.train.input_ids(row).tolist() for row, *_ in traces]
        inputs = decode_inputs(self.tokenizer, self.backbone.architecture, ids)
        told = [
            {
                "Input": text,
                "Answer": said,
                "Feedback": "This is right." if score == 1.0 else f"The right answer is: {wanted}",
            }
            for text, (_, said, wanted, score) in zip(inputs, traces, strict=True)
        ]
        return dict.fromkeys(components_to_update, told)


def _row_score(metric: str, said: str, wanted: str, loss: float) -> float:
    """A row's part in its task's metric; more is better. loss: nats a token."""
    if metric == "loss":
        return -float(loss)
    return float(said == wanted) if metric in LABELLED else score_texts(metric, [said], [wanted])


def _propose(backbone: Backbone, tokenizer: Any, max_tokens: int, budget: int, prompt: str) -> str:
    """What the frozen model writes to GEPA's request, greedily."""
    ids, end, opened = _request_ids(backbone, tokenizer, prompt)
    split = TokenSet(
        np.zeros(1, np.uint64),
        flat_column(np.array(ids, np.int32), np.array([0, len(ids)], np.int64)),
        flat_column(np.array([end], np.int32), np.array([0, 1], np.int64), pa.array([""], pa.large_string())),
    )
    request = EvalRequest(backbone.no_prompt(), split, "exact_match", None, None, max_tokens)
    ((written, *_),) = [given.texts or [""] for given in answer(backbone, tokenizer, [request], budget)]
    return opened + written.partition("```")[0].strip() + "\n```" if opened else written


def _request_ids(backbone: Backbone, tokenizer: Any, prompt: str) -> tuple[list[int], int, str]:
    """A request's tokens, the token that ends its answer, and what of the answer the request already holds.

    A model that was trained for chats gets it as a user's message. Another one only continues texts: it gets the
    beginning of the block of code in which GEPA looks for an instruction.
    """
    if tokenizer.chat_template:
        with suppress(CorpusError):
            chat = bind_chat(parse_chat([("user", "{prompt}")], {}, "search"), tokenizer, "search")
            (text,) = chat.render([[prompt]])
            return encode_inputs(tokenizer, backbone.architecture, [text], chat)[0], chat.end_id, ""
    opened = "```\n"
    (ids,) = encode_inputs(tokenizer, backbone.architecture, [prompt + "\n\n" + opened])
    return ids, tokenizer.eos_token_id, opened
