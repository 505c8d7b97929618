"""Completions in a shell: names, versions and aliases of the bank that the command line names so far."""

import logging
import os
from collections.abc import Callable

import typer

from pipeline.bank import PromptBank
from pipeline.errors import PromptBankError


def references(context: typer.Context, incomplete: str) -> list[str]:
    """Names of prompts and, after an @, aliases and versions."""
    name, at, _ = incomplete.partition("@")
    if at:
        return [f"{name}@{revision}" for revision in revisions(context, "")]
    return _offered(context, _names)


def revisions(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, lambda bank: [*bank.aliases(), *map(str, bank.versions()[::-1])])


def aliases(context: typer.Context, incomplete: str) -> list[str]:
    return _offered(context, lambda bank: list(bank.aliases()))


def _names(bank: PromptBank) -> list[str]:
    bank.refresh()
    return list(bank.names())


def _offered(context: typer.Context, offer: Callable[[PromptBank], list[str]]) -> list[str]:
    """No completions and no message when the bank cannot be read; the command itself will say why."""
    uri = context.params.get("bank") or os.environ.get("PROMPT_BANK_URI")
    alias = context.params.get("alias") or os.environ.get("PROMPT_BANK_ALIAS") or "latest"
    logging.disable()
    try:
        return offer(PromptBank.connect(uri, alias)) if uri else []
    except PromptBankError:
        return []
    finally:
        logging.disable(logging.NOTSET)
