"""The public interface: everything that code outside this repository imports.

Banks and errors are imported at once; they need numpy, pydantic and safetensors alone. What needs torch, or the
packages of `promptbank[serve]`, is imported when its name is first used.

    from promptbank import PromptBank, PromptedModel, load_backbone

    bank = PromptBank.open("./bank")
    bank.load("sentiment").array  # [P, H] float32
    model = PromptedModel(load_backbone("smollm2-135m"), bank)  # imports torch
    model.classify(["wonderful"], ["sentiment"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pipeline.bank import (
    AliasMove,
    BackboneId,
    CarriedPrompt,
    CollectedFiles,
    Manifest,
    ManifestHeader,
    Metrics,
    NewPrompt,
    Prompt,
    PromptBank,
    PromptRecord,
    SameBackbone,
    Snapshot,
    Template,
    Verification,
    Watcher,
    WatchEvent,
)
from pipeline.errors import (
    BackboneError,
    BankError,
    CorpusError,
    DivergedError,
    LeaseError,
    MissingFileError,
    NoLabelsError,
    OverloadedError,
    PromptBankError,
    RowTooLongError,
    SettingsError,
    StorageError,
    TuningError,
    UnknownNameError,
    UnknownTaskError,
    UnreachableError,
)

if TYPE_CHECKING:
    from pipeline.serving import PromptedModel, ServedBackbone, classify_ensemble, generate_ensemble, load_backbone
    from pipeline.serving.api import make_api
    from pipeline.serving.bank_tasks import BankTasks
    from pipeline.serving.prompted_model import BatchAnswers, Completion
    from pipeline.serving.requests import Request
    from pipeline.serving.service import Service, VersionedAnswers
    from pipeline.serving.service_metrics import ServiceMetrics
    from pipeline.serving.service_settings import ServiceSettings

_LAZY = {
    "BankTasks": "pipeline.serving.bank_tasks",
    "BatchAnswers": "pipeline.serving.prompted_model",
    "Completion": "pipeline.serving.prompted_model",
    "PromptedModel": "pipeline.serving",
    "Request": "pipeline.serving.requests",
    "ServedBackbone": "pipeline.serving",
    "Service": "pipeline.serving.service",
    "ServiceMetrics": "pipeline.serving.service_metrics",
    "ServiceSettings": "pipeline.serving.service_settings",
    "VersionedAnswers": "pipeline.serving.service",
    "classify_ensemble": "pipeline.serving",
    "generate_ensemble": "pipeline.serving",
    "load_backbone": "pipeline.serving",
    "make_api": "pipeline.serving.api",
}

__all__ = [
    "AliasMove",
    "BackboneError",
    "BackboneId",
    "BankError",
    "BankTasks",
    "BatchAnswers",
    "CarriedPrompt",
    "CollectedFiles",
    "Completion",
    "CorpusError",
    "DivergedError",
    "LeaseError",
    "Manifest",
    "ManifestHeader",
    "Metrics",
    "MissingFileError",
    "NewPrompt",
    "NoLabelsError",
    "OverloadedError",
    "Prompt",
    "PromptBank",
    "PromptBankError",
    "PromptRecord",
    "PromptedModel",
    "Request",
    "RowTooLongError",
    "SameBackbone",
    "ServedBackbone",
    "Service",
    "ServiceMetrics",
    "ServiceSettings",
    "SettingsError",
    "Snapshot",
    "StorageError",
    "Template",
    "TuningError",
    "UnknownNameError",
    "UnknownTaskError",
    "UnreachableError",
    "Verification",
    "VersionedAnswers",
    "WatchEvent",
    "Watcher",
    "classify_ensemble",
    "generate_ensemble",
    "load_backbone",
    "make_api",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'promptbank' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
