#!/usr/bin/env python
"""Serve the prompts of a bank over HTTP: one frozen model, rows of all tasks in the same batches.

    python jobs/serve_prompts.py --bank quickstart/bank --model smollm2-135m
    curl localhost:8000/v1/classify -H 'content-type: application/json' \
         -d '{"rows": [{"task": "sentiment", "text": "wonderful"}]}'

The service follows the bank's alias, and takes a new version without dropping a request. On SIGINT or
SIGTERM it finishes the requests that it has and ends. Beyond 127.0.0.1 it listens only for callers with a token, which
PROMPT_BANK_TOKEN or --token-file names. It joins the Ray cluster at RAY_ADDRESS, or starts a Ray of its own. With
--set ray=false one replica answers without Ray, which costs far less a request. Exit codes: 0 ended by a signal, 2 bad
input.
"""

import logging
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer
from rich.console import Console

from pipeline.errors import PromptBankError, SettingsError


def main(
    bank: Annotated[str, typer.Option(help="The bank's folder or object store.")],
    model: Annotated[str, typer.Option(help="The backbone that the prompts were tuned on.")] = "smollm2-135m",
    alias: Annotated[str, typer.Option(help="The alias to serve and follow.")] = "latest",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    replicas: Annotated[int, typer.Option(help="Copies of the model.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    token_file: Annotated[
        str | None, typer.Option(help="File of the tokens that are let in, one a line; else PROMPT_BANK_TOKEN is.")
    ] = None,
    no_authentication: Annotated[
        bool, typer.Option("--no-authentication", help="Let everybody in who reaches the service.")
    ] = False,
    watch_every: Annotated[float, typer.Option(help="Seconds between two checks of the alias.")] = 10.0,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Another setting: max_rows=64 (pipeline/serving/service_settings.py). Repeatable."),
    ] = None,
) -> None:
    """Serve the prompts of a bank over HTTP until SIGINT or SIGTERM."""
    console = Console(soft_wrap=True, highlight=False)
    given = {
        "bank": bank, "model": model, "alias": alias, "replicas": replicas, "device": device,
        "watch_every": watch_every, "token_file": token_file, "no_authentication": no_authentication,
    }  # fmt: skip
    try:
        _serve(given | _parsed(overrides or []), host, port, console)
    except PromptBankError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        raise typer.Exit(2) from error


def _parsed(overrides: list[str]) -> dict[str, str]:
    broken = [override for override in overrides if "=" not in override]
    if broken:
        raise SettingsError(f"--set {broken[0]}: write key=value")
    return {key.strip(): value for key, _, value in (override.partition("=") for override in overrides)}


def _serve(given: dict[str, Any], host: str, port: int, console: Console) -> None:
    # Imported late: torch and Ray take seconds, and a mistyped option should not wait.
    from pipeline.backbone.files import find_model, read_config
    from pipeline.bank import PromptBank
    from pipeline.serving.service_settings import make_settings

    settings = make_settings(given)
    bank = PromptBank.open(settings.bank, settings.alias, trusted_keys=settings.trusted_keys)
    read_config(find_model(settings.model))

    if settings.ray:
        from pipeline.serving.app import serving
    else:
        from pipeline.serving.alone import serving_alone as serving

        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
        logging.getLogger("ray.serve").setLevel(logging.INFO)  # the replica's own log, which Serve keeps in a file

    stop = threading.Event()
    with serving(settings, host, port):
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: Ray sets handlers of its own
            signal.signal(number, lambda *_: stop.set())
        console.print(f"Serving version {bank.version} of {bank.uri} at http://{host}:{port} (docs at /docs).")
        stop.wait()
        console.print("Ending: requests that are here are finished first.")


if __name__ == "__main__":
    typer.run(main)
