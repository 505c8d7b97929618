"""The service against an earlier commit of itself: batches in Python, and requests over HTTP.

Each side runs in processes of its own on one thread, from a checkout, and the sides take turns. Both time and CPU time
are told: with other work on the machine, only the latter compares sides.
"""

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from pipeline.backbone.files import find_model
from pipeline.backbone.nearest import read_input_embeddings
from pipeline.bank import Metrics, NewPrompt, PromptBank, Template
from pipeline.errors import SettingsError
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.lab.benchmark.work import read_rows
from pipeline.serving import load_backbone
from pipeline.tuning.machine import device_name

_TIMEOUT = 3600
_COMMON_TOKENS = 5_000
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error"}
# It runs in an earlier checkout, too, and so uses nothing but the public interface of then.
_BATCHES = """
import json, sys, time
import torch
torch.set_num_threads(1)
from pipeline.bank import PromptBank
from pipeline.serving import PromptedModel, load_backbone
given = json.loads(open(sys.argv[1]).read())
model = PromptedModel(load_backbone(given["model"], **given["options"]), PromptBank.open(given["bank"]))
found = []
for kind, texts, tasks, tokens in given["batches"]:
    ask = model.classify if kind == "classify" else lambda t, n: model.generate(t, n, tokens)
    ask(texts[:8], tasks[:8])  # settles
    wall, cpu = time.perf_counter(), time.process_time()
    answers = ask(texts, tasks)
    found.append([time.perf_counter() - wall, time.process_time() - cpu, answers])
open(sys.argv[2], "w").write(json.dumps(found))
"""


@dataclass(frozen=True)
class BatchFigures:
    """One batch on every side; seconds of each round."""

    name: str
    seconds: dict[str, list[float]]
    cpu_seconds: dict[str, list[float]]
    ratios: dict[str, float]
    """How many times as much CPU time as the first side each takes; the median over rounds."""
    alike: dict[str, float]
    """Share of rows that each answers as the first side does: the likeliest label, or the text."""


@dataclass(frozen=True)
class HttpFigures:
    """Requests of one row, from clients that each wait for their answer."""

    side: str
    kind: str
    requests: int
    failed: int
    rate: float
    """Requests a second."""
    p50: float
    """Seconds."""
    p99: float
    cpu_per_request: float
    """CPU seconds of the service's processes, by request."""


@dataclass(frozen=True)
class ServingFigures:
    device: str
    model: str
    length: int
    clients: int
    batches: list[BatchFigures]
    http: list[HttpFigures]


@dataclass(frozen=True)
class ServingOptions:
    model: str
    length: int
    counts: Sequence[int]
    """Rows of the batches."""
    tokens: int
    """Of an answer, at most."""
    rounds: int
    clients: int
    seconds: float
    """Of load over HTTP on each side; 0 leaves it out."""


@dataclass(frozen=True)
class _Side:
    checkout: Path
    options: Mapping[str, str]
    service: Sequence[str] = ()
    """Further options of `jobs/serve_prompts.py`."""


def compare_serving(
    data: Path, names: Sequence[str], earlier: Path | None, options: ServingOptions, bank: str | None = None
) -> ServingFigures:
    """Rows of the data's dev or test splits, behind the prompts of `bank`, or untuned ones.

    Raises: SettingsError for a folder without this project's code; CorpusError.
    """
    if earlier is not None and not (earlier / "pipeline").is_dir():
        raise SettingsError(f"{earlier} holds no checkout of this project; make one: git worktree add FOLDER COMMIT")
    here = Path(__file__).resolve().parents[3]
    sides = {"now": _Side(here, {}), "now, exact products": _Side(here, {"products": "exact"})}
    if earlier is not None:
        sides["earlier"] = _Side(earlier.resolve(), {})
    with tempfile.TemporaryDirectory() as folder:
        held = {name: _some_rows(data / name, max(options.counts)) for name in names}
        bank = bank or _untuned_bank(Path(folder) / "bank", options, {name: set(of[1]) for name, of in held.items()})
        rows = [
            (held[name][0][i], name) for i in range(max(options.counts)) for name in names if i < len(held[name][0])
        ]
        batches = _compare_batches(sides, bank, rows, options)
        served = {name: side for name, side in sides.items() if not side.options}
        served["now, without Ray"] = _Side(here, {}, ("--set", "ray=false"))
        http = [
            _under_load(name, side, bank, rows, options, kind)
            for kind in ("classify", "generate")
            for name, side in served.items()
            if options.seconds
        ]
    return ServingFigures(device_name(), options.model, options.length, options.clients, batches, http)


