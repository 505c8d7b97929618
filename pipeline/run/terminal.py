"""What the jobs say on the terminal whatever they do. Imports nothing heavy: a mistyped setting should not wait."""

import os
from pathlib import Path

from rich.console import Console

from pipeline.errors import PromptBankError
from pipeline.settings import Settings


def print_error(error: PromptBankError) -> None:
    """Each of its sentences on a line of its own, to stderr."""
    for line in str(error).splitlines():
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {line}", markup=False)


def in_rays_copy() -> bool:
    """Whether a submitted job runs here: in a copy of the working directory, which Ray made and deletes."""
    return "_ray_pkg_" in str(Path.cwd())


def warn_of_rays_copy(settings: Settings, console: Console) -> None:
    """Results that are written into the copy are deleted with it."""
    if in_rays_copy() and not (os.path.isabs(settings.run.storage) and os.path.isabs(settings.bank.uri)):
        console.print("warning: run.storage or bank.uri is relative, and Ray deletes this copy of the working folder")
