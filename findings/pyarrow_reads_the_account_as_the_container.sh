#!/usr/bin/env bash
# pyarrow 26.0.1, FileSystem.from_uri with an address of Azure.
# Spark, fsspec and obstore read abfs://container@account/path as the container first and the account behind the @.
# pyarrow reads a short name before the @ as the account and the host as the container, so both change places.
# With the account's full host (account.dfs.core.windows.net) it agrees with the others.
# It hurts whoever moves such an address from one library to another: a wrong account is asked, without an error here.
# Our product splits the short address itself and gives pyarrow the account and the path apart.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q pyarrow==26.0.1

timeout 60 venv/bin/python - <<'EOF'
import sys

from pyarrow.fs import AzureFileSystem, FileSystem


def is_for(account, filesystem):
    return filesystem == AzureFileSystem(account)  # no request is sent


short, short_path = FileSystem.from_uri("abfs://container@account/path")
full, full_path = FileSystem.from_uri("abfs://container@account.dfs.core.windows.net/path")
for name, filesystem, path in (("short", short, short_path), ("full", full, full_path)):
    account = next((a for a in ("account", "container") if is_for(a, filesystem)), "another")
    print(f"{name} address: the account is {account!r}, the path is {path!r}")
if not is_for("account", full) or full_path != "container/path":
    sys.exit("Changed: pyarrow reads the full address in another way.")
if not is_for("container", short) or short_path != "account/path":
    sys.exit("Changed: pyarrow no longer takes the container of the short address for its account.")
EOF
