"""vLLM's real server with the plugin, as a process of its own, from the environment that `make test-vllm` makes."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

PYTHON = Path(__file__).parents[2] / ".venv-vllm/bin/python"
MARKS = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON.exists(), reason="vLLM has an environment of its own: make test-vllm"),
]
BLOCK = 32
LONGEST = 512
_START_S = 600


def environment() -> dict[str, str]:
    return os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}


def start(model: Path, bank: Path, log: Path, port: int, *more: str) -> subprocess.Popen[bytes]:
    """`more` are flags of vLLM, which go before those of the tests."""
    words = ["-m", "vllm.entrypoints.openai.api_server", "--model", model, "--served-model-name", "base"]
    words += ["--enable-prompt-embeds", "--dtype", "float32", "--max-model-len", LONGEST, "--block-size", BLOCK]
    words += ["--enforce-eager", "--enable-prompt-tokens-details", "--max-num-seqs", 32, "--host", "127.0.0.1"]
    variables = {"VLLM_PLUGINS": "promptbank", "PROMPT_BANK_URI": str(bank), "PROMPT_BANK_WATCH_EVERY": "0.5"}
    with log.open("wb") as out:
        return subprocess.Popen(
            [PYTHON, *map(str, words), "--port", str(port), *more],
            env=environment() | variables,
            cwd=log.parent,  # not the repository, whose folders would be found before installed packages
            stdout=out,
            stderr=subprocess.STDOUT,
        )


@contextmanager
def serving(model: Path, bank: Path, log: Path) -> Iterator[httpx.Client]:
    """The server once it answers; it is ended with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start(model, bank, log, port)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            _wait(process, client, log)
            yield client
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait(process: subprocess.Popen[bytes], client: httpx.Client, log: Path) -> None:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        assert process.poll() is None, f"vLLM has ended:\n{log.read_text()[-3000:]}"
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(f"vLLM did not start in {_START_S} s:\n{log.read_text()[-3000:]}")