def save_serving(path: Path, figures: ServingFigures) -> None:
    write_figures(path, asdict(figures))


def serving_tables(figures: ServingFigures) -> list[Table]:
    """Batches, and requests over HTTP."""
    batches = Table(title=f"batches ({figures.device}, one thread)", title_justify="left")
    for column in ["", "side", "s", "CPU s", "times the CPU of the first", "answered alike"]:
        batches.add_column(column)
    for batch in figures.batches:
        for side in batch.seconds:
            times = [", ".join(f"{s:.1f}" for s in of[side]) for of in (batch.seconds, batch.cpu_seconds)]
            batches.add_row(batch.name, side, *times, f"{batch.ratios[side]:.2f}", f"{batch.alike[side]:.1%}")
    http = Table(title=f"over HTTP, {figures.clients} clients, one row a request", title_justify="left")
    for column in ["", "side", "requests/s", "p50, s", "p99, s", "CPU s a request", "failed"]:
        http.add_column(column)
    for of in figures.http:
        numbers = (f"{of.rate:.2f}", f"{of.p50:.2f}", f"{of.p99:.2f}", f"{of.cpu_per_request:.3f}", str(of.failed))
        http.add_row(of.kind, of.side, *numbers)
    return [batches, http]


def _some_rows(folder: Path, rows: int) -> tuple[list[str], list[str]]:
    split = "dev" if (folder / "dev.parquet").exists() else "test"
    return read_rows(folder / f"{split}.parquet", rows)


def _untuned_bank(folder: Path, options: ServingOptions, labels: Mapping[str, set[str]]) -> str:
    """A prompt of words of the vocabulary for each task."""
    table = read_input_embeddings(find_model(options.model))
    prompts = []
    for number, (name, of_task) in enumerate(labels.items()):
        draw = np.random.default_rng(number).choice(min(_COMMON_TOKENS, len(table)), options.length, replace=False)
        prompts.append(
            NewPrompt(
                name=name,
                array=table[draw].float().numpy(),
                task=name,
                template=Template(input="{text}", target="{label}", separator=" "),
                labels=sorted(of_task),
                metric="accuracy",
                metrics=Metrics(),
                initialisation="vocab",
                length=options.length,
                steps=0,
                seed=number,
                corpus_digest="0" * 64,
                settings_digest="0" * 64,
            )
        )
    identity = load_backbone(options.model).identity
    PromptBank.open(folder, create=True).publish(prompts, identity, "benchmark", {}, "latest")
    return str(folder)


def _compare_batches(
    sides: Mapping[str, _Side], bank: str, rows: Sequence[tuple[str, str]], options: ServingOptions
) -> list[BatchFigures]:
    work = [
        (kind, [text for text, _ in rows[:count]], [task for _, task in rows[:count]], options.tokens)
        for kind, counts in (("classify", options.counts), ("generate", options.counts[:1]))
        for count in counts
    ]
    done: dict[str, list[list[Any]]] = {name: [] for name in sides}
    for _ in range(options.rounds):
        for name, side in sides.items():
            done[name].append(_run_batches(side, bank, work, options.model))
    figures = []
    for i, (kind, texts, *_) in enumerate(work):
        wall, cpu = ({name: [run[i][j] for run in runs] for name, runs in done.items()} for j in (0, 1))
        chosen = {name: [_chosen(answer) for answer in runs[0][i][2]] for name, runs in done.items()}
        first = next(iter(sides))
        figures.append(
            BatchFigures(
                f"{kind} {len(texts)} rows" + (f", {options.tokens} tokens" if kind == "generate" else ""),
                {name: [round(s, 2) for s in of] for name, of in wall.items()},
                {name: [round(s, 2) for s in of] for name, of in cpu.items()},
                {n: statistics.median(b / a for a, b in zip(cpu[first], of, strict=True)) for n, of in cpu.items()},
                {
                    n: float(np.mean([a == b for a, b in zip(chosen[first], of, strict=True)]))
                    for n, of in chosen.items()
                },
            )
        )
    return figures


