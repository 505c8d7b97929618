"""The plugin `promptbank` of vLLM's API server, in its entry-point group `vllm.endpoint_plugins`.

    VLLM_PLUGINS=promptbank PROMPT_BANK_URI=BANK python -m vllm.entrypoints.openai.api_server \\
        --model MODEL --enable-prompt-embeds

The variables are those of the command `promptbank`: PROMPT_BANK_ALIAS (latest) is the alias that is served and
followed, PROMPT_BANK_TRUSTED_KEYS and PROMPT_BANK_CACHE as there; PROMPT_BANK_WATCH_EVERY is in seconds (10).
"""

import asyncio
import logging
import os
import secrets
from argparse import Namespace
from functools import partial
from typing import Any

from pipeline.bank import PromptBank, WatchEvent
from pipeline.errors import SettingsError
from pipeline.serving.bank_tasks import BankTasks, read_model_text
from pipeline.serving.in_vllm.checks import check_flags, check_names, hidden_tasks
from pipeline.serving.in_vllm.handlers import BankChat, BankCompletion, BankModels, Rendering

_log = logging.getLogger("vllm.promptbank")  # below vLLM's logger, which prints it


class PromptBankPlugin:
    """Puts the bank's tasks beside the models that vLLM serves; it has no routes of its own."""

    name = "promptbank"
    required_tasks = ("generate",)

    def attach_router(self, app: Any) -> None:
        """Nothing is added: vLLM's own routes answer."""

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Open the bank, hold the model against its record, and put the bank's handlers in place of vLLM's.

        Raises: SettingsError, BankError, BackboneError or StorageError, which end the server before it listens.
        """
        model_config = engine_client.model_config
        if not model_config.enable_prompt_embeds:
            raise SettingsError("vLLM takes no soft prompts as it was started: add --enable-prompt-embeds")
        check_flags(args, model_config.model)
        tasks = await asyncio.to_thread(_open_tasks, model_config.model, model_config.max_model_len)
        models = BankModels(state.openai_serving_models, tasks)
        check_names(await asyncio.to_thread(tasks.names), models.names_of_vllm())
        rendering = Rendering(tasks, model_config.dtype, secrets.token_hex(16))
        state.openai_serving_models = models
        state.openai_serving_completion = BankCompletion(state.openai_serving_completion, models, rendering)
        state.openai_serving_chat = BankChat(state.openai_serving_chat, models, rendering)
        tasks.bank.watch(partial(_tell, models), _seconds("PROMPT_BANK_WATCH_EVERY", 10.0))
        identity = tasks.model.identity
        _log.info("serving version %d of the prompt bank %s", tasks.bank.version, tasks.bank.uri)
        if identity.quantization != "none":
            _log.info(
                "its prompts were tuned on %s, and vLLM holds the weights in %s: answers may differ as far as that "
                "rounding goes",
                identity.quantization,
                model_config.dtype,
            )


def _open_tasks(model: str, longest: int) -> BankTasks:
    uri = os.environ.get("PROMPT_BANK_URI")
    if not uri:
        raise SettingsError("name the prompt bank that vLLM is to serve: set PROMPT_BANK_URI")
    keys = tuple(filter(None, os.environ.get("PROMPT_BANK_TRUSTED_KEYS", "").split(os.pathsep)))
    alias = os.environ.get("PROMPT_BANK_ALIAS", "latest")
    bank = PromptBank.open(uri, alias, cache=os.environ.get("PROMPT_BANK_CACHE") or None, trusted_keys=keys)
    return BankTasks(bank, read_model_text(model, bank), longest)


def _seconds(variable: str, default: float) -> float:
    written = os.environ.get(variable)
    try:
        seconds = default if not written else float(written)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise SettingsError(f"{variable} is {written!r} where a number of seconds above 0 is expected")
    return seconds


def _tell(models: BankModels, event: WatchEvent) -> None:
    """Called in the watcher's thread."""
    if event.error:
        _log.warning("serving version %d of the prompt bank on: %s", event.version, event.error)
    else:
        _log.info("serving version %d of the prompt bank", event.version)
        for task in hidden_tasks(models.tasks.names(), models.names_of_vllm()):
            _log.warning("the task '%s' cannot be asked: the model that vLLM serves by that name answers", task)
