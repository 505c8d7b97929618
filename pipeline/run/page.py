"""`report.html` in the folder of a run or a night, for people."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from pipeline.reporting.html import NightReport, render
from pipeline.whole_files import write_atomically


def write_report(folder: Path, report: Callable[[], NightReport], console: Console, whose: str) -> Path | None:
    """Write the page and say where it is; where that cannot be done, a warning is all."""
    path = folder / "report.html"
    try:
        write_atomically(path, render(report()).encode())
    except Exception as error:  # not even a defect of ours in making it changes how a run or a night has ended
        console.print(f"warning: the {whose}'s report was not written: {error}", markup=False, highlight=False)
        return None
    return path
