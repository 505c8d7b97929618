"""What the jobs say on the terminal whatever they do. Imports nothing heavy: a mistyped setting should not wait."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from pipeline.errors import LeaseError, PromptBankError, StorageError, TuningError
from pipeline.settings import Settings
from pipeline.tuning.interruption.supervision import INTERRUPTED

BAD_INPUT = 2
UNDER_WAY = 7


def exit_code_of(error: PromptBankError) -> int:
    """5 for what may go well when it is started again, 7 for what another start does already, 2 for a person's."""
    if isinstance(error, LeaseError):
        return UNDER_WAY
    return INTERRUPTED if isinstance(error, TuningError | StorageError) else BAD_INPUT


@contextmanager
def ending_in_a_sentence(what: str) -> Iterator[None]:
    """Around all that a job does: users' mistakes and Ctrl-C become sentences on stderr and an exit code.

    what: is to be started again, such as "run".
    """
    try:
        yield
    except PromptBankError as error:
        for line in str(error).splitlines():  # each of its sentences on a line of its own
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {line}", markup=False)
        raise typer.Exit(exit_code_of(error)) from error
    except KeyboardInterrupt as error:
        Console(stderr=True).print(f"interrupted: start the same {what} again to resume it")
        raise typer.Exit(INTERRUPTED) from error


def console_for(settings: Settings, console: Console) -> Console:
    """Where people are told of a run: stderr when stdout is for machines, every line of it JSON."""
    return Console(stderr=True, soft_wrap=True, width=120) if settings.tracking.log == "json" else console


def in_rays_copy() -> bool:
    """Whether a submitted job runs here: in a copy of the working directory, which Ray made and deletes."""
    return "_ray_pkg_" in str(Path.cwd())


def warn_of_rays_copy(settings: Settings, console: Console) -> None:
    """Results that are written into the copy are deleted with it."""
    if in_rays_copy() and not (os.path.isabs(settings.run.storage) and os.path.isabs(settings.bank.uri)):
        console.print("warning: run.storage or bank.uri is relative, and Ray deletes this copy of the working folder")
