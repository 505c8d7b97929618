"""Benchmark of a sweep's wall time: its trials together, together with halving, and one after another."""

import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer
from pipeline.backbone.host import Backbone
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.lab.benchmark.bench import OurOptions, host_model
from pipeline.lab.benchmark.ranks import run_ranks
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.lab.benchmark.work import write_token_shards
from pipeline.settings import Settings, parse_settings
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.loop import tune
from pipeline.tuning.machine import device_name
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.state import TrialState, winner
from pipeline.tuning.trials import Trial, make_trials

_TOKEN_BUDGET = 4096


@dataclass(frozen=True)
class SweepOptions:
    model: str
    data: Path
    tasks: Sequence[str]
    lengths: Sequence[int]
    rates: Sequence[float]
    seeds: int
    batch_size: int
    steps: int
    eval_every: int
    dev_rows: int
    factor: int
    """Halving's factor; its first rung is the first evaluation."""
    sample: int
    """How many trials run alone, spread evenly over the sweep; their time is scaled to that of all."""
    rounds: int
    ranks: int
    threads: int
    products: str = "auto"


@dataclass
class SweepSide:
    """A side's figures, with a time for each round; evaluations and checkpoints are included."""

    seconds: list[float] = field(default_factory=list)
    trials: int = 0
    steps: int = 0
    """Steps of all trials together."""
    tokens: int = 0
    """Text tokens that were trained on, without prompts and evaluations."""
    ends: dict[str, int] = field(default_factory=dict)
    """By status, how many trials ended with it."""
    best: dict[str, float] = field(default_factory=dict)
    """Dev accuracy of the prompt that each task would publish."""

    @property
    def rate(self) -> float:
        """Text tokens a second."""
        return self.tokens / statistics.median(self.seconds)


@dataclass(frozen=True)
class Distance:
    """Greatest relative distance between a trial on one side and the same trial on another."""

    prompt: float
    first_loss: float
    """Dev loss at the first evaluation after the start."""
    last_loss: float


@dataclass(frozen=True)
class SweepResult:
    trials: int
    together: SweepSide
    halving: SweepSide
    alone: SweepSide
    """The sampled trials, one after another."""
    alone_seconds: list[float]
    """Time of every round, scaled from the sampled trials to all."""
    alone_apart: dict[float, Distance]
    """By learning rate: the sampled trials tuned together, from the same tuned alone."""
    survivors_apart: dict[float, Distance]
    """By learning rate: the trials that halving let finish, from the same without halving."""

    @property
    def steps_saved(self) -> float:
        """Share of the steps that halving saves."""
        return 1 - self.halving.steps / self.together.steps

    @property
    def ratios(self) -> dict[str, tuple[float, float, float]]:
        """How many times longer one after another takes: least, median and greatest over the rounds."""
        found = {}
        for name, side in (("together", self.together), ("together, halving", self.halving)):
            each = [theirs / ours for ours, theirs in zip(side.seconds, self.alone_seconds, strict=True)]
            found[name] = (min(each), statistics.median(each), max(each))
        return found


def compare_sweeps(options: SweepOptions, out: Path) -> SweepResult:
    """Run the sides in turn on one loaded backbone; results go to `out` as JSON. Raises: CorpusError, BackboneError."""
    files = find_model(options.model)
    tokenizer, architecture = read_tokenizer(files), architecture_of(read_config(files))
    with tempfile.TemporaryDirectory() as folder:
        corpora = [
            write_token_shards(Path(folder) / "corpora", options.data, name, tokenizer, architecture, options.dev_rows)
            for name in options.tasks
        ]
        result: SweepResult = run_ranks(options.ranks, _on_rank, options, corpora, folder)[0]
    facts = {
        "device": device_name(),
        "options": {**asdict(options), "data": options.data.name},
        "alone_seconds_are": f"of {result.alone.trials} trials, spread evenly, scaled to {result.trials}",
        "steps_saved_by_halving": result.steps_saved,
        "ratios": result.ratios,
    }
    write_figures(out, {**facts, **asdict(result)})
    return result


def sweep_settings(options: SweepOptions, halving: bool) -> Settings:
    task = {
        "train": "in memory",
        "dev": "in memory",
        "prompt": {"length": options.lengths[0]},
        "batch_size": options.batch_size,
        "max_steps": options.steps,
        "eval_every": options.eval_every,
        "patience": None,
        "eval_rows": options.dev_rows,
        "sweep": {
            "prompt.length": list(options.lengths),
            "optimizer.lr": list(options.rates),
            "seed": list(range(options.seeds)),
        },
        "halving": {"first": 1, "factor": options.factor} if halving else None,
    }
    return parse_settings({"model": {"path": options.model}, "tasks": dict.fromkeys(options.tasks, task)})


