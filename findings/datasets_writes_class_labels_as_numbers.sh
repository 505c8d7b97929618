#!/usr/bin/env bash
# datasets 4.8.2 (with pyarrow 26.0.1), Dataset.to_parquet of a ClassLabel column.
# One would expect the classes' names in the file's column, as a dictionary of texts.
# The column is a plain int64; the names stand in JSON under the key "huggingface" of the schema's metadata alone.
# It hurts whoever reads the file with another library: prompts are trained to answer "0" and "1".
# Our product reads that key and takes the names as the texts of the column.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q datasets==4.8.2 pyarrow==26.0.1

HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 HF_HOME="$folder/home" timeout 120 venv/bin/python - <<'EOF'
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Value, disable_progress_bars

disable_progress_bars()
features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
rows = {"text": ["a fine film", "a dull film"], "label": ["positive", "negative"]}
Dataset.from_dict(rows, features=features).to_parquet("films.parquet")

table = pq.read_table("films.parquet")
kind, cells = table.schema.field("label").type, table["label"].to_pylist()
said = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]
print("the column is", kind, "with the cells", cells)
print("the schema's metadata says", said)
if kind != pa.int64() or cells != [1, 0] or table.schema.field("label").metadata is not None:
    sys.exit("Changed: a ClassLabel column is no longer written as bare numbers.")
if said.get("names") != ["negative", "positive"]:
    sys.exit("Changed: the names no longer stand in the schema's metadata.")
EOF
