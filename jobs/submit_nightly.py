#!/usr/bin/env python
"""Submit tonight's job to a Ray cluster once, wait for its end, and exit with its exit code.

    python jobs/submit_nightly.py --address http://head:8265 -- \\
        python jobs/refresh_prompts.py --config FILE --date {night}

The submission's id ends in the night's date, which also replaces `{night}` in the command. If the same night is
submitted again (by a retry or a second scheduler), this script finds the first submission and waits for it. A job that
was interrupted (exit code 5, or lost with its node) is started again as `…-2`, `…-3`, and resumes. Exit codes: the
job's own; 2 the cluster refuses us; 5 it cannot be reached, or the night's attempts are used up; 124 stopped at
--deadline-hours; 143 stopped by somebody else.

Why not `ray job submit`: it exits with 1 whatever the job's exit code was, and with 0 when somebody stopped the job. It
also refuses an id that exists.
"""

import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, TypeVar

import typer

INTERRUPTED = 5
REFUSED = 2
_DEADLINE = 124
_STOPPED = 143
_PAUSE_S = 2.0
_STOPPING_S = 120.0
_Answer = TypeVar("_Answer")


class NightlyError(Exception):
    """One sentence for the operator, and the exit code."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True)
class NightlySubmission:
    """What to submit, with limits on attempts and time."""

    submission: str
    command: str
    runtime_env: dict[str, str]
    attempts: int
    pause_s: float
    longest_s: float


def main(
    entrypoint: Annotated[list[str], typer.Argument(help="The job's command, after --.")],
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard.")
    ] = "http://127.0.0.1:8265",
    night: Annotated[str, typer.Option(help="The night's date, YYYY-MM-DD; without it, today's in UTC.")] = "",
    name: Annotated[str, typer.Option(help="What stands before the date in the submission's id.")] = "refresh",
    working_dir: Annotated[
        Path | None, typer.Option(help="A folder to upload; without it, paths in the image.")
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="How often a night is started at most.")] = 3,
    pause: Annotated[
        float, typer.Option(min=0, help="Seconds before another attempt: a lost one's lease expires.")
    ] = 90,
    deadline_hours: Annotated[float, typer.Option(min=0, help="Hours after which the job is stopped.")] = 20,
    patience: Annotated[float, typer.Option(min=0, help="Seconds to wait for a cluster that does not answer.")] = 300,
) -> None:
    """Submit tonight's job to a Ray cluster once, wait for its end, and exit with its exit code."""
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray's client prefers it to its own argument
    try:
        date = _date(night)
        command = shlex.join(word.replace("{night}", date) for word in entrypoint)
        runtime_env = {"working_dir": str(working_dir)} if working_dir else {}
        plan = NightlySubmission(f"{name}-{date}", command, runtime_env, attempts, pause, deadline_hours * 3600)
        code = run_submission(Cluster(address, patience), plan)
    except NightlyError as error:
        typer.echo(f"error: {error}", err=True)
        code = error.code
    except KeyboardInterrupt:
        typer.echo("interrupted: the job continues; submit the same night again to follow it", err=True)
        code = 130
    raise typer.Exit(code)


def run_submission(cluster: "Cluster", night: NightlySubmission) -> int:
    """The exit code of the night's last attempt. Attempts that ran already are not run again."""
    deadline = None
    for attempt in range(1, night.attempts + 1):
        name = night.submission if attempt == 1 else f"{night.submission}-{attempt}"
        if attempt > 1 and not cluster.has(name):
            time.sleep(night.pause_s)
        cluster.submit_once(name, night)
        deadline = deadline or cluster.started(name) + night.longest_s  # the same for every process that waits
        code = _follow(cluster, name, deadline)
        if code != INTERRUPTED:
            return code
    typer.echo(f"{night.submission} was interrupted {night.attempts} time(s); its attempts are used up", err=True)
    return INTERRUPTED


def exit_code(status: str, driver_exit_code: int | None) -> int:
    """The exit code for a job that ended. A job without a code, or ended by a signal, was lost and can be resumed."""
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return _STOPPED
    # Ray runs the command in a shell, whose code for a signal is 128 plus its number.
    if driver_exit_code is None or not 0 < driver_exit_code <= 128:
        return INTERRUPTED
    return driver_exit_code


