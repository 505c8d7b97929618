"""Panels over several comparisons: sizes of a model, objectives that it was pre-trained with, steps of adaptation."""

from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.settings.comparing import PANEL_KEYS
from pipeline.settings.fields import Name, SettingsModel
from pipeline.settings.sweeps import SweptKey


class JoinedPanel(SettingsModel):
    """One plot: a line for each label of `runs`."""

    title: str
    task: Name
    key: SweptKey | None = None
    """The swept key to draw over, which each comparison has among its `compare.panels`."""
    values: list[Any] | None = Field(None, min_length=1)
    """Or what the runs differ in, one value for each run of a line: `[0, 1000, 4000]` steps of adaptation."""
    runs: dict[str, list[str]] = Field(min_length=1)
    """By line, the folders of its comparisons: one with `key`, with `values` as many as there are values."""

    @model_validator(mode="after")
    def _one_axis(self) -> Self:
        if (self.key is None) == (self.values is None):
            raise ValueError("give either 'key' (what one comparison sweeps) or 'values' (what the runs differ in)")
        if self.key is not None and self.key not in PANEL_KEYS:
            raise ValueError(f"key {self.key}: a seed is no choice; its spread is shown in every panel")
        wanted = 1 if self.values is None else len(self.values)
        for line, folders in self.runs.items():
            if len(folders) != wanted:
                raise ValueError(f"runs.{line}: {len(folders)} folder(s) where {wanted} are needed, one for each value")
        return self


class JoinSettings(SettingsModel):
    """The file of `jobs/compare_methods.py --join`."""

    title: str = "Comparisons joined"
    panels: list[JoinedPanel] = Field(min_length=1)