def _share_alike(one: Sequence[str], other: Sequence[str]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def _chosen(answer: Any) -> str:
    return str(max(answer, key=answer.__getitem__) if isinstance(answer, dict) else answer)


def _run_batches(side: _Side, bank: str, work: Sequence[Any], model: str) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        script, given, out = (Path(folder) / name for name in ("side.py", "given.json", "out.json"))
        script.write_text(_BATCHES)
        given.write_text(json.dumps({"model": model, "bank": bank, "options": dict(side.options), "batches": work}))
        command = [sys.executable, str(script), str(given), str(out)]
        subprocess.run(command, env=_environment(side), cwd=side.checkout, check=True, timeout=_TIMEOUT)
        found: list[Any] = json.loads(out.read_text())
        return found


def _environment(side: _Side) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return {**kept, **_ONE_THREAD, "PYTHONPATH": str(side.checkout)}


def _under_load(
    name: str, side: _Side, bank: str, rows: Sequence[tuple[str, str]], options: ServingOptions, kind: str
) -> HttpFigures:
    """A closed loop: each client sends its next request when it has its answer."""
    taken: list[float] = []
    failed: list[int] = []
    with _served(side, bank, options.model) as (port, cpu_seconds):
        ask = Client(port, kind, rows, options.tokens)
        ask.until(time.monotonic() + min(5.0, options.seconds), 0, [], [])  # settles
        before, start = cpu_seconds(), time.monotonic()
        until = start + options.seconds
        threads = [
            threading.Thread(target=ask.until, args=(until, i * 37, taken, failed)) for i in range(options.clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall, cpu = time.monotonic() - start, cpu_seconds() - before
    p50, p99 = (float(np.quantile(taken, q)) for q in (0.5, 0.99))
    return HttpFigures(name, kind, len(taken), sum(failed), len(taken) / wall, p50, p99, cpu / len(taken))


@dataclass(frozen=True)
class Client:
    """Sends one row a request, over one connection."""

    port: int
    kind: str
    rows: Sequence[tuple[str, str]]
    tokens: int

    def until(self, deadline: float, first: int, taken: list[float], failed: list[int]) -> None:
        """Ask until the deadline, from row `first` on; seconds go to `taken`, and 1 to `failed` for each failure."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        number = first
        while time.monotonic() < deadline:
            text, task = self.rows[number % len(self.rows)]
            number += 1
            body: dict[str, Any] = {"rows": [{"task": task, "text": text}]}
            if self.kind == "generate":
                body["max_new_tokens"] = self.tokens
            start = time.monotonic()
            try:
                connection.request("POST", f"/v1/{self.kind}", json.dumps(body), {"content-type": "application/json"})
                reply = connection.getresponse()
                reply.read()
                wrong = reply.status != 200
            except (OSError, http.client.HTTPException):
                wrong = True
                connection.close()
            taken.append(time.monotonic() - start)
            failed.append(int(wrong))
        connection.close()


@contextmanager
def _served(side: _Side, bank: str, model: str) -> Iterator[tuple[int, Any]]:
    """A service of one replica: its port, and a function that tells the CPU seconds of all its processes."""
    import psutil

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "jobs/serve_prompts.py", "--bank", bank, "--model", model, "--port", str(port)]
    command += side.service
    process = subprocess.Popen(
        command, cwd=side.checkout, env=_environment(side), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving"), line
        root = psutil.Process(process.pid)

        def cpu_seconds() -> float:
            total = 0.0
            for one in (root, *root.children(recursive=True)):
                try:
                    times = one.cpu_times()
                except psutil.NoSuchProcess:
                    continue
                total += times.user + times.system
            return total

        yield port, cpu_seconds
    finally:
        process.terminate()
        process.wait(300)
