"""The bank that a run's settings name."""

from pipeline.bank import PromptBank
from pipeline.settings import BankSettings


def open_bank(settings: BankSettings, create: bool = False) -> PromptBank:
    """Raises: BankError, StorageError."""
    return PromptBank.open(
        settings.uri,
        settings.alias,
        create=create,
        trusted_keys=settings.trusted_keys,
        signing_key=settings.signing_key,
    )
