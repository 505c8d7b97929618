#!/usr/bin/env bash
# pylance 14.0.2, lance.dataset with asof.
# One would expect the timestamp that versions() tells of a version to find that version.
# The stored time has nanoseconds, versions() tells whole microseconds, and asof takes what is not later: so the version before is
# opened without a word, and of the first version the library says that there was none yet.
# It hurts whoever writes down a version's time to read the same rows again.
# Our product tells a time that is one microsecond later, by which its own addresses find the version again.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q pylance==14.0.2 pyarrow==26.0.1

timeout 60 venv/bin/python - <<'PYTHON'
import sys

import lance
import pyarrow as pa

for number in range(5):
    lance.write_dataset(pa.table({"row": [number]}), "table", mode="overwrite")
found = {}
for version in lance.dataset("table").versions()[1:]:
    moment = version["timestamp"].replace(tzinfo=None)
    found[version["version"]] = lance.dataset("table", asof=moment).version
    print("version", version["version"], "was written at", moment, "and asof that time gives", found[version["version"]])
# One time in a thousand has no nanoseconds beyond its microseconds.
if all(asked == given for asked, given in found.items()):
    sys.exit("Changed: a version's own time finds it.")
PYTHON
