"""Memory of this process by kind, sampled while it works."""

import threading
from dataclasses import dataclass
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_SECONDS = 0.01


@dataclass(frozen=True)
class Resident:
    """Peak bytes: the total as the system counted it, and each kind as sampled, maybe at different moments."""

    total: int
    anonymous: int
    shared: int
    file: int
    """Pages of mapped files (libraries), which the system can drop at any time."""

    @property
    def own(self) -> int:
        """Memory that no file backs."""
        return self.anonymous + self.shared


def resident() -> Resident:
    """This process's resident memory now."""
    kinds = _read()
    return Resident(kinds["VmRSS"], kinds["RssAnon"], kinds["RssShmem"], kinds["RssFile"])


class MemoryWatch:
    """`with Watch() as watch: …`, then `watch.peak`. Linux only."""

    peak: Resident

    def __enter__(self) -> "MemoryWatch":
        _CLEAR.write_text("5")  # resets the system's own peak
        self._most = _read()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
        most = self._most
        self.peak = Resident(most["VmHWM"], most["RssAnon"], most["RssShmem"], most["RssFile"])

    def _sample(self) -> None:
        while not self._done.wait(_SECONDS):
            self._look()

    def _look(self) -> None:
        now = _read()
        self._most = {kind: max(most, now[kind]) for kind, most in self._most.items()}


def _read() -> dict[str, int]:
    lines = [line.split() for line in _STATUS.read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[0].startswith(("VmHWM", "VmRSS", "Rss"))}
