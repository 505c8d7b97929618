"""A bank's tasks under the names of models, for servers that speak OpenAI's protocol: a row is one text."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from pipeline.backbone.files import Architecture, check_eos, embedding_rows, find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify, weights_setting
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.weights import open_weights
from pipeline.bank import BackboneId, Prompt, PromptBank, Snapshot
from pipeline.corpus.chat import recorded_input
from pipeline.errors import BankError, CorpusError, PromptBankError, UnknownNameError, UnknownTaskError
from pipeline.serving.requests import EncodedRow, PromptTexts, Request, Text, encode_rows
from pipeline.serving.served_backbone import ServedText

_OF_THE_PROMPTS_TEXT = (
    "echo",
    "suffix",
    "prompt_logprobs",
    "prompt_embeds",
    "truncate_prompt_tokens",
    "use_beam_search",
)
"""Settings that ask for the prompt's text, or change it; a soft prompt has none."""
_STATUS = {UnknownTaskError: HTTPStatus.NOT_FOUND, CorpusError: HTTPStatus.BAD_REQUEST}


@dataclass(frozen=True)
class ModelText:
    """A model whose weights another server holds: its tokenizer, and what its prompts must belong to."""

    tokenizer: Any
    identity: BackboneId
    embedding_rows: int

    @property
    def architecture(self) -> Architecture:
        return self.identity.architecture


def read_model_text(model: str, bank: PromptBank) -> ModelText:
    """Read a model's files, all of its weights included, and hold them against the bank's record.

    The weights that are stored are compared, not how a server holds them: a bank's int8 rows are made of them.
    Raises: BankError when the bank belongs to another model or has no version, BackboneError, StorageError.
    """
    if bank.current is None:
        raise BankError(f"the alias '{bank.alias}' of the bank {bank.uri} is not set yet: publish to it first")
    files = find_model(model)
    config, tokenizer = read_config(files), read_tokenizer(files)
    check_eos(files.name, config, tokenizer)
    held = weights_setting(bank.current.backbone)
    identity = identify(model, config, tokenizer, open_weights(files, build_skeleton(config, int8=False)), held)
    bank.current.check_backbone(identity)
    return ModelText(tokenizer, identity, embedding_rows(config))


class BankTasks:
    """What a server with a model and a bank answers; many threads may call it."""

    def __init__(self, bank: PromptBank, model: ServedText, longest: int) -> None:
        self.bank = bank
        self.model = model
        self._told = PromptTexts(model)
        self._longest = longest

    def names(self) -> tuple[str, ...]:
        """The tasks of the version that is served now. Raises: BankError, StorageError."""
        return self.bank.names()

    def prompt(self, task: str) -> Prompt:
        """The prompt of `name`, `name@3` or `name@alias`. Raises: as `find`."""
        return self.find(task)[0]

    def find(self, task: str) -> tuple[Prompt, Snapshot]:
        """The prompt of `name`, `name@3` or `name@alias`, and the version that it is of.

        Raises: UnknownTaskError for a name, version or alias that the bank does not have; BankError, also where a file
        of one that it has is lost; StorageError.
        """
        try:
            name, snapshot = self.bank.find(task)
            return snapshot.load(name, self.model.identity), snapshot
        except UnknownNameError as error:
            raise UnknownTaskError(public_sentence(error, self.bank)) from error
        except PromptBankError as error:
            raise type(error)(public_sentence(error, self.bank)) from error

    def encode(self, prompt: Prompt, rows: Sequence[str], max_new_tokens: int) -> list[EncodedRow]:
        """Token ids of rows behind one prompt. A row is its text, or a JSON object where the template has more columns.

        Raises: CorpusError for a row that does not fit the task or the model's context; BankError.
        """
        request = Request(row_contents(prompt, rows), [prompt.record.name] * len(rows), max_new_tokens)
        return encode_rows(request, lambda _: prompt, self._told, labelled=False, longest=self._longest)


