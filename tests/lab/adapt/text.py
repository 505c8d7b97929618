"""Plain text whose words follow from one another, as Parquet."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.tiny import WORDS


def documents(count: int = 60, seed: int = 0) -> list[str]:
    """Each word's follower is one of two, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        at, words = int(rng.integers(len(WORDS))), []
        for _ in range(int(rng.integers(10, 40))):
            words.append(WORDS[at])
            at = (at * 2 + int(rng.integers(2))) % len(WORDS)
        out.append(" ".join(words))
    return out


def write_text(path: Path, texts: list[str | None]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path)
    return path
