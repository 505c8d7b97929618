"""`report.html` in a night's folder: what its record, its events and the bank tell, for people."""

from contextlib import suppress
from pathlib import Path

from rich.console import Console

from pipeline.bank import PromptBank
from pipeline.errors import BankError
from pipeline.reporting.html import render
from pipeline.reporting.html.from_record import night_of_record
from pipeline.run.bank import open_bank
from pipeline.settings import Settings
from pipeline.tuning.checkpoint import write_atomically

PAGE = "report.html"


def leave_page(folder: Path, settings: Settings, console: Console) -> None:
    """Write the page of a night, also of one that failed; where that cannot be done, a warning is all."""
    try:
        report = night_of_record(folder, _bank(settings), settings.cluster.price_per_rank_hour)
        write_atomically(folder / PAGE, render(report).encode())
    except Exception as error:  # even a defect of ours must not change how a night has ended
        console.print(f"warning: the night's report was not written: {error}", markup=False, highlight=False)


def _bank(settings: Settings) -> PromptBank | None:
    """None where there is none yet, or it cannot be read: the night's own sentence says so."""
    with suppress(BankError):
        return open_bank(settings.bank)
    return None
