#!/usr/bin/env bash
# deltalake 1.6.6, DeltaTable.load_as_version with a time.
# One would expect a time before the first commit to be refused, as Spark refuses it: there was no table then.
# It loads version 0 without a word, so that "the rows of January" are rows that were written in November.
# It hurts whoever asks for the past to leave newer rows out, say to evaluate on what was not known yet.
# Our product compares the time with that of the commit which it was given, and refuses an earlier one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q deltalake==1.6.6 pyarrow==26.0.1

timeout 60 venv/bin/python - <<'EOF'
import sys

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError

write_deltalake("table", pa.table({"text": ["written today"]}))
table = DeltaTable("table")
print("first commit:", table.history()[-1]["timestamp"], "(milliseconds)")
try:
    table.load_as_version("2001-01-01T00:00:00Z")
except (DeltaError, ValueError) as error:
    sys.exit(f"Changed: a time before the first commit is refused ({error}).")
print("at 2001-01-01:", "version", table.version(), pa.table(table.scan().read_all()).to_pylist())
EOF
