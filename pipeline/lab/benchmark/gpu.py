"""All that the first hour with a GPU should answer, by one command: whether its results are right, and how fast it is.

Sections run one after another in a process of their own, which is ended where a section outlasts its time, and which
another one replaces where a section fails: after an error a GPU may refuse all that this process asks of it. What a
section reports is written at once, so that whatever ends the command, the file has all that was found.
"""

import importlib
import io
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import BackboneError, SettingsError
from pipeline.whole_files import write_atomically

Entry = dict[str, Any]
Status = Literal["done", "failed", "out of time", "not begun"]


@dataclass(frozen=True)
class GpuOptions:
    device: str = "cuda"
    """`cuda`, or `cpu`, where Triton's kernels are left out."""
    minutes: float = 8.5
    """After which the command ends, with what it has until then."""
    sections: tuple[str, ...] = ()
    """Some of `SECTIONS`; none stands for all."""
    data: Path | None = None
    small: bool = False
    """Tiny shapes, to try the command itself."""


@dataclass(frozen=True)
class _Section:
    function: str
    """`module:name`; imported by the process that runs it alone."""
    seconds: float
    """Its part of the time. What a section leaves, the next ones may use."""
    proves: bool = False
    """Whether it must come to its end for results to count as right."""
    alone: bool = False
    """Whether nothing else may run in its process afterwards."""
    takes: tuple[str, ...] = ("device",)
    more: Mapping[str, Any] = field(default_factory=dict)


# Correctness first: figures of a wrong result would be worth nothing.
SECTIONS: dict[str, _Section] = {
    "machine": _Section("gpu_speed:measure_machine", 35),
    "kernels": _Section("gpu_checks:check_kernels", 120, proves=True, takes=("device", "small")),
    "steps": _Section("gpu_steps:check_steps", 60, proves=True),
    "partitioned": _Section(
        "gpu_steps:check_partitioned", 50, proves=True, alone=True, takes=("device", "small")
    ),
    "launches": _Section("gpu_speed:count_launches", 15, takes=()),
    "trials": _Section("gpu_speed:measure_trials", 80, takes=("device", "scale")),
    "llama-7b": _Section(
        "gpu_speed:measure_shape", 45, takes=("device", "scale"), more={"shape": "llama-7b"}
    ),
    "t5-xxl": _Section("gpu_speed:measure_shape", 45, takes=("device", "scale"), more={"shape": "t5-xxl"}),
    "peers": _Section("gpu_speed:compare_peers", 90, alone=True, takes=("device", "scale")),
}  # fmt: skip


def measure_gpu(options: GpuOptions, out: Path, say: Callable[[str], None] = print) -> bool:
    """Run the sections, write `out` after each report, and say what was found; returns whether all of it is right.

    Raises: SettingsError for a section that there is not, BackboneError where PyTorch sees no GPU, StorageError.
    """
    names = options.sections or tuple(SECTIONS)
    if options.device not in ("cuda", "cpu"):
        raise SettingsError(f"--device {options.device}: take cuda or cpu; CUDA_VISIBLE_DEVICES chooses a card")
    for name in names:
        if name not in SECTIONS:
            raise SettingsError(f"--sections {name}: there is no such section; there are {', '.join(SECTIONS)}")
    asked = sum(SECTIONS[name].seconds for name in names)
    found: dict[str, Any] = {"device": options.device, "small": options.small, "passed": False}
    found["sections"] = {name: {"status": "not begun", "seconds": 0.0, "found": []} for name in names}
    started = ends = time.monotonic()
    worker = _Worker(options)
    try:
        for name in names:
            ends += SECTIONS[name].seconds / asked * options.minutes * 60
            _run(worker, name, ends, found["sections"][name], lambda: _write(out, found))
            _add_shares(found["sections"])
            found["passed"] = all(map(_is_right, names, found["sections"].values()))
            found["seconds"] = round(time.monotonic() - started, 1)
            _write(out, found)
            for line in told(name, found["sections"][name]):
                say(line)
    finally:
        worker.end()
    return bool(found["passed"])


def _write(out: Path, found: object) -> None:
    write_atomically(out, (json.dumps(found, indent=1, allow_nan=False) + "\n").encode())


def _is_right(name: str, section: Mapping[str, Any]) -> bool:
    if section["status"] == "out of time":  # what was measured until then is right
        return bool(section["found"]) and not SECTIONS[name].proves
    return bool(section["status"] == "done")


def _run(worker: "_Worker", name: str, ends: float, section: dict[str, Any], write: Callable[[], None]) -> None:
    """Run one section until it ends, or its time does, and keep what it reports in `section`."""
    begun = time.monotonic()
    status, reason = "out of time", None
    for kind, told_of in worker.run(name, ends):
        if kind == "found":
            section["found"].append(told_of)
            section["seconds"] = round(time.monotonic() - begun, 1)
            write()
        else:
            status, reason = ("done", None) if kind == "done" else ("failed", told_of)
    if any(entry.get("passed") is False for entry in section["found"]):
        status, reason = "failed", reason or "some of what was found is wrong"
    section |= {"status": status, "seconds": round(time.monotonic() - begun, 1)}
    if reason:
        section["reason"] = reason


