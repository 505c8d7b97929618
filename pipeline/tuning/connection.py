"""The connection to a cluster, or a Ray of our own on this machine; made when something needs it."""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline.errors import PromptBankError, SettingsError, TuningError
from pipeline.reporting.memory_kill import MORE_MEMORY, memory_kill
from pipeline.settings import ClusterSettings
from pipeline.tuning.interruption.signals import held_back

_log = logging.getLogger(__name__)
_OBJECT_STORE_BYTES = 512 * 2**20
_SHUTDOWN_TIMEOUT_S = 5
_HEAD_PATIENCE_S = 20.0
# By default Ray starts a task again without end whose worker was killed because a node's memory ran low.
_OOM_RETRIES = 3

Connect = Callable[[], None]
"""Connects to Ray if that has not been done. Raises: as `connected_ray`."""


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

    Raises: SettingsError when the cluster cannot be reached; TuningError when Ray does not start: it may later.
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
    if started and address:
        _wait_for_head(address)
    try:
        if started:
            # Cut short, Ray's start can neither go on nor be ended; its own handler of SIGTERM would do that.
            with held_back() as interrupted, _without_rays_handler():
                ray.init(address=address or "local", runtime_env=environment, **options)
    except Exception as error:  # Ray raises many kinds, Exception itself among them
        with suppress(Exception):
            ray.shutdown()  # of what had started
        raise _sentence(error, address) from error
    try:
        if interrupted:
            raise KeyboardInterrupt
        with _ray_speaks_in_sentences():
            yield
    finally:
        if started:
            with held_back():
                ray.shutdown()


def _wait_for_head(address: str) -> None:
    """Ray itself would ask a head that does not answer for minutes, and no signal reaches it meanwhile.

    Raises: SettingsError.
    """
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdecimal() or int(port) >= 2**16:
        return  # "auto", or a client's address: Ray's own affair
    deadline = time.monotonic() + _HEAD_PATIENCE_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_HEAD_PATIENCE_S).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise _sentence(ConnectionError(error.strerror or str(error)), address) from error
        time.sleep(1)


def _sentence(error: Exception, address: str | None) -> PromptBankError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    if address and isinstance(error, ConnectionError | RuntimeError | ValueError | RayError):
        return SettingsError(
            f"cluster.address: no Ray cluster answers at {address} ({reason}); fix the address or its token "
            "(RAY_AUTH_TOKEN)"
        )
    if isinstance(error, OSError) and error.filename:
        return TuningError(
            f"Ray did not start: {error.filename}: {error.strerror}; make room there or give Ray another folder "
            "(RAY_TMPDIR), and start the same run again"
        )
    where = f"to Ray at {address} was not made" if address else "to a Ray of our own on this machine was not made"
    return TuningError(
        f"the connection {where} ({reason}); look at memory, disk and processes there, and start the same run again"
    )


@contextmanager
def _ray_speaks_in_sentences() -> Iterator[None]:
    """What Ray's nodes report goes to the log instead of stdout, which may hold a run's events as JSON.

    A process that was killed for memory is one line there; Ray has some forty, with advice.
    """
    from ray._private import worker

    rays = worker.print_to_stdstream

    def speak(data: dict[str, Any], **options: Any) -> None:
        if data.get("pid") != "raylet":
            rays(data, **options)
            return
        text = "\n".join(data["lines"]).strip()
        killed = memory_kill(text)
        _log.warning("%s", f"{killed}: {MORE_MEMORY}" if killed else text)

    worker.print_to_stdstream = speak
    try:
        yield
    finally:
        worker.print_to_stdstream = rays


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
