"""A small process above a job, which tells how the job ended where the job itself cannot.

Ray ends the process of a driver whose cluster is gone, and the system one that takes too much memory: no code of ours
runs then, the exit code is that of a defect or of a signal, and a scheduler would not start the job again. Needs only
the standard library, and imports nothing heavy: it runs beside the job until its end.
"""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

INTERRUPTED = 5
"""The exit code that says: start the same again."""
_REPORT_TO = "PROMPTBANK_REPORT_TO"
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


def supervised(job: Callable[[], None]) -> NoReturn:
    """Run a script's job in a process of its own, and leave with its exit code.

    The script is started a second time and comes here again; that process runs `job`. SIGTERM and Ctrl-C are passed on
    to it, and it does not outlive this one. When it ends without a word, code 5 and one sentence on stderr.
    """
    if _REPORT_TO in os.environ:
        _run(job, int(os.environ.pop(_REPORT_TO)))
    sys.exit(_watch())


def _run(job: Callable[[], None], report: int) -> NoReturn:
    """Run the job and report its exit code before the process ends: what happens to it afterwards changes nothing."""
    os.set_inheritable(report, False)
    code = 1  # Python's own, for a defect
    try:
        job()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        raise
    finally:
        os.write(report, bytes([code]))
    sys.exit(code)


def _watch() -> int:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    job: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        if job is None:
            early.append(number)
        else:
            job.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    # A group of its own: what is sent to ours, by a terminal or by Ray, reaches the job once, through this process.
    job = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, _REPORT_TO: str(writing)},
        pass_fds=(writing,),
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    for told_early in early:
        job.send_signal(told_early)
    os.close(writing)
    ended = job.wait()
    try:
        told = os.read(reading, 1)
    except BlockingIOError:  # something that the job started has the other end
        told = b""
    if told:
        return told[0]
    print(f"error: the job's process {_how(ended)}; start the same run again to resume it", file=sys.stderr)
    return INTERRUPTED


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "was killed from outside (by somebody, or by the system for want of memory)"
    if code < 0:
        return f"crashed ({signal.Signals(-code).name})"
    return "was ended by Ray, whose node or cluster is gone"
