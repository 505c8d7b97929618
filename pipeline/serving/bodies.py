"""What goes over the wire: the bodies of requests and replies, from which OpenAPI is made."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.serving.requests import Request, Text


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class RowBody(_Asked):
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


class ClassifyBody(_Asked):
    rows: Annotated[list[RowBody], Field(min_length=1)]

    def request(self) -> Request:
        return Request([row.content() for row in self.rows], [row.task for row in self.rows])


class GenerateBody(ClassifyBody):
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    """Longest answer, in tokens."""

    def request(self) -> Request:
        return Request([row.content() for row in self.rows], [row.task for row in self.rows], self.max_new_tokens)


class _Told(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class Generated(_Told):
    task: str
    text: str


class GenerateReply(_Told):
    version: int
    """Of the bank, which answered all rows whose task names no revision of its own."""
    rows: list[Generated]
    """In the order of the request."""


class Classified(_Told):
    task: str
    label: str
    """The most likely one."""
    log_likelihoods: dict[str, float]
    """log P(label | prompt, input) of every label, in nats."""


class ClassifyReply(_Told):
    version: int
    """Of the bank, which answered all rows whose task names no revision of its own."""
    rows: list[Classified]
    """In the order of the request."""


class TaskTold(_Told):
    name: str
    columns: list[str]
    """What a row must give."""
    labels: list[str] | None
    """What `classify` chooses from; null for a task that is only generated."""
    metric: str
    prompt_length: int
    """Tokens."""


class TasksReply(_Told):
    version: int
    tasks: list[TaskTold]


class Health(_Told):
    version: int
    """Of the bank, as it is served."""
    watch_error: str | None
    """Why a newer version is not served; null while all is well."""


class Failure(_Told):
    error: str
    """One sentence."""
