"""Every error that a user can mend: one sentence that names the place and the mend.

Each takes a single message, so that it survives pickling between processes.
Anything else that escapes (`AssertionError` first of all) is a defect of ours.
"""


class PromptBankError(Exception):
    """Root of the tree; `str(error)` is the sentence shown to the user."""


class SettingsError(PromptBankError, ValueError):
    """A setting is unknown, missing, of the wrong type, or contradicts another."""


class CorpusError(PromptBankError, ValueError):
    """A corpus cannot be read or does not fit its task's template or labels."""


class BackboneError(PromptBankError, ValueError):
    """A model folder, file or hub name cannot serve as the frozen model."""


class BankError(PromptBankError, ValueError):
    """A prompt bank is missing, damaged, or belongs to another backbone."""


class StorageError(PromptBankError, OSError):
    """A place could not be written or read: the disk is full, permission is missing, a store is gone."""


class UnreachableError(StorageError):
    """A store does not answer, or says that it cannot now: the same may well succeed a little later."""


class LeaseError(PromptBankError, RuntimeError):
    """Another start of the same run or night holds its lease, or has taken it over."""


class TuningError(PromptBankError, RuntimeError):
    """The run itself could not go on: workers lost too often, or no trial left."""


class DivergedError(TuningError):
    """A training left the range of numbers; another rate may not."""
