"""How tests share two cores: one thread a process, and what starts a Ray goes one after another."""

import os
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# No example is timed: on a busy machine, a slow one is no defect.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_START_A_RAY = (
    "corpus/tables/test_on_ray.py",
    "corpus/test_on_ray.py",
    "faults/",
    "jobs/",
    "lab/adapt/test_plain_text.py",
    "lab/comparison/test_job.py",
    "lab/full_weights/test_launched.py",
    "refresh/",
    "reporting/test_ray_metrics.py",
    "run/",
    "serving/test_app.py",
    "serving/test_guarded_app.py",
    "serving/test_replicas.py",
)
_NEED_NONE = ("jobs/test_quickstart_corpora.py", "run/test_lease.py")
_SLOW_SECONDS = 1500
"""Before a slow test counts as one that hangs: several whole jobs beside another process' tests."""


def _starts_a_ray(nodeid: str) -> bool:
    place = nodeid.partition("::")[0].removeprefix("tests/")
    return place.startswith(_START_A_RAY) and not place.startswith(_NEED_NONE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _starts_a_ray(item.nodeid):
            item.add_marker("processes")
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(_SLOW_SECONDS))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several processes (`make test`): one has all tests that start a Ray, since two that start at once take each
    other's ports; other files stay whole, for what their fixtures make. (xdist's own `loadgroup` sees no groups under
    pytest 9.2.)"""
    from xdist.scheduler import LoadScopeScheduling

    class OneForRay(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ray" if _starts_a_ray(nodeid) else nodeid.partition("::")[0]

        def _assign_work_unit(self, node: Any) -> None:
            # They take longest, so they begin first: started late, they would run on alone.
            if "ray" in self.workqueue:
                self.workqueue.move_to_end("ray", last=False)
            super()._assign_work_unit(node)

    return OneForRay(config, log)
