"""What the routes need of a service, whatever runs it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol

from pipeline.bank import Snapshot
from pipeline.errors import RowTooLongError
from pipeline.serving.bank_tasks import BankTasks
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
    """What the routes need of a service; `app.PromptService` is one on Ray Serve."""

    settings: ServiceSettings
    metrics: ServiceMetrics
    tasks: BankTasks

    def snapshot(self) -> Snapshot:
        """The version that is served. Raises: BankError when none can be served."""

    def watch_error(self) -> str | None:
        """Why the bank cannot be followed at present, None while it can."""

    async def complete(self, request: Request) -> VersionedAnswers[Completion]:
        """An answer to each row. Raises: as `PromptedModel.generate`, OverloadedError."""

    async def classify(self, request: Request) -> VersionedAnswers[dict[str, float]]:
        """Each row's score of every label, in nats. Raises: as `PromptedModel.classify`, OverloadedError."""


def check_size(settings: ServiceSettings, rows: int, tokens: int, setting: str) -> None:
    """Raises: RowTooLongError when a request has more rows, or asks by `setting` for more tokens, than are allowed."""
    if rows > settings.max_rows:
        raise RowTooLongError(f"the request has {rows} rows where {settings.max_rows} are allowed; send them in parts")
    if tokens > settings.max_new_tokens:
        raise RowTooLongError(f"{setting} is {tokens} where {settings.max_new_tokens} are allowed; ask for fewer")