def _follow(cluster: "Cluster", name: str, deadline: float) -> int:
    """Print a job's log until it ends; its exit code. `deadline` is in Unix seconds."""
    printed = 0
    while True:
        ended = cluster.ended(name)
        log = cluster.log(name)
        typer.echo(log[printed:], nl=False)
        printed = max(printed, len(log))
        if ended is not None:
            typer.echo(f"{name} ended with exit code {ended}")
            return ended
        if time.time() > deadline:
            cluster.stop(name)
            give_up = time.monotonic() + _STOPPING_S
            while cluster.ended(name) is None and time.monotonic() < give_up:
                time.sleep(_PAUSE_S)
            typer.echo(f"{name} was stopped at its deadline", err=True)
            return _DEADLINE
        time.sleep(_PAUSE_S)


class Cluster:
    """A Ray cluster's jobs. While it does not answer, each request is repeated for `patience` seconds.

    Raises: NightlyError where the cluster refuses us, or does not answer in time.
    """

    def __init__(self, address: str, patience: float) -> None:
        from ray.job_submission import JobSubmissionClient

        self._address, self._patience = address, patience
        self._client = self._ask(lambda: JobSubmissionClient(address))

    def submit_once(self, name: str, night: NightlySubmission) -> None:
        """Submit a job unless one of this name is there."""

        def submit() -> None:
            try:
                self._client.submit_job(entrypoint=night.command, submission_id=name, runtime_env=night.runtime_env)
                typer.echo(f"{name} was submitted")
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise
                typer.echo(f"{name} is there already")

        if not self.has(name):  # otherwise a working folder would be uploaded for nothing
            self._ask(submit)

    def started(self, name: str) -> float:
        """When a job was submitted, in Unix seconds."""
        info = self._ask(lambda: self._client.get_job_info(name))
        return float(info.start_time or time.time() * 1000) / 1000

    def ended(self, name: str) -> int | None:
        """The exit code of a job; None while it runs. A job that is gone was lost with the cluster's head."""
        if not self.has(name):
            return INTERRUPTED
        info = self._ask(lambda: self._client.get_job_info(name))
        if info.status in ("FAILED", "STOPPED") and info.message:
            typer.echo(f"{name}: {info.message.strip().splitlines()[-1]}", err=True)
        return exit_code(info.status, info.driver_exit_code) if info.status.is_terminal() else None

    def log(self, name: str) -> str:
        """What a job printed so far; nothing if its node is gone."""
        try:
            return str(self._client.get_job_logs(name))
        except (RuntimeError, OSError):
            return ""

    def stop(self, name: str) -> None:
        self._ask(lambda: self._client.stop_job(name))

    def has(self, name: str) -> bool:
        def look() -> bool:
            try:
                self._client.get_job_info(name)
            except RuntimeError as error:
                if "status code 404" in str(error):
                    return False
                raise
            return True

        return self._ask(look)

    def _ask(self, question: Callable[[], _Answer]) -> _Answer:
        from ray.exceptions import AuthenticationError

        give_up = time.monotonic() + self._patience
        while True:
            try:
                return question()
            except AuthenticationError as error:
                sentence = (
                    f"the cluster at {self._address} refuses the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN "
                    "(or RAY_AUTH_TOKEN_PATH) to those of its head"
                )
                raise NightlyError(sentence, REFUSED) from error
            except (RuntimeError, OSError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                if "status code 400" in str(error):
                    raise NightlyError(f"the cluster at {self._address} refuses the job: {reason}", REFUSED) from error
                if time.monotonic() > give_up:
                    sentence = f"the cluster at {self._address} does not answer ({reason}); submit the night again"
                    raise NightlyError(sentence, INTERRUPTED) from error
                time.sleep(_PAUSE_S)


def _date(night: str) -> str:
    if not night:
        return datetime.now(UTC).date().isoformat()
    try:
        return datetime.strptime(night, "%Y-%m-%d").date().isoformat()
    except ValueError as error:
        raise NightlyError(f"--night {night}: write it as YYYY-MM-DD, for example 2026-11-25", REFUSED) from error


if __name__ == "__main__":
    typer.run(main)