class _Worker:
    """A process that runs sections, and is started anew after one that failed or took too long."""

    def __init__(self, options: GpuOptions) -> None:
        self._options = options
        self._process: Any = None
        self._connection: Connection[Any, Any] | None = None

    def run(self, name: str, ends: float) -> Iterator[tuple[str, Any]]:
        """What a section tells: `("found", entry)` any number of times, then `("done", None)` or `("failed", why)`.

        It stops without either at the time `ends`. Raises: BackboneError where there is no such device.
        """
        if self._process is None:
            self._start()
        assert self._connection is not None
        with suppress(OSError):  # of a process that has ended, which the loop tells
            self._connection.send(name)
        kind = ""
        while kind not in ("done", "failed"):
            if not self._connection.poll(max(0.0, ends - time.monotonic())):
                break
            try:
                kind, told_of = self._connection.recv()
            except (EOFError, OSError):
                self._process.join(10)
                kind, told_of = "failed", f"its process ended with exit code {self._process.exitcode}"
            if kind == "no device":
                raise BackboneError(told_of)
            if kind != "ready":
                yield kind, told_of
        if kind != "done" or SECTIONS[name].alone:
            self.end()

    def _start(self) -> None:
        context = get_context("spawn")
        self._connection, other = context.Pipe()
        self._process = context.Process(target=_work, args=(other, self._options))
        self._process.start()
        other.close()

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = self._connection = None


def _work(connection: "Connection[Any, Any]", options: GpuOptions) -> None:
    """Run the sections that are asked for, and tell what they report."""
    from pipeline.lab.benchmark.ranks import end_with_parent

    end_with_parent()
    # One card, and where a CPU is asked for, none: libraries take what they see.
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    else:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import torch

    if options.device != "cpu" and not torch.cuda.is_available():
        sentence = f"--device {options.device}: PyTorch {torch.__version__} sees no GPU here; --device cpu needs none"
        connection.send(("no device", sentence))
        return
    connection.send(("ready", None))
    while True:
        name = connection.recv()
        try:
            with redirect_stdout(io.StringIO()):  # transformers' Trainer prints every step
                run_section(name, options, lambda entry: connection.send(("found", entry)))
            connection.send(("done", None))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(where.filename).name}:{where.lineno}"
            connection.send(("failed", f"{type(error).__name__}: {str(error)[:1000]} ({place})"))


def run_section(name: str, options: GpuOptions, report: Callable[[Entry], None]) -> None:
    """Run one section in this process."""
    import torch

    from pipeline.lab.benchmark.gpu_speed import Scale

    section = SECTIONS[name]
    module, _, function = section.function.partition(":")
    known = {
        "device": torch.device(options.device),
        "small": options.small,
        "scale": Scale(options.small, options.data),
    }
    given = {key: known[key] for key in section.takes}
    getattr(importlib.import_module(f"pipeline.lab.benchmark.{module}"), function)(
        **given, report=report, **section.more
    )


def _add_shares(sections: Mapping[str, Any]) -> None:
    """To each rate of useful operations, its shares of the peaks that were measured here."""
    peaks = {
        entry["peak"].partition("_")[0]: entry["value"]
        for entry in sections.get("machine", {"found": []})["found"]
        if "value" in entry
    }
    for section in sections.values():
        for entry in section["found"]:
            for kind in ("int8", "bfloat16"):
                if kind in peaks and "useful_operations_a_second" in entry:
                    entry[f"share_of_{kind}_peak"] = entry["useful_operations_a_second"] / peaks[kind]


def told(name: str, section: Mapping[str, Any]) -> list[str]:
    """A section in lines for people."""
    entries: Sequence[Entry] = section["found"]
    lines = [f"{name}: {section['status']} after {section['seconds']:.0f} s"]
    if "reason" in section:
        lines[0] += f" ({section['reason']})"
    checks = [entry for entry in entries if "check" in entry and "passed" in entry]
    if checks:
        wrong = [entry for entry in checks if not entry["passed"]]
        lines.append(f"  {len(checks) - len(wrong)} of {len(checks)} right")
        lines += [f"  WRONG {_told_check(entry)}" for entry in wrong[:20]]
    lines += [f"  {_told_entry(entry)}" for entry in entries if entry not in checks]
    return lines


def _told_check(entry: Entry) -> str:
    if "error" in entry:
        return f"{entry['check']}: {entry['error']}"
    return f"{entry['check']}: {entry['relative']} off, relative, where {entry['bound']} is allowed"


def _told_entry(entry: Entry) -> str:
    def number(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    shown = {key: value for key, value in entry.items() if key not in ("by_name", "facts")}
    shown |= entry.get("facts", {})
    return ", ".join(f"{key} {number(value)}" for key, value in shown.items())