def public_sentence(error: Exception | str, bank: PromptBank) -> str:
    """An error's sentence without the bank's address, which is not for callers."""
    uri = re.escape(bank.uri)
    sentence = re.sub(rf"(?<!\w){uri}/", "", str(error))
    sentence = re.sub(rf"\bthe bank {uri}(?!\w)", "the bank", sentence)
    sentence = re.sub(rf" at {uri}(?!\w)", "", sentence)
    # A folder's name of one word may be a word of the sentence, too.
    before = "" if "/" in bank.uri else r"\b(?:in|of|to|read|write) "
    return re.sub(rf"({before}){uri}(?!\w)", r"\1the bank", sentence)


def row_contents(prompt: Prompt, rows: Sequence[str]) -> list[Text]:
    """Rows as they were sent: each is its text, or a JSON object where the prompt's template has several columns.

    Raises: CorpusError for a row that is no JSON object there, or has a value that is no text, number or boolean.
    """
    name = prompt.record.name
    columns = recorded_input(prompt.record.template, f"prompt '{name}'").columns
    return [row if len(columns) == 1 else _columns(row, columns, name) for row in rows]


def prompt_rows(prompt: Any) -> list[str]:
    """The rows in a completion's `prompt`. Raises: CorpusError for token ids, no rows, or what is no text."""
    if not isinstance(prompt, str | list):
        raise CorpusError("'prompt' must be a text or a list of texts: a row of several columns is JSON in a text")
    rows = [prompt] if isinstance(prompt, str) else prompt
    if not rows or not all(isinstance(row, str) for row in rows):
        raise CorpusError("a task of the prompt bank takes texts and not token ids: send 'prompt' as text")
    return list(rows)


def message_row(messages: Sequence[Any]) -> str:
    """The row in a chat's only message. Raises: CorpusError for more messages, another role or no text."""
    fields = dict(messages[0]) if len(messages) == 1 else {}
    content = fields.get("content")
    parts = [content] if isinstance(content, str) else [_part_text(part) for part in content or ()]
    if fields.get("role") != "user" or not parts or not all(isinstance(part, str) for part in parts):
        raise CorpusError(
            "a task of the prompt bank takes one message of the role 'user' with a row's text: what stands around it "
            "is the task's own template"
        )
    return "".join(map(str, parts))


def refuse_settings(value_of: Callable[[str], Any]) -> None:
    """Raises: CorpusError when a request sets what no soft prompt can have; `value_of` gives None for what it lacks."""
    for name in _OF_THE_PROMPTS_TEXT:
        value = value_of(name)
        if value is not None and value is not False:  # 0 asks for something, too
            raise CorpusError(f"'{name}' cannot be had for a task of the prompt bank: leave it out")


@dataclass(frozen=True)
class Refusal:
    """An error as OpenAI's protocol tells it."""

    message: str
    status: HTTPStatus
    param: str | None = None
    """The part of the request that was wrong, where it is known."""

    @property
    def kind(self) -> str:
        """`type` of the reply: `NotFoundError`, `BadRequestError`, `ServiceUnavailableError` and so on."""
        return "".join(self.status.phrase.title().split()).removesuffix("Error") + "Error"


def refusal(error: PromptBankError) -> Refusal:
    """What a caller is told: 404 for a task that is not there, 400 for a row that does not fit it, else 503."""
    kind = next((kind for kind in _STATUS if isinstance(error, kind)), None)
    status = HTTPStatus.SERVICE_UNAVAILABLE if kind is None else _STATUS[kind]
    return Refusal(str(error), status, "model" if kind is UnknownTaskError else None)


def _part_text(part: Any) -> Any:
    """The text of one part of a message; None where the part is of another type than `text`."""
    try:
        fields = dict(part)
    except (TypeError, ValueError):  # vLLM lets a part be a text
        return None
    return fields.get("text") if fields.get("type") == "text" else None


def _columns(row: str, columns: Sequence[str], name: str) -> Text:
    try:
        given = json.loads(row)
    except (ValueError, RecursionError):  # the latter for brackets in brackets in brackets
        given = None
    if not isinstance(given, dict):
        example = json.dumps(dict.fromkeys(columns, "…"), ensure_ascii=False)
        raise CorpusError(f"a row for task '{name}' has several columns: send it as a JSON object, {example}")
    for column, value in given.items():
        if not isinstance(value, str | int | float) or value in (math.inf, -math.inf) or value != value:
            raise CorpusError(
                f"a row for task '{name}': the column {column!r} must be a text, a finite number or a boolean"
            )
    return given
