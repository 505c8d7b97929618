"""Many small tasks on a tiny model: what each stage of a run and of the next nights costs, by the number of tasks."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from io import StringIO
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from transformers import LlamaConfig

from pipeline.lab.benchmark.ranks import end_with_parent
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.lab.benchmark.synthetic import write_checkpoint
from pipeline.refresh.inputs import read_inputs
from pipeline.refresh.night import night_settings, run_night
from pipeline.reporting.events import EventLog
from pipeline.reporting.html import render
from pipeline.reporting.html.from_record import night_of_record
from pipeline.run.bank import readable_bank
from pipeline.run.checks import check_run, print_plan
from pipeline.settings import load_settings
from pipeline.tuning.machine import device_name

_LABELS = {"good": ("fine", "great", "happy"), "bad": ("poor", "awful", "sad")}
_WORDS = ("film", "food", "song", "book", "town", "road", "game", "tale")
T = TypeVar("T")


@dataclass(frozen=True)
class TasksOptions:
    rows: int
    steps: int
    eval_every: int
    live: int
    """Trials at the same time."""


@dataclass(frozen=True)
class ManyTasks:
    """Seconds of each stage for a number of tasks."""

    tasks: int
    settings: float
    plan: float
    """Files, columns and templates are checked, and the plan is printed."""
    first: Mapping[str, float]
    """The first night by its own stages (`night.json`): check, cluster (Ray starts), corpus, tuning with evaluations
    and tests, publish; `rest`: what is in none, such as the progress of the run and the report."""
    unchanged: Mapping[str, float]
    """The next night, in which nothing changed, and which needs no Ray."""
    corpora: float
    """Preparing the unchanged corpora once more, in a process that has read them before."""
    report: float


def measure_many_tasks(counts: Sequence[int], options: TasksOptions, scratch: Path | None) -> list[ManyTasks]:
    """Generate projects of so many tasks below `scratch`, run two nights of each in fresh processes, delete them."""
    figures = []
    for count in counts:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            project = _write_project(Path(folder), count, options)
            settings, plan = _fresh(_plan, project)
            first = _fresh(_night, project, "2026-01-01")
            unchanged = _fresh(_night, project, "2026-01-02")
            corpora, report = _fresh(_again, project, "2026-01-03")
        figures.append(ManyTasks(count, settings, plan, first, unchanged, corpora, report))
    return figures


def save_many_tasks(path: Path, figures: Sequence[ManyTasks], options: TasksOptions) -> None:
    write_figures(path, {"device": device_name(), **asdict(options), "runs": [asdict(run) for run in figures]})


def _fresh(function: Callable[..., T], *args: object) -> T:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as process:
        return process.submit(function, *args).result()


def _write_project(folder: Path, tasks: int, options: TasksOptions) -> Path:
    """A tiny model and corpora of `rows` rows; settings as a file."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    write_checkpoint(LlamaConfig(**sizes, vocab_size=300), folder / "model", torch.float32)
    (folder / "corpora").mkdir()
    for task in range(tasks):
        chance = np.random.default_rng(task)
        labels = chance.choice(list(_LABELS), options.rows)
        deciding = [chance.choice(_LABELS[label]) for label in labels]
        others = chance.choice(_WORDS, (options.rows, 2))
        texts = [f"{one} {word} {two} {task}" for word, (one, two) in zip(deciding, others, strict=True)]
        table = pa.table({"text": texts, "label": labels.tolist()})
        pq.write_table(table, folder / "corpora" / f"task-{task:04d}.parquet")
    settings = {
        "run": {"name": "many", "storage": str(folder / "runs"), "max_live_trials": options.live},
        "model": {"path": str(folder / "model")},
        "cluster": {"num_workers": 1},
        "defaults": {
            "prompt": {"length": 4, "init": "sampled_vocab"},
            "batch_size": 4,
            "max_steps": options.steps,
            "eval_every": options.eval_every,
            "max_input_tokens": 64,
            "max_target_tokens": 16,
        },
        "tasks": {
            f"task-{task:04d}": {"train": str(folder / "corpora" / f"task-{task:04d}.parquet"), "dev_fraction": 0.2}
            for task in range(tasks)
        },
        "bank": {"uri": str(folder / "bank")},
        "refresh": {"cold_side": False},
    }
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def _plan(project: Path) -> tuple[float, float]:
    start = time.perf_counter()
    settings = load_settings(project)
    read = time.perf_counter()
    print_plan(check_run(settings), Console(file=StringIO()))
    return round(read - start, 2), round(time.perf_counter() - read, 2)


def _night(project: Path, date: str) -> dict[str, float]:
    settings = load_settings(project)
    start = time.perf_counter()
    record = run_night(settings, date, Console(file=StringIO()))
    whole = time.perf_counter() - start
    assert record.state == "finished", record.outcome
    assert date == "2026-01-01" or all(task.result == "carried" for task in record.tasks), record.outcome
    stages = {name: round(seconds, 2) for name, seconds in record.stages.items()}
    return {**stages, "rest": round(whole - sum(stages.values()), 2), "whole": round(whole, 2)}


def _again(project: Path, date: str) -> tuple[float, float]:
    settings = night_settings(load_settings(project), date)
    checked = check_run(settings, new_backbone=True)
    folder = Path(settings.run.storage) / f"{settings.run.name}"
    folder.mkdir()
    with EventLog(folder / "events.jsonl") as log:
        start = time.perf_counter()
        read_inputs(checked, folder, log, _no_ray)
        corpora = time.perf_counter() - start
    start = time.perf_counter()
    first = Path(settings.run.storage) / "many-2026-01-01"
    assert render(night_of_record(first, readable_bank(settings.bank), None))
    return round(corpora, 2), round(time.perf_counter() - start, 2)


def _no_ray() -> None:
    raise AssertionError("nothing changed, so nothing is tokenised")
