"""A bank's tasks under the names of models, for servers that speak OpenAI's protocol: a row is one text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.backbone.files import Architecture, check_eos, embedding_rows, find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify, weights_setting
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.weights import open_weights
from pipeline.bank import BackboneId, Prompt, PromptBank
from pipeline.corpus.chat import recorded_input
from pipeline.errors import (
    BankError,
    CorpusError,
    MissingFileError,
    PromptBankError,
    UnknownNameError,
    UnknownTaskError,
)
from pipeline.serving.requests import EncodedRow, Request, Text, encode_rows


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

    def __init__(self, bank: PromptBank, model: ModelText, longest: int) -> None:
        self.bank = bank
        self.model = model
        self._longest = longest

    def names(self) -> tuple[str, ...]:
        """The tasks of the version that is served now. Raises: BankError, StorageError."""
        return self.bank.names()

    def prompt(self, task: str) -> Prompt:
        """The prompt of `name`, `name@3` or `name@alias`.

        Raises: UnknownTaskError for a name, version or alias that the bank does not have; BankError, StorageError.
        """
        try:
            name, snapshot = self.bank.find(task)
            return snapshot.load(name, self.model.identity)
        except (MissingFileError, UnknownNameError) as error:
            raise UnknownTaskError(self._public(error)) from error
        except PromptBankError as error:
            raise type(error)(self._public(error)) from error

    def encode(self, prompt: Prompt, rows: Sequence[str], max_new_tokens: int) -> list[EncodedRow]:
        """Token ids of rows behind one prompt. A row is its text, or a JSON object where the template has more columns.

        Raises: CorpusError for a row that does not fit the task or the model's context; BankError.
        """
        name = prompt.record.name
        columns = recorded_input(prompt.record.template, f"prompt '{name}'").columns
        texts = [row if len(columns) == 1 else _columns(row, columns, name) for row in rows]
        request = Request(texts, [name] * len(rows), max_new_tokens)
        return encode_rows(request, lambda _: prompt, self.model, labelled=False, longest=self._longest)

    def _public(self, error: Exception) -> str:
        """The error's sentence without the bank's address, which is not for callers."""
        return str(error).replace(f"{self.bank.uri}/", "").replace(f"the bank {self.bank.uri}", "the bank")


def _columns(row: str, columns: Sequence[str], name: str) -> Text:
    try:
        given = json.loads(row)
    except ValueError:
        given = None
    if not isinstance(given, dict):
        example = json.dumps(dict.fromkeys(columns, "…"), ensure_ascii=False)
        raise CorpusError(f"a row for task '{name}' has several columns: send it as a JSON object, {example}")
    return given
