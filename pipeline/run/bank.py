"""The bank that a run's settings name."""

from contextlib import suppress
from pathlib import Path

from pipeline.bank import PromptBank
from pipeline.errors import BankError
from pipeline.settings import BankSettings, Settings


def open_bank(settings: BankSettings, create: bool = False) -> PromptBank:
    """Raises: BankError, StorageError."""
    return PromptBank.open(
        settings.uri,
        settings.alias,
        create=create,
        trusted_keys=settings.trusted_keys,
        signing_key=settings.signing_key,
    )


def find_bank(settings: Settings) -> PromptBank | None:
    """The bank of a run, None when there is none yet. Raises: BankError when it is damaged, StorageError."""
    uri = settings.bank.uri
    if "://" not in uri and not Path(uri).expanduser().is_dir():  # a check makes no folder
        return None
    return open_bank(settings.bank, create=True)


def check_fit(settings: BankSettings) -> None:
    """Check, before anything is trained, that the bank can be published to; a local one's folder is made.

    Raises: BankError when its store cannot keep a bank, StorageError when nothing can be written.
    """
    PromptBank.connect(settings.uri, settings.alias, create=True).check_fit()


def readable_bank(settings: BankSettings) -> PromptBank | None:
    """The bank for a report; None when there is none yet or it cannot be read. Raises: StorageError."""
    with suppress(BankError):
        return open_bank(settings)
    return None
