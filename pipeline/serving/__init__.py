"""One backbone, many prompts: rows of different tasks answered in one batch."""

from pipeline.serving.prompted_model import PromptedModel

__all__ = ["PromptedModel"]
