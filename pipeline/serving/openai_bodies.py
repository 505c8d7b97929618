"""The bodies of OpenAI's routes: what a client may send for a task, and what it gets."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from pipeline.serving.bank_tasks import refuse_settings

_WITHOUT_EFFECT = {
    "n": 1,
    "best_of": 1,
    "temperature": 0,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
    "logit_bias": {},
    "logprobs": False,
    "top_logprobs": 0,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "skip_special_tokens": True,
    "tools": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
"""Settings that would change a greedy answer, and the value with which they do not."""
_MOST_STOPS, _LONGEST_STOP = 16, 256
"""Texts and characters, for every answer is searched for all of them."""


class _AskedBody(BaseModel):
    """What completions and chats have in common. Null is as good as leaving a setting out."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    model: str
    """A task: `name`, or one version of it: `name@3`, `name@alias`."""
    stream: bool | None = None
    """Whether the reply comes as events, each with a piece of a row's answer as soon as it is written."""
    stream_options: "StreamOptions | None" = None
    stop: str | list[str] | None = None
    """An answer ends before the first of these that it has: at most 16 texts of at most 256 characters."""

    n: Any = None
    """One answer a row: 1."""
    best_of: Any = None
    temperature: Any = None
    """Answers are greedy: 0."""
    presence_penalty: Any = None
    frequency_penalty: Any = None
    repetition_penalty: Any = None
    logit_bias: Any = None
    logprobs: Any = None
    top_logprobs: Any = None
    min_tokens: Any = None
    ignore_eos: Any = None
    stop_token_ids: Any = None
    include_stop_str_in_output: Any = None
    skip_special_tokens: Any = None
    response_format: Any = None
    echo: Any = None
    """Refused, as all that follow up to `use_beam_search`: a soft prompt has no text."""
    suffix: Any = None
    prompt_logprobs: Any = None
    prompt_embeds: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: Any = None

    top_p: float | None = None
    """Changes no greedy answer, as all that follow."""
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    user: str | None = None
    metadata: Any = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    priority: int | None = None

    @field_validator(*_WITHOUT_EFFECT, check_fields=False)
    @classmethod
    def _changes_nothing(cls, value: Any, info: ValidationInfo) -> Any:
        allowed = _WITHOUT_EFFECT[str(info.field_name)]
        # 0 is False to Python, and asks for one log-probability here.
        if value is not None and (value != allowed or isinstance(value, bool) != isinstance(allowed, bool)):
            raise ValueError(
                "this service gives one greedy answer to a row and cannot do this: leave it out, or set it to "
                f"{json.dumps(allowed)}"
            )
        return value

    @field_validator("stop")
    @classmethod
    def _has_text(cls, value: str | list[str] | None) -> str | list[str] | None:
        texts = [value] if isinstance(value, str) else value or []
        if "" in texts:
            raise ValueError("an empty text would end every answer before it began: leave it out")
        if len(texts) > _MOST_STOPS or any(len(text) > _LONGEST_STOP for text in texts):
            allowed = f"{_MOST_STOPS} texts of at most {_LONGEST_STOP} characters each are allowed"
            raise ValueError(f"{allowed}: send fewer, or shorter ones")
        return value

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def refuse(self) -> None:
        """Raises: CorpusError when a setting asks for the text of a prompt that has none."""
        refuse_settings(lambda name: getattr(self, name, None))


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    include_usage: bool | None = None
    """Whether a last event tells the tokens of all rows."""
    include_obfuscation: bool | None = None


class CompletionBody(_AskedBody):
    prompt: Any
    """A row's text, or a list of rows. Where the task's template has several columns, a row is JSON in text."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer, in tokens; 16 unless it is set."""


class ChatBody(_AskedBody):
    messages: list["Message"]
    """One message of the role `user` with a row, as `prompt` has it."""
    max_tokens: int | None = Field(default=None, ge=1)
    """Longest answer, in tokens; as many as fit and the service allows, unless it is set."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of `max_tokens`, before which it goes."""

    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: Any = None
    modalities: Any = None


class Message(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    role: str
    content: "str | list[Part] | None" = None


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", use_attribute_docstrings=True)

    type: str
    text: str | None = None


class Usage(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    prompt_tokens: int
    """Of all rows, each with its soft prompt."""
    completion_tokens: int
    """Of all answers, with the tokens that ended them."""
    total_tokens: int


FinishReason = Literal["stop", "length"]


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason


class _Reply(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    created: int
    """Seconds since 1970."""
    model: str
    """The version that answered: `name@3`."""


class CompletionReply(_Reply):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]
    usage: Usage | None = None


class TextChunkChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason | None = None


class CompletionChunk(_Reply):
    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class AnswerMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


class ChatReply(_Reply):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChunkChoice(BaseModel):
    index: int
    delta: dict[str, str]
    logprobs: None = None
    finish_reason: FinishReason | None = None


class ChatChunk(_Reply):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    """When the version that answers was published, in seconds since 1970."""
    owned_by: str = "promptbank"


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class OpenAIError(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class OpenAIFailure(BaseModel):
    error: OpenAIError
