"""Every error that a user can fix. Its message is one sentence that names the place and the fix.

Each takes a single message, so that it survives pickling between processes.
Any other exception that escapes (`AssertionError` first of all) is a defect of this code.
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


class MissingFileError(BankError):
    """A file that a bank refers to, or that a reader asks for, is not in its store."""


class UnknownNameError(BankError):
    """The bank has no prompt, version or alias of this name, or none can have it."""


class UnknownTaskError(BankError):
    """A service was asked for a prompt, version or alias that its bank does not hold."""


class NoLabelsError(BankError):
    """A prompt that was tuned without a label set was asked to classify."""


class RowTooLongError(CorpusError):
    """A row does not fit into the model's context, or into what the service allows."""


class OverloadedError(PromptBankError):
    """More requests wait than the service allows."""


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