def _on_rank(options: SweepOptions, corpora: Sequence[TaskCorpus], folder: str) -> SweepResult:
    backbone = host_model(options.model, options.threads // options.ranks, OurOptions(products=options.products))
    tokenizer = read_tokenizer(find_model(options.model))
    bench = _Bench(options, {corpus.task: corpus for corpus in corpora}, Path(folder), backbone, tokenizer)
    every = make_trials(sweep_settings(options, False), bench.digests, "benchmark", {})
    halved = make_trials(sweep_settings(options, True), bench.digests, "benchmark", {})
    sample = [every[i * (len(every) - 1) // (options.sample - 1)] for i in range(options.sample)]
    short = sample[0].settings.model_copy(update={"max_steps": 2})
    bench.timed([replace(sample[0], settings=short)])  # allocators, kernels and ZeRO-3's trace settle in it
    together, halving, alone = SweepSide(), SweepSide(), SweepSide()
    for _ in range(options.rounds):
        all_states = bench.run(together, [every])
        left = bench.run(halving, [halved])
        by_itself = bench.run(alone, [[trial] for trial in sample])
    return SweepResult(
        trials=len(every),
        together=together,
        halving=halving,
        alone=alone,
        alone_seconds=[seconds * len(every) / len(sample) for seconds in alone.seconds],
        alone_apart=_distances(all_states, by_itself),
        survivors_apart=_distances(all_states, [state for state in left if state.status not in ("halved", "failed")]),
    )


@dataclass
class _Bench:
    options: SweepOptions
    corpora: dict[str, TaskCorpus]
    folder: Path
    backbone: Backbone
    tokenizer: Any
    runs: int = 0

    @property
    def digests(self) -> dict[str, str]:
        return {name: corpus.digest for name, corpus in self.corpora.items()}

    def run(self, side: SweepSide, batches: Sequence[Sequence[Trial]]) -> list[TrialState]:
        """Each batch of trials together, the batches one after another; added to the side."""
        ended, seconds = [], 0.0
        for trials in batches:
            states, took = self.timed(trials)
            ended += states
            seconds += took
        side.seconds.append(seconds)
        side.trials, side.steps = len(ended), sum(state.step for state in ended)
        side.tokens = sum(self.text_tokens(state) for state in ended)
        side.ends = {status: [s.status for s in ended].count(status) for status in sorted({s.status for s in ended})}
        best = [winner(state for state in ended if state.trial.task == task) for task in self.corpora]
        side.best = {state.trial.task: state.history[state.best_at].value for state in best if state is not None}
        return ended

    def timed(self, trials: Sequence[Trial]) -> tuple[list[TrialState], float]:
        self.runs += 1
        folder = self.folder / f"run-{self.runs}"
        run = TuningRun(trials, self.corpora, folder, len(trials), 10**9, _TOKEN_BUDGET)
        start = time.perf_counter()
        states = tune(run, self.backbone, self.tokenizer)
        if self.backbone.device.type == "cuda":
            torch.cuda.synchronize()
        return states, time.perf_counter() - start

    def text_tokens(self, state: TrialState) -> int:
        train = open_split(self.corpora[state.trial.task].splits["train"])
        rows = [row for step in range(state.step) for row in rows_of_step(state.trial, train, step)]
        return sum(len(train.input_ids(row)) + len(train.target_ids(row)) for row in rows)


def _distances(ours: Sequence[TrialState], others: Sequence[TrialState]) -> dict[float, Distance]:
    by_name = {state.trial.name: state for state in ours}
    of_rate: dict[float, list[tuple[TrialState, TrialState]]] = {}
    for state in others:
        of_rate.setdefault(state.trial.settings.optimizer.rate, []).append((by_name[state.trial.name], state))
    return {
        rate: Distance(
            prompt=max(float(((a.prompt - b.prompt).norm() / b.prompt.norm()).detach()) for a, b in pairs),
            first_loss=max(abs(a.history[1].loss / b.history[1].loss - 1) for a, b in pairs),
            last_loss=max(abs(a.history[-1].loss / b.history[-1].loss - 1) for a, b in pairs),
        )
        for rate, pairs in sorted(of_rate.items())
    }
