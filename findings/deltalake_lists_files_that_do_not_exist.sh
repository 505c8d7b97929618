#!/usr/bin/env bash
# deltalake 1.6.6, DeltaTable.file_uris of a local table in a folder with a space in its name.
# One would expect paths that exist: the documentation says "just plain absolute paths, without a scheme".
# The folder is written as in a URL (%20), while the part inside the table is not, so that neither reading of it is right.
# It hurts whoever hands these paths to another reader of Parquet: the files are "not found", or a wrong folder is read.
# Our product joins the table's folder and the log's own paths, which it decodes, and uses of these lists only the names.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q deltalake==1.6.6 pyarrow==26.0.1

timeout 60 venv/bin/python - <<'EOF'
import os
import sys

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

write_deltalake("my table", pa.table({"text": ["a"], "lang": ["en gb"]}), partition_by=["lang"])
(path,) = DeltaTable("my table").file_uris()
there = [os.path.join(folder, name) for folder, _, names in os.walk("my table") for name in names if name.endswith("parquet")]
print("on the disk:", there)
print("file_uris:  ", path)
print("exists:", os.path.exists(path))
if os.path.exists(path):
    sys.exit("Changed: the path exists.")
EOF
