"""One self-contained HTML page about a night, which loads no script, font or image."""

from pipeline.reporting.html.night import (
    Condition,
    Curve,
    Decision,
    Fault,
    NightReport,
    PastVersion,
    Series,
    Stage,
    TaskNight,
    Verdict,
)
from pipeline.reporting.html.render import render

__all__ = [
    "Condition",
    "Curve",
    "Decision",
    "Fault",
    "NightReport",
    "PastVersion",
    "Series",
    "Stage",
    "TaskNight",
    "Verdict",
    "render",
]
