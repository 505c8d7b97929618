"""Spread a run over ranks: the local or remote Ray, and Ray Train's worker group."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from pipeline.errors import PromptBankError, SettingsError, TuningError
from pipeline.reporting.events import EventLog
from pipeline.settings import ClusterSettings
from pipeline.tuning.worker import Order, work

_OBJECT_STORE_BYTES = 512 * 2**20
_START_TIMEOUT_S = 900
"""A cluster that scales itself needs minutes for a new node."""


@contextmanager
def connected_ray(cluster: ClusterSettings) -> Iterator[None]:
    """A connection to the cluster named by the settings or RAY_ADDRESS; else a Ray of our own, ended after.

    Raises: SettingsError when the cluster cannot be reached.
    """
    address = cluster.address or os.environ.get("RAY_ADDRESS")
    # The workers must find this code, also when it was started as a script without being installed.
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(paths)}}
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    if address:
        options = {"log_to_driver": False, "logging_level": logging.ERROR}
    else:
        cpus = max(os.cpu_count() or 1, cluster.num_workers * cluster.cpus_per_worker)
        options |= {"num_cpus": cpus, "object_store_memory": _OBJECT_STORE_BYTES}
    started = not ray.is_initialized()
    try:
        if started:
            ray.init(address=address or "local", runtime_env=environment, **options)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SettingsError(
            f"cluster.address: no Ray cluster answers at {address or 'this machine'} ({reason}); "
            "mend the address or its token (RAY_AUTH_TOKEN)"
        ) from error
    try:
        yield
    finally:
        if started:
            ray.shutdown()


def launch(order: Order, cluster: ClusterSettings, max_failures: int, log: EventLog) -> None:
    """Run the order on `num_workers` ranks; ranks that are lost are started again from the last checkpoint.

    Raises: the PromptBankError that a rank ended with; TuningError when ranks were lost too often.
    """
    # A name of its own for each launch: what is resumed is our checkpoint, never Ray's state.
    name = f"launch-{time.time_ns()}"
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    _tell_what_is_missing(cluster, log)
    trainer = TorchTrainer(
        _on_rank,
        train_loop_config=asdict(order),
        torch_config=TorchConfig(backend="nccl" if cluster.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(Path(order.run_folder) / "ray"),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        raise _sentence(error, max_failures) from error
    finally:
        shutil.rmtree(Path(order.run_folder) / "ray" / name, ignore_errors=True)


def _tell_what_is_missing(cluster: ClusterSettings, log: EventLog) -> None:
    """A cluster that is too small may yet grow, so this is news and no error."""
    wanted = {"CPU": cluster.num_workers * cluster.cpus_per_worker, "GPU": cluster.num_workers * cluster.use_gpu}
    there = ray.cluster_resources()
    missing = [
        f"{n} {kind}s where there are {there.get(kind, 0):g}" for kind, n in wanted.items() if n > there.get(kind, 0)
    ]
    if missing:
        log.write("stage", name="tuning", text=f"waiting for {' and '.join(missing)} in the cluster")


def _on_rank(order: dict[str, Any]) -> None:
    work(Order(**order), get_device())


def _sentence(error: Exception, max_failures: int) -> PromptBankError:
    failures = [*getattr(error, "worker_failures", {}).values(), error.__cause__, error]
    for failure in failures:
        while failure is not None:
            cause = getattr(failure, "cause", None)
            for candidate in (failure, cause):
                if isinstance(candidate, PromptBankError):
                    return candidate
            failure = failure.__cause__
    last = str(failures[0] or error).strip().splitlines()
    return TuningError(
        f"the ranks were lost or failed more than {max_failures} time(s); the last reason was: "
        f"{last[-1] if last else type(error).__name__}; start the same run again to resume it"
    )
