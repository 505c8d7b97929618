"""One self-contained HTML page about a night: no script, font or image comes from elsewhere."""

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
