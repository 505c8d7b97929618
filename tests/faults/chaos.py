"""Faults drawn from a seed, one after the other, into runs on a tiny model, until time is up.

    python tests/faults/chaos.py --seed 1 --minutes 10

Every run is started again as long as it ends with code 5 or is killed, and must end with the undisturbed run's prompts
bit by bit, one version in its bank, every step written down once, no process and no temporary file left.
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import typer  # noqa: E402

from pipeline.bank import PromptBank  # noqa: E402
from tests.job_process import (  # noqa: E402
    STEPS,
    assert_no_temporary_files,
    assert_nothing_is_left,
    assert_same,
    finish,
    project_in,
    ranks_of,
    run,
    start,
    steps_written,
)

HANG_TIMEOUT_S = 8
MOST_FAULTS = 4  # in one run; with its own retries, the job must never be at its end
MOST_FILLED = 64 * 2**20


@dataclass
class Attempt:
    """One start of the job, in its project."""

    process: subprocess.Popen
    project: Path
    draw: random.Random

    @property
    def runs(self) -> Path:
        return self.project / "runs"

    def step(self) -> int:
        with suppress(OSError, ValueError, IndexError):
            return steps_written(self.runs / "small")[-1]
        return 0


def _signal_rank(number: signal.Signals) -> Callable[[Attempt], bool]:
    def send(attempt: Attempt) -> bool:
        ranks = ranks_of(attempt.process)
        if not ranks:
            return False
        with suppress(psutil.NoSuchProcess):
            attempt.draw.choice(ranks).send_signal(number)
        return True

    return send


def _signal_driver(number: signal.Signals) -> Callable[[Attempt], bool]:
    def send(attempt: Attempt) -> bool:
        attempt.process.send_signal(number)
        return True

    return send


def corrupt_newest_checkpoint(attempt: Attempt) -> bool:
    """Damage it, and kill the driver so that somebody has to read it."""
    attempt.process.kill()
    attempt.process.wait()
    assert_nothing_is_left(attempt.process)
    found = sorted((attempt.runs / "small/checkpoints").glob("step-*"))
    if found:
        data = found[-1].read_bytes()
        cut = attempt.draw.randrange(len(data))
        found[-1].write_bytes(attempt.draw.choice([data[:cut], bytes(8) + data[8:], b""]))
    return True


def fill_disk(attempt: Attempt) -> bool:
    """Until the job has ended for want of room."""
    filler = attempt.runs / "filler"
    if not attempt.runs.is_mount():
        return False
    with suppress(OSError), open(filler, "wb", buffering=0) as file:
        while file.tell() < MOST_FILLED:
            file.write(bytes(4096))
    with suppress(subprocess.TimeoutExpired):
        attempt.process.wait(timeout=120)
    filler.unlink()
    return True


FAULTS: dict[str, Callable[[Attempt], bool]] = {
    "kill a rank": _signal_rank(signal.SIGKILL),
    "stop a rank (hang)": _signal_rank(signal.SIGSTOP),
    "terminate a rank": _signal_rank(signal.SIGTERM),
    "kill the driver": _signal_driver(signal.SIGKILL),
    "terminate the driver": _signal_driver(signal.SIGTERM),
    "Ctrl-C": _signal_driver(signal.SIGINT),
    "corrupt the newest checkpoint": corrupt_newest_checkpoint,
    "fill the disk": fill_disk,
}


@dataclass
class Chaos:
    """What was done so far."""

    draw: random.Random
    folder: Path
    reference: Path
    injected: Counter[str] = field(default_factory=Counter)
    survived: int = 0

    def survive_one_run(self, faults: int, tell: Callable[[str], None] = print) -> None:
        """One run through so many faults. Raises: AssertionError when it does not end as an undisturbed one."""
        project = self.folder / f"run-{self.survived + 1}"
        settings = project_in(project)
        (project / "runs").mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(project / "runs")]
        mounted = not subprocess.run(mount, capture_output=True).returncode
        try:
            story = self._until_published(project, settings, faults)
            tell(f"run {self.survived + 1}: {'; '.join(story)}")
            assert PromptBank.open(project / "bank").versions() == (1,)
            assert_same(project / "bank", self.reference / "bank")
            for trial in ("film", "book"):
                assert steps_written(project / "runs/small", trial) == list(range(1, STEPS + 1))
            assert_no_temporary_files(project)
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(project / "runs")], check=True)
        self.survived += 1
        shutil.rmtree(project)

    def _until_published(self, project: Path, settings: Path, faults: int) -> list[str]:
        story: list[str] = []
        for _ in range(20):
            process = start(settings, "--set", f"run.hang_timeout={HANG_TIMEOUT_S}", "--set", "run.max_failures=5")
            attempt = Attempt(process, project, self.draw)
            while faults and self._wait(attempt):
                name = self.draw.choice(list(FAULTS))
                step = attempt.step()
                if FAULTS[name](attempt):
                    faults -= 1
                    self.injected[name] += 1
                    story.append(f"{name} at step {step}")
                if process.poll() is not None or self.draw.random() < 0.5:  # else another one into the same attempt
                    break
            output = finish(process)
            assert_nothing_is_left(process)
            if process.returncode == 0:
                return story
            assert process.returncode in (5, -signal.SIGKILL), f"{story}\n{output}"
            assert "Traceback" not in output, f"{story}\n{output}"
        raise AssertionError(f"the run does not come to its end: {story}")

    def _wait(self, attempt: Attempt) -> bool:
        """Until a step drawn at random, or for some seconds while the job loads; whether it still runs."""
        if self.draw.random() < 0.3:
            until = time.monotonic() + self.draw.uniform(1, 15)
            while attempt.process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
        else:
            step = self.draw.randrange(attempt.step() + 1, STEPS + 1)
            while attempt.process.poll() is None and attempt.step() < step:
                time.sleep(0.02)
        return attempt.process.poll() is None


def main(
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    minutes: Annotated[float, typer.Option(help="No further run begins after this time.")] = 10.0,
) -> None:
    """Inject faults into runs until time is up."""
    folder = Path(tempfile.mkdtemp(prefix="chaos"))
    reference = folder / "undisturbed"
    run(project_in(reference))
    chaos, ends = Chaos(random.Random(seed), folder, reference), time.monotonic() + 60 * minutes
    while time.monotonic() < ends:
        chaos.survive_one_run(chaos.draw.randint(1, MOST_FAULTS))
    for name, count in chaos.injected.most_common():
        print(f"{count:4d}  {name}")
    print(f"seed {seed}: {sum(chaos.injected.values())} faults injected, {chaos.survived} runs survived")
    shutil.rmtree(folder)


if __name__ == "__main__":
    typer.run(main)
