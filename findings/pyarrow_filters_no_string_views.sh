#!/usr/bin/env bash
# pyarrow 26.0.1, RecordBatch.filter and Table.filter with a column of the type string_view.
# One would expect the rows that pass, as for string and large_string: such a column is read, sliced, cast and printed.
# Arrow answers "Function 'array_take' has no kernel" or the like, for a mask as for an expression.
# It hurts whoever reads files of deltalake 1.6 or polars, whose updates and deletes write string views, and then filters them.
# Our product casts string views to large strings before it takes out deleted rows or applies a filter.
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

pq.write_table(pa.table({"text": pa.array(["a", "b", "c"], pa.string_view())}), "a.parquet")
batch = next(pq.ParquetFile("a.parquet").iter_batches())
mask = pa.array([True, False, True])
for kind in (pa.string(), pa.string_view()):
    column = pa.record_batch({"text": batch["text"].cast(kind)})
    try:
        print(kind, "->", column.filter(mask)["text"].to_pylist())
        filtered = True
    except pa.ArrowNotImplementedError as error:
        print(kind, "->", error)
        filtered = False
if batch["text"].type != pa.string_view() or filtered:
    sys.exit("Changed: pyarrow filters string views.")
EOF
