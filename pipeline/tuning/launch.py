"""Spread a run over ranks: start them with Ray Train, wait for them, and say in a sentence what went wrong."""

import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, get_preemption_info
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.torch.config import _TorchBackend

from pipeline.errors import PromptBankError, TuningError
from pipeline.reporting.events import EventLog
from pipeline.reporting.memory_kill import MORE_MEMORY, memory_kill
from pipeline.settings import ClusterSettings, RunSettings
from pipeline.tuning.interruption.signals import heed_sigterm, stop_by_signal
from pipeline.tuning.interruption.stop_signal import allow_to_run, ask_to_stop, forget_request
from pipeline.tuning.interruption.watchdog import LOADING, hang_reports, hang_sentence, hangs_of
from pipeline.whole_files import remove, temporaries

_LOOK_S = 5.0
_GONE_AFTER_S = 40.0
"""After a minute without the head, Ray ends this process without a word."""
_GONE = "the Ray cluster is gone; start the same run again, there or on another cluster, to resume it"
_START_TIMEOUT_S = 900
"""A cluster that scales itself needs minutes for a new node."""


Work = Callable[[torch.device, Callable[[], bool]], None]
"""What a rank does, on its device. The function that it is given is `node_leaves` of `StopSignal`."""


def launch(work: Work, run_folder: Path, cluster: ClusterSettings, run: RunSettings, log: EventLog) -> None:
    """Do `work` on `num_workers` ranks; ranks that are lost are started again, and go on from the last checkpoint.

    work: is pickled; what it carries are plain values. run_folder: seen by every rank.

    Returns when the ranks have ended: with every trial, or where SIGTERM or Ctrl-C made them leave with a checkpoint.
    Raises: the PromptBankError that a rank ended with; TuningError when ranks were lost too often.
    """
    # A name of its own for each launch: what is resumed is our checkpoint, never Ray's state.
    name = f"launch-{time.time_ns()}"
    timeout, max_failures = run.hang_timeout, run.max_failures
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(_START_TIMEOUT_S))
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(timeout)  # a stopped process, or a frozen node
    hangs = hangs_of(run_folder)
    for leftover in (hangs, run_folder / "ray", *temporaries(run_folder)):  # of a driver that was killed
        remove(leftover)
    _tell_what_is_missing(cluster, log)
    trainer = TorchTrainer(
        _on_rank,
        train_loop_config={"work": work},
        torch_config=_Ranks(backend="nccl" if cluster.use_gpu else "gloo", timeout_s=math.ceil(LOADING * timeout)),
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=cluster.use_gpu,
            resources_per_worker={"CPU": cluster.cpus_per_worker, **({"GPU": 1} if cluster.use_gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(run_folder / "ray"),
            failure_config=FailureConfig(max_failures=max_failures, controller_failure_limit=max_failures),
        ),
    )
    allow_to_run(run_folder)
    try:
        _fit(trainer, run_folder, log)
    except Exception as error:
        raise _sentence(error, max_failures, hang_reports(hangs), timeout) from error
    finally:
        remove(run_folder / "ray")
        forget_request(run_folder)
        if not hang_reports(hangs):
            remove(hangs)


def _fit(trainer: TorchTrainer, run_folder: Path, log: EventLog) -> None:
    """`trainer.fit()` in a thread, where it sets no handler of Ctrl-C: Ray's own ends ranks without a checkpoint."""
    ended: Future[object] = Future()

    def fit() -> None:
        try:
            ended.set_result(trainer.fit())
        except BaseException as error:
            ended.set_exception(error)

    def ask() -> None:
        ask_to_stop(run_folder)
        log.write("stage", name="tuning", text="told to stop: leaving after this step (told again: at once)")

    with stop_by_signal(ask):
        Thread(target=fit, daemon=True).start()
        heard = math.inf  # of a head that cannot be asked from here, nothing is concluded
        while not wait([ended], timeout=_LOOK_S).done:
            if _head_answers():
                heard = time.monotonic()
            elif time.monotonic() - heard > _GONE_AFTER_S:
                raise TuningError(_GONE)
    ended.result()


def _head_answers() -> bool:
    try:
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_LOOK_S).close()
    except (OSError, AttributeError, ValueError):  # the last two: connected by ray://
        return False
    return True


class _RanksBackend(_TorchBackend):
    def on_training_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_training_start(worker_group, backend_config)
        worker_group.execute(heed_sigterm)  # in the main thread of each, where alone a handler can be set


@dataclass
class _Ranks(TorchConfig):
    """Ranks of torch.distributed that heed SIGTERM."""

    @property
    def backend_cls(self) -> type[_RanksBackend]:
        return _RanksBackend


def _tell_what_is_missing(cluster: ClusterSettings, log: EventLog) -> None:
    """A cluster that is too small may yet grow, so this is news and no error."""
    wanted = {"CPU": cluster.num_workers * cluster.cpus_per_worker, "GPU": cluster.num_workers * cluster.use_gpu}
    there = ray.cluster_resources()
    missing = [
        f"{n} {kind}s where there are {there.get(kind, 0):g}" for kind, n in wanted.items() if n > there.get(kind, 0)
    ]
    if missing:
        log.write("stage", name="tuning", text=f"waiting for {' and '.join(missing)} in the cluster")


def _on_rank(config: dict[str, Work]) -> None:
    config["work"](get_device(), lambda: get_preemption_info() is not None)


def _sentence(error: Exception, max_failures: int, hung: Sequence[Path], timeout: float) -> PromptBankError:
    failures = [*getattr(error, "worker_failures", {}).values(), error.__cause__, error]
    for failure in failures:
        while failure is not None:
            cause = getattr(failure, "cause", None)
            for candidate in (failure, cause):
                if isinstance(candidate, PromptBankError):
                    return candidate
            failure = failure.__cause__
    return TuningError(
        f"the ranks were lost or failed more than {max_failures} time(s); the last reason was: "
        f"{_reason(failures[0] or error, hung, timeout)}; start the same run again to resume it"
    )


def _reason(failure: BaseException, hung: Sequence[Path], timeout: float) -> str:
    if hung:
        return hang_sentence(hung, timeout)
    if type(failure).__name__ == "WorkerHealthCheckTimeoutError":
        return f"a rank's process did not answer for {timeout:g} s (run.hang_timeout)"
    if (killed := memory_kill(str(failure))) is not None:
        return f"{killed}: lower cluster.num_workers or cluster.tokens_per_microbatch, {MORE_MEMORY}"
    lines = str(failure).strip().splitlines()
    return lines[-1] if lines else type(failure).__name__
