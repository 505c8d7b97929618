"""Settings: one YAML file in, one frozen and validated `Settings` out. The only reader of configuration.

A task inherits every key of `defaults` that it does not name itself, key by key
(`prompt: {length: 32}` under a task keeps the default `init`). Relative paths are
relative to the directory that the job is started in.
"""

from pipeline.settings.adaptation import (
    AdaptationSettings,
    AdaptedModelSettings,
    ObjectiveSettings,
    TextSettings,
)
from pipeline.settings.comparing import (
    CompareSettings,
    FineTuningSettings,
    HardPromptSettings,
    InstructionSearchSettings,
    LoraSettings,
    TrainingSettings,
    TransferSettings,
)
from pipeline.settings.corpora import CatalogSettings, Split, SplitSettings
from pipeline.settings.joining import JoinedPanel, JoinSettings
from pipeline.settings.models import (
    BankSettings,
    ClusterSettings,
    ModelSettings,
    RefreshSettings,
    RunSettings,
    Settings,
)
from pipeline.settings.reading import (
    changed_settings,
    load_adaptation,
    load_joined,
    load_settings,
    parse_settings,
    settings_schema,
)
from pipeline.settings.tasks import (
    HalvingSettings,
    OptimizerSettings,
    PromptSettings,
    TaskDefaults,
    TaskSettings,
    TeacherSettings,
)

__all__ = [
    "AdaptationSettings",
    "AdaptedModelSettings",
    "BankSettings",
    "CatalogSettings",
    "ClusterSettings",
    "CompareSettings",
    "FineTuningSettings",
    "HalvingSettings",
    "HardPromptSettings",
    "InstructionSearchSettings",
    "JoinSettings",
    "JoinedPanel",
    "LoraSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "PromptSettings",
    "RefreshSettings",
    "RunSettings",
    "Settings",
    "Split",
    "SplitSettings",
    "TaskDefaults",
    "TaskSettings",
    "TeacherSettings",
    "TextSettings",
    "TrainingSettings",
    "TransferSettings",
    "changed_settings",
    "load_adaptation",
    "load_joined",
    "load_settings",
    "parse_settings",
    "settings_schema",
]
