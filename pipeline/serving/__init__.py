"""One backbone and many prompts: rows of different tasks are answered in one batch. `app` serves them over HTTP."""

from pipeline.serving.ensemble import classify_ensemble, generate_ensemble
from pipeline.serving.prompted_model import PromptedModel
from pipeline.serving.served_backbone import ServedBackbone, load_backbone

__all__ = ["PromptedModel", "ServedBackbone", "classify_ensemble", "generate_ensemble", "load_backbone"]
