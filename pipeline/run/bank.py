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
    """The bank, if it is there already. Raises: BankError when it is damaged, StorageError."""
    uri = settings.bank.uri
    if "://" not in uri and not Path(uri).expanduser().is_dir():  # a check makes no folder
        return None
    return open_bank(settings.bank, create=True)


def check_fit(settings: BankSettings) -> None:
    """Whether the bank can be published to, before anything is trained; a local one's folder is made.

    Raises: BankError when its store cannot keep a bank, StorageError when nothing can be written.
    """
    PromptBank.connect(settings.uri, settings.alias, create=True).check_fit()


def readable_bank(settings: BankSettings) -> PromptBank | None:
    """None where there is none yet, or it cannot be read: what needs it says so itself. Raises: StorageError."""
    with suppress(BankError):
        return open_bank(settings)
    return None
