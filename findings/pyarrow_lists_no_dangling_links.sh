#!/usr/bin/env bash
# pyarrow 26.0.1, LocalFileSystem.get_file_info with a recursive FileSelector.
# One would expect a link to a missing file in the list, if only as "not found", for that is the answer when asked by name.
# The listing leaves it out without a word, while a link to a file that is there is listed as a file.
# It hurts whoever builds a data set out of links: a part whose disk is not mounted is missing, and nothing says so.
# Our product lists corpora this way: a path that is itself such a link is refused, one in a folder is told as left out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q pyarrow==26.0.1

mkdir -p parts/deep
echo text >parts/deep/file
ln -s file parts/deep/good_link
ln -s missing parts/deep/dangling_link

timeout 60 venv/bin/python - <<'EOF'
import os
import sys

from pyarrow.fs import FileSelector, FileType, LocalFileSystem

local = LocalFileSystem()
listed = sorted(info.base_name for info in local.get_file_info(FileSelector("parts/deep", recursive=True)))
asked = local.get_file_info("parts/deep/dangling_link").type
print("the folder holds", sorted(os.listdir("parts/deep")))
print("pyarrow lists   ", listed)
print("asked by name, the dangling link is", asked.name)
if listed != ["file", "good_link"] or asked != FileType.NotFound:
    sys.exit("Changed: pyarrow no longer passes over the dangling link.")
EOF
