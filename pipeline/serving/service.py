"""What the routes need of a service, whatever runs it."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Generic, Protocol

from pipeline.bank import Prompt, Snapshot
from pipeline.errors import RowTooLongError
from pipeline.serving.bank_tasks import BankTasks
from pipeline.serving.model_loop import Piece
from pipeline.serving.prompted_model import Answer, Completion
from pipeline.serving.requests import Request
from pipeline.serving.service_metrics import ServiceMetrics
from pipeline.serving.service_settings import ServiceSettings


@dataclass(frozen=True)
class VersionedAnswers(Generic[Answer]):
    """Answers to one request, and the version of the bank that they come from."""

    version: int
    answers: Sequence[Answer]


class Service(Protocol):
    """What the routes need of a service; `replica.Replica` is one."""

    settings: ServiceSettings
    metrics: ServiceMetrics
    tasks: BankTasks

    def snapshot(self) -> Snapshot:
        """The version that is served. Raises: BankError when none can be served."""

    def watch_error(self) -> str | None:
        """Why the bank cannot be followed at present, None while it can."""

    def admitted(self) -> AbstractContextManager[None]:
        """Stands around all that a request waits for. Raises: OverloadedError when too many wait."""

    async def find(self, task: str) -> tuple[Prompt, Snapshot]:
        """As `BankTasks.find`, which may wait for the bank's store."""

    async def complete(self, request: Request) -> VersionedAnswers[Completion]:
        """An answer to each row. Raises: as `PromptedModel.generate`."""

    def stream(self, request: Request) -> AsyncGenerator[Piece]:
        """The same in pieces, as the answers are written. Raises: as `complete`."""

    async def classify(self, request: Request) -> VersionedAnswers[dict[str, float]]:
        """Each row's score of every label, in nats. Raises: as `PromptedModel.classify`."""


def check_size(settings: ServiceSettings, rows: int, tokens: int, setting: str) -> None:
    """Raises: RowTooLongError when a request has more rows, or asks by `setting` for more tokens, than are allowed."""
    if rows > settings.max_rows:
        raise RowTooLongError(f"the request has {rows} rows where {settings.max_rows} are allowed; send them in parts")
    if tokens > settings.max_new_tokens:
        raise RowTooLongError(f"{setting} is {tokens} where {settings.max_new_tokens} are allowed; ask for fewer")
