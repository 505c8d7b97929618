"""vLLM's handlers of its OpenAI routes, taught the bank's names; for every other name they are vLLM's own."""

import asyncio
import logging
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any, TypeAlias

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList, ModelPermission
from vllm.inputs import EmbedsInput
from vllm.lora.request import LoRARequest

from pipeline.errors import PromptBankError
from pipeline.serving.bank_tasks import BankTasks, message_row, prompt_rows, refusal, refuse_settings
from pipeline.serving.in_vllm.inputs import engine_input

_log = logging.getLogger("vllm.promptbank")
# What answers this request, as `name@version`. Every request runs in a context of its own.
_answering: ContextVar[str | None] = ContextVar("answering", default=None)

Request: TypeAlias = CompletionRequest | ChatCompletionRequest


class BankModels(OpenAIServingModels):
    """The models that vLLM serves, and the bank's tasks beside them."""

    def __init__(self, plain: OpenAIServingModels, tasks: BankTasks) -> None:
        self.__dict__.update(vars(plain))  # all that vLLM has configured
        self.tasks = tasks

    async def show_available_models(self) -> ModelList:
        models = await super().show_available_models()
        base = self.base_model_paths[0]
        try:
            names = await asyncio.to_thread(self.tasks.names)
        except PromptBankError as error:  # a bank that cannot be read now takes no model of vLLM's from the list
            _log.warning("the prompt bank's tasks cannot be listed: %s", error)
            names = ()
        models.data += [
            ModelCard(id=name, root=base.model_path, parent=base.name, permission=[ModelPermission()]) for name in names
        ]
        return models

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        return _answering.get() or super().model_name(lora_request)

    def names_of_vllm(self) -> tuple[str, ...]:
        """Of the base model and of adapters, which answer before a task of the same name."""
        return (*(model.name for model in self.base_model_paths), *self.lora_requests)

    def is_task(self, name: str | None) -> bool:
        """Whether a request of this name is the bank's to answer, or to refuse."""
        return bool(name) and not self.is_base_model(name) and name not in self.lora_requests


class Rendering:
    """Turns a request for a task into what vLLM's engine takes."""

    def __init__(self, tasks: BankTasks, dtype: Any, secret: str) -> None:
        self._tasks = tasks
        self._dtype = dtype
        self._secret = secret

    async def inputs(self, request: Request, rows: Sequence[str]) -> list[EmbedsInput]:
        """The rows behind their task's prompt; from here on, the request is for the version that was found.

        Raises: UnknownTaskError; CorpusError for a row or a setting that does not fit; BankError, StorageError.
        """
        refuse_settings(lambda name: getattr(request, name, None))
        # Files are read and texts tokenised beside the event loop.
        return await asyncio.to_thread(self._inputs, request, rows)

    def _inputs(self, request: Request, rows: Sequence[str]) -> list[EmbedsInput]:
        prompt = self._tasks.prompt(request.model)
        most = getattr(request, "max_completion_tokens", None) or request.max_tokens or 1
        encoded = self._tasks.encode(prompt, rows, most)
        request.model = f"{prompt.record.name}@{prompt.version}"
        request.stop_token_ids = [*(request.stop_token_ids or ()), *{row.end for row in encoded}]
        if request.temperature is None and (request.n or 1) == 1:
            request.temperature = 0.0  # what a prompt was tuned for has one best answer
        if request.repetition_penalty is None:
            request.repetition_penalty = 1.0  # else vLLM takes that of the model's generation_config.json
        # The secret keeps a caller from sending vectors of its own that are taken for a prompt's.
        salt = " ".join(filter(None, [self._secret, prompt.record.digest, request.cache_salt]))
        return [engine_input(row, self._dtype, salt) for row in encoded]


class BankCompletion(OpenAIServingCompletion):
    """`/v1/completions`: a request's `model` may be a task; `prompt` is then a row, or a list of rows."""

    models: BankModels

    def __init__(self, plain: OpenAIServingCompletion, models: BankModels, rendering: Rendering) -> None:
        self.__dict__.update(vars(plain))
        self.models = models
        self.rendering = rendering

    async def render_completion_request(self, request: CompletionRequest) -> list[EmbedsInput] | ErrorResponse:
        if not self.models.is_task(request.model):
            return await super().render_completion_request(request)
        self._preflight(request.n or 1)
        try:
            inputs = await self.rendering.inputs(request, prompt_rows(request.prompt))
        except PromptBankError as error:
            return self.create_error_response(**_reply(error))
        _answering.set(request.model)
        return inputs

    def _maybe_get_adapters(self, request: Any, supports_default_mm_loras: bool = False) -> LoRARequest | None:
        if self.models.is_task(request.model):
            return None
        return super()._maybe_get_adapters(request, supports_default_mm_loras)


class BankChat(OpenAIServingChat):
    """`/v1/chat/completions`: a request's `model` may be a task; its one message is then a row."""

    models: BankModels

    def __init__(self, plain: OpenAIServingChat, models: BankModels, rendering: Rendering) -> None:
        self.__dict__.update(vars(plain))
        self.models = models
        self.rendering = rendering

    async def render_chat_request(
        self, request: ChatCompletionRequest
    ) -> tuple[list[Any], list[EmbedsInput]] | ErrorResponse:
        if not self.models.is_task(request.model):
            return await super().render_chat_request(request)
        self._preflight(request.n or 1)
        try:
            inputs = await self.rendering.inputs(request, [message_row(request.messages)])
        except PromptBankError as error:
            return self.create_error_response(**_reply(error))
        _answering.set(request.model)
        return list(request.messages), inputs

    def _maybe_get_adapters(self, request: Any, supports_default_mm_loras: bool = False) -> LoRARequest | None:
        if self.models.is_task(request.model):
            return None
        return super()._maybe_get_adapters(request, supports_default_mm_loras)


def _reply(error: PromptBankError) -> dict[str, Any]:
    """What vLLM makes its error reply of."""
    told = refusal(error)
    return {"message": told.message, "err_type": told.kind, "status_code": told.status, "param": told.param}
