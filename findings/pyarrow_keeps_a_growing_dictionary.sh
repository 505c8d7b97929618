#!/usr/bin/env bash
# pyarrow 26.0.1, ParquetFile(read_dictionary=[column]).iter_batches.
# One would expect less memory than plain reading, and a dictionary no larger than what a batch of 1,000 rows can use.
# All batches of a row group share one dictionary that grows, so texts that differ are held until the row group ends.
# It hurts whoever reads large row groups in small batches: memory is that of all texts of the row group.
# Our product reads corpora as plain texts, and takes dictionaries only where a file's own schema asks for them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q pyarrow==26.0.1

timeout 60 venv/bin/python - <<'EOF'
import sys

import pyarrow as pa
import pyarrow.parquet as pq

ROWS, BATCH = 50_000, 1_000
texts = pa.table({"text": [f"{row:08d}" * 25 for row in range(ROWS)]})
pq.write_table(texts, "texts.parquet", row_group_size=ROWS, data_page_size=1 << 16)
del texts


def most_held(read_dictionary):
    before, most, sizes = pa.total_allocated_bytes(), 0, []
    with pq.ParquetFile("texts.parquet", read_dictionary=read_dictionary) as file:
        for batch in file.iter_batches(BATCH, use_threads=False):
            most = max(most, pa.total_allocated_bytes() - before)
            sizes.append(len(batch["text"].dictionary) if read_dictionary else 0)
    return most, sizes


plain, _ = most_held([])
as_dictionary, sizes = most_held(["text"])
print(f"plain: {plain:,} bytes; as a dictionary: {as_dictionary:,} bytes; ratio {as_dictionary / plain:.1f}")
print(f"entries of the dictionary: {sizes[0]:,} in the first batch, {sizes[-1]:,} in the last, of {BATCH:,} rows each")
if sizes[-1] < ROWS or as_dictionary < 3 * plain:
    sys.exit("Changed: the dictionary of a batch no longer grows over the row group.")
EOF
