"""The prompt bank: immutable blobs, versions and aliases. Needs neither torch, transformers nor ray.

The layout on disk is written down in FORMAT.md.
"""

from pipeline.bank.aliases import AliasMove
from pipeline.bank.client import PromptBank
from pipeline.bank.collect import CollectedFiles
from pipeline.bank.manifest import (
    BackboneId,
    ChatForm,
    LabelScore,
    Manifest,
    ManifestHeader,
    Metrics,
    PromptRecord,
    TableState,
    Template,
)
from pipeline.bank.publish import CarriedPrompt, NewPrompt
from pipeline.bank.same_backbone import SameBackbone
from pipeline.bank.snapshot import Prompt, Snapshot
from pipeline.bank.verify import Verification
from pipeline.bank.watch import Watcher, WatchEvent

__all__ = [
    "AliasMove",
    "BackboneId",
    "CarriedPrompt",
    "ChatForm",
    "CollectedFiles",
    "LabelScore",
    "Manifest",
    "ManifestHeader",
    "Metrics",
    "NewPrompt",
    "Prompt",
    "PromptBank",
    "PromptRecord",
    "SameBackbone",
    "Snapshot",
    "TableState",
    "Template",
    "Verification",
    "WatchEvent",
    "Watcher",
]
