"""What a process holds of a split does not grow with the split's tokens."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.corpus.rows import SHARD_SCHEMA
from pipeline.corpus.writing import write_rows

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]
READER = """
import sys
from pathlib import Path
from pipeline.corpus.reader import SplitRef, open_split
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("RssAnon:")))
open_split(SplitRef(sys.argv[1]))  # so that libraries are loaded
before = anonymous()
split = open_split(SplitRef(sys.argv[2], 0.1, 1.0))
read = sum(int(split.input_ids(row).sum() + split.target_ids(row).sum()) for row in range(0, len(split), 7))
read += sum(len(split.target(row)) for row in range(500))
print(anonymous() - before, len(list(Path("/proc/self/fd").iterdir())))
"""


def split_of(folder: Path, rows: int) -> Path:
    chance = np.random.default_rng(0)
    tokens = chance.integers(0, 1000, (rows, 200)).astype(np.int32)
    columns = [
        chance.integers(0, 2**63, rows).astype(np.uint64) * 2,
        np.zeros(rows, np.int8),
        pa.ListArray.from_arrays(np.arange(0, tokens.size + 1, 200, dtype=np.int32), tokens.ravel()),
        pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32), np.ones(rows, np.int32)),
        pa.array(["yes"] * rows),
    ]
    write_rows(folder, pa.table(columns, schema=SHARD_SCHEMA))
    return folder


def test_a_split_of_eighty_megabytes_is_read_in_less_than_four(tmp_path: Path) -> None:
    small, large = split_of(tmp_path / "small", 1000), split_of(tmp_path / "large", 100_000)
    assert sum(file.stat().st_size for file in large.iterdir()) > 80e6
    command = [sys.executable, "-c", READER, str(small), str(large)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    kib, open_files = map(int, done.stdout.split())
    assert kib < 4096, f"{kib} KiB"
    assert open_files < 16, "a mapped shard holds no open file"
