"""The bodies of requests and replies, from which the OpenAPI document is made."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.serving.requests import Request, Text


class _RequestBody(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RowBody(_RequestBody):
    """One row: a task, and either a text or its columns."""

    task: str
    """`name`, or one version of it: `name@3`, `name@alias`."""
    text: str | None = None
    """For a task whose template has one column."""
    columns: dict[str, str | int | float | bool] | None = None
    """The columns that the task's template names; see /v1/tasks."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "RowBody":
        if (self.text is None) == (self.columns is None):
            raise ValueError("give either text or columns")
        return self

    def content(self) -> Text:
        return self.text if self.columns is None else self.columns  # type: ignore[return-value]


class ClassifyBody(_RequestBody):
    rows: Annotated[list[RowBody], Field(min_length=1)]

    def request(self) -> Request:
        return Request([row.content() for row in self.rows], [row.task for row in self.rows])


class GenerateBody(ClassifyBody):
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer, in tokens."""

    def request(self) -> Request:
        return Request([row.content() for row in self.rows], [row.task for row in self.rows], self.max_new_tokens)


class _ReplyBody(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Generated(_ReplyBody):
    task: str
    text: str


class GenerateReply(_ReplyBody):
    version: int
    """Version of the bank that answered all rows whose task names no revision."""
    rows: list[Generated]
    """In the order of the request."""


class Classified(_ReplyBody):
    task: str
    label: str
    """The most likely one."""
    log_likelihoods: dict[str, float]
    """log P(label | prompt, input) of every label, in nats. Where the prompt's record says so, it is the mean over the
    label's tokens, less the label's offset."""


class ClassifyReply(_ReplyBody):
    version: int
    """Version of the bank that answered all rows whose task names no revision."""
    rows: list[Classified]
    """In the order of the request."""


class TaskTold(_ReplyBody):
    name: str
    columns: list[str]
    """The columns that a row must have."""
    labels: list[str] | None
    """The labels that `classify` chooses from; null for a task that can only generate."""
    metric: str
    prompt_length: int
    """Tokens."""


class TasksReply(_ReplyBody):
    version: int
    tasks: list[TaskTold]


class Health(_ReplyBody):
    version: int
    """Version of the bank that is served."""
    watch_error: str | None
    """Why the bank cannot be followed; null while it can."""


class Failure(_ReplyBody):
    error: str
    """One sentence."""
