"""How tests share two cores: one thread a process, and what starts a Ray goes one after another."""

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No example is timed: on a busy machine, a slow one is no defect.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_START_A_RAY = (
    "adapt/test_plain_text.py",
    "comparison/test_job.py",
    "corpus/test_on_ray.py",
    "faults/",
    "full_weights/test_launched.py",
    "jobs/",
    "refresh/",
    "reporting/test_ray_metrics.py",
    "run/",
    "serving/test_app.py",
)


@pytest.hookimpl(tryfirst=True)  # xdist looks at the marks in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes (`make test`): one has all tests that start a Ray, since two that start at once take each
    other's ports; the others' files stay whole, for what their fixtures make."""
    for item in items:
        place = item.path.relative_to(Path(__file__).parent).as_posix()
        item.add_marker(pytest.mark.xdist_group("ray" if place.startswith(_START_A_RAY) else place))
