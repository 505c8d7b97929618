import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pipeline.bank import Metrics, PromptBank
from pipeline.cli.app import app
from tests.bank.conftest import make_prompt, publish

ROOT = Path(__file__).resolve().parents[2]
VARIABLES = ("PROMPT_BANK_URI", "PROMPT_BANK_ALIAS", "PROMPT_BANK_TRUSTED_KEYS", "PROMPT_BANK_SIGNING_KEY")
COMMAND = [sys.executable, "-m", "pipeline.cli.main"]


def environment(**changes: str) -> dict[str, str]:
    """That of this process, without what would change the commands' output."""
    ours = {key: value for key, value in os.environ.items() if key not in (*VARIABLES, "NO_COLOR", "FORCE_COLOR")}
    return {**ours, **changes}


def start(*arguments: object, **changes: str) -> subprocess.CompletedProcess[str]:
    """The command as a process of its own, its output in pipes."""
    words = [*COMMAND, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment(**changes), check=False)


@pytest.fixture
def uri(tmp_path: Path) -> Path:
    """A bank of three versions: latest is at 3, prod at 1."""
    uri = tmp_path / "prompts"
    bank = PromptBank.open(uri, create=True)
    publish(bank, make_prompt("sst2", 1), make_prompt("trec", 2))
    bank.promote(1, "prod", by="alice")
    failed = make_prompt("cr", array=None, status="failed", reason="column 'label' is missing", metrics=Metrics())
    tested = Metrics(dev_before=0.5, dev_after=0.94, test=0.91)
    publish(bank, make_prompt("sst2", 3, metrics=tested, labels=["no", "yes"]), failed)
    worse = make_prompt("trec", array=None, status="kept", reason="no step was better")
    bank.publish(
        [make_prompt("cr", 5, labels=None, metric="exact_match"), worse],
        bank.manifest(2).backbone.model_copy(update={"model": "another name for it"}),
        run="weekly",
        libraries={"numpy": "3", "torch": "2"},
        alias="latest",
    )
    return uri


@pytest.fixture
def run(uri: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Runs a command in this process on the bank of three versions: (exit code, stdout, stderr)."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def run(*arguments: object, bank: object = uri) -> tuple[int, str, str]:
        words = [*map(str, arguments), *(["--bank", str(bank)] if bank else [])]
        result = CliRunner().invoke(app, words, prog_name="promptbank")
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def document(run: Callable[..., Any]) -> Callable[..., Any]:
    """What a command prints with --json, which is fine unless another exit code is expected."""

    def document(*arguments: object, code: int = 0, **options: object) -> Any:
        found, stdout, stderr = run(*arguments, "--json", **options)
        assert (found, stderr) == (code, "")
        return json.loads(stdout)

    return document


@pytest.fixture
def refusal(run: Callable[..., Any]) -> Callable[..., str]:
    """The sentence with which a command refuses what the user asked for."""

    def refusal(*arguments: object, **options: object) -> str:
        code, stdout, stderr = run(*arguments, **options)
        assert (code, stdout, stderr.count("\n")) == (2, "", 1), (code, stdout, stderr)
        assert stderr.startswith("error: ")
        return stderr.removeprefix("error: ").rstrip("\n")

    return refusal
