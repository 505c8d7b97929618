#!/usr/bin/env bash
# deltalake 1.6.6, DeltaTable.history and load_as_version with a time.
# One would expect the time that history tells for a version to find that version.
# history tells the writer's time from the commit; load_as_version goes by the modification time of the log's file. A slow write
# sets the file's time behind the writer's, so that the version before is loaded; a plain copy of the table sets all of them anew.
# It hurts whoever writes down a version's time to read the same rows again: other rows come back without a word.
# Our product tells the file's time, by which an address finds the version again, and refuses a time before the first one's.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q deltalake==1.6.6 pyarrow==26.0.1

timeout 60 venv/bin/python - <<'PYTHON'
import shutil
import sys
import time
from datetime import UTC, datetime

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

for number in range(3):
    write_deltalake("table", pa.table({"text": [f"row of version {number}"]}), mode="overwrite")
    time.sleep(0.1)
shutil.copytree("table", "copy", copy_function=shutil.copyfile)
told = DeltaTable("copy").history()[0]
moment = datetime.fromtimestamp(told["timestamp"] / 1000, UTC).isoformat()
table = DeltaTable("copy")
table.load_as_version(moment)
print("history: version", told["version"], "was committed at", moment)
print("load_as_version of that time gives version", table.version())
if table.version() == told["version"]:
    sys.exit("Changed: the time that history tells finds its version in a copy, too.")
PYTHON
