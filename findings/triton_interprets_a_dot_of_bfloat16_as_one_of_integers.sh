#!/usr/bin/env bash
# triton 3.9.0, tl.dot of bfloat16 under TRITON_INTERPRET=1.
# One would expect the interpreter to give what a GPU gives, up to rounding.
# It keeps bfloat16 as unsigned integers of 16 bits and multiplies these: the product of ones is 16256 times 16256 a pair.
# It hurts whoever tests a kernel without a GPU in the type that it will run in: the test fails although the kernel is right.
# Our product tests its kernels by the interpreter in float16 and float32 alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0 numpy
venv/bin/pip install -q --no-deps triton==3.9.0

cat > product.py <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def product(x, y, SIDE: tl.constexpr):
    places = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    of_x = tl.load(x + places)
    tl.store(y + places, tl.dot(of_x, of_x))


seen = {}
for kind in (torch.float32, torch.float16, torch.bfloat16):
    x, y = torch.ones(16, 16, dtype=kind), torch.empty(16, 16)
    product[(1,)](x, y, SIDE=16)
    seen[kind] = y[0, 0].item()
    print(kind, "ones by ones, of 16 terms:", seen[kind])
if seen[torch.bfloat16] == 16:
    sys.exit("Changed: the interpreter multiplies bfloat16 as numbers.")
PYTHON
TRITON_INTERPRET=1 timeout 120 venv/bin/python product.py
