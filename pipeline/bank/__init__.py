"""The prompt bank: immutable blobs, versions and aliases. Needs neither torch, transformers nor ray.

The layout on disk is written down in FORMAT.md.
"""

from pipeline.bank.aliases import AliasMove
from pipeline.bank.client import PromptBank
from pipeline.bank.manifest import BackboneId, Manifest, Metrics, PromptRecord, Template, Unknown
from pipeline.bank.publish import NewPrompt, Standing
from pipeline.bank.sameness import SameBackbone
from pipeline.bank.snapshot import Prompt, Snapshot
from pipeline.bank.store import Missing
from pipeline.bank.watch import Watcher, WatchEvent

__all__ = [
    "AliasMove",
    "BackboneId",
    "Manifest",
    "Metrics",
    "Missing",
    "NewPrompt",
    "Prompt",
    "PromptBank",
    "PromptRecord",
    "SameBackbone",
    "Snapshot",
    "Standing",
    "Template",
    "Unknown",
    "WatchEvent",
    "Watcher",
]
