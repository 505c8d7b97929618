"""Compile the kernels beside this file, once a machine, with whatever C compiler there is.

Compiled at first use, not at installation: the machine that runs them knows its processor's instructions.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

_SOURCES = ("rows.c", "attention.c", "products.c", "fine_products.c", "weights.c")
_HEADERS = ("vectors.h",)
# No `-ffast-math`: it would let the compiler assume that there is no NaN, and a trial gone NaN must show it.
# `-fno-thread-jumps`: GCC would compute what follows a bounded exponential for its bounds, too, in every lane.
# That makes denormal numbers, and a gate ten times as slow.
_FLAGS = (
    "-O3 -std=gnu11 -shared -fPIC -fno-math-errno -fno-trapping-math -fno-thread-jumps -ffp-contract=fast "
    "-Wno-unknown-pragmas"
)
_WISHES = (
    "-march=native -mprefer-vector-width=512 -fopenmp",
    "-march=native -fopenmp",
    "-march=native -fopenmp-simd",
    "",
)
"""Options to try, the best first: not every compiler has OpenMP or knows this processor."""


@lru_cache(maxsize=1)
def load_kernels() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be compiled, and PyTorch's own operators run in their place."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "promptbank" / "kernels"
    except RuntimeError:  # a user without a home folder, as containers have
        return None
    chosen = [shlex.split(os.environ["CC"])] if os.environ.get("CC") else []
    found = [[there] for name in ("cc", "gcc", "clang") if (there := shutil.which(name))]
    for compiler in (*chosen, *found):
        for wish in _WISHES:
            try:
                path = folder / f"{_digest(compiler, wish)}.so"
                if not path.exists():
                    _compile(compiler, wish, path)
                return ctypes.CDLL(str(path))
            except (OSError, subprocess.SubprocessError):  # an option that this compiler does not know, say
                continue
    return None


def _compile(compiler: list[str], wish: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # ranks may compile at the same time
        made = Path(folder) / path.name
        sources = [str(here / name) for name in _SOURCES]
        command = [*compiler, *_FLAGS.split(), *wish.split(), *sources, "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        made.replace(path)  # atomic: another rank loads a whole library or none


def _digest(compiler: list[str], wish: str) -> str:
    """Digest of all that decides the machine code: machines that differ may share a home folder."""
    texts = [(Path(__file__).parent / name).read_text() for name in (*_SOURCES, *_HEADERS)]
    described = Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    processor = "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    parts = [*texts, _FLAGS, wish, *compiler, *platform.uname()[4:], processor]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
