"""The connection to a cluster, or a Ray of our own on this machine; made when something needs it."""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.errors import SettingsError
from pipeline.settings import ClusterSettings
from pipeline.tuning.signals import held_back

_OBJECT_STORE_BYTES = 512 * 2**20
_SHUTDOWN_TIMEOUT_S = 5
# By default Ray starts a task again without end whose worker was killed because a node's memory ran low.
_OOM_RETRIES = 3

Connect = Callable[[], None]
"""Connects to Ray if that has not been done. Raises: SettingsError when the cluster cannot be reached."""


@contextmanager
def ray_on_demand(cluster: ClusterSettings) -> Iterator[Connect]:
    """What connects as `connected_ray` does, at its first call; a run with nothing to compute needs no Ray."""
    with ExitStack() as stack:
        asked = False

        def connect() -> None:
            nonlocal asked
            if not asked:
                stack.enter_context(connected_ray(cluster))
                asked = True

        yield connect


@contextmanager
def connected_ray(cluster: ClusterSettings) -> Iterator[None]:
    """A connection to the cluster named by the settings or RAY_ADDRESS; else a Ray of our own, ended after.

    Raises: SettingsError when the cluster cannot be reached.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    # The workers must find this code, also when it was started as a script without being installed.
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(paths),
        # Ranks that failed are killed; a hung one would be waited for.
        "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": str(_SHUTDOWN_TIMEOUT_S),
    }
    environment = {"env_vars": variables}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address:
        options = {"log_to_driver": False, "logging_level": logging.ERROR}
    else:
        cpus = max(os.cpu_count() or 1, cluster.num_workers * cluster.cpus_per_worker)
        options |= {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES}
    # Read when this process connects, which owns the tasks; a user's own number stays.
    os.environ.setdefault("RAY_task_oom_retries", str(_OOM_RETRIES))
    started, interrupted = not ray.is_initialized(), []
    try:
        if started:
            # Cut short, Ray's start can neither go on nor be ended; its own handler of SIGTERM would do that.
            with held_back() as interrupted, _without_rays_handler():
                ray.init(address=address or "local", runtime_env=environment, **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(
            f"cluster.address: no Ray cluster answers at {address or 'this machine'} ({reason}); "
            "mend the address or its token (RAY_AUTH_TOKEN)"
        ) from error
    try:
        if interrupted:
            raise KeyboardInterrupt
        yield
    finally:
        if started:
            with held_back():
                ray.shutdown()


@contextmanager
def _without_rays_handler() -> Iterator[None]:
    """Ray's own handler of SIGTERM ends this process in the middle of whatever it does."""
    from ray._private import utils

    rays = utils.set_sigterm_handler
    utils.set_sigterm_handler = lambda handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = rays
