"""Compile every Triton kernel for some GPUs, none of which is needed for it; tells what each takes, as JSON.

`python compile_kernels.py bf16 128 80` compiles for bfloat16, heads of 128 and compute capability 8.0.
"""

import json
import sys

import triton
from triton.backends.compiler import GPUTarget

from pipeline.backbone.gpu import attention_kernels, row_kernels

INTEGERS = "given heads key_heads width"
TABLES = "of_block firsts starts sizes parents first_below below"
FLOATS = "scaling direction smallest epsilon"
OF_ONE_TYPE = {"rows_pointer": "*i8", "gate_rows": "*i8", "up_rows": "*i8", "product": "*i32"}
IN_FLOAT32 = (
    "log_sums shares cosine sine columns scales row_scales inverses gates ups of_gate of_up gate_scales up_scales"
)


def compiled(kernel, kind: str, target: GPUTarget, constants: dict[str, int]) -> dict[str, int]:
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in INTEGERS.split():
            signature[name] = "i32"
        elif name in TABLES.split():
            signature[name] = "*i32"
        elif name in FLOATS.split():
            signature[name] = "fp32"
        elif name in OF_ONE_TYPE:
            signature[name] = OF_ONE_TYPE[name]
        else:
            signature[name] = "*fp32" if name in IN_FLOAT32.split() else f"*{kind}"
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=target)
    return {"shared": made.metadata.shared, "cubin": len(made.asm["cubin"])}


def main(kind: str, size: int, capability: int) -> None:
    target = GPUTarget("cuda", capability, 32)
    tiles = {"SIZE": size, "WIDE": size, "M": 32, "N": 32}
    kernels = [attention_kernels.forward, attention_kernels.backward_queries, attention_kernels.backward_keys]
    found = {kernel.__name__: compiled(kernel, kind, target, tiles) for kernel in kernels}
    turned = {"HALF": size // 2, "WIDE": size // 2, "HEADS": 32}
    found["rotate"] = compiled(attention_kernels.rotate, kind, target, turned)
    for kernel in (row_kernels.quantize, row_kernels.rescale):
        found[kernel.__name__] = compiled(kernel, kind, target, {"SCALED": True, "BLOCK": 1024})
    norm = {"PLUS_ONE": True, "BLOCK": 1024}
    found["rms_norm"] = compiled(row_kernels.rms_norm, kind, target, norm | {"IN_FLOAT32": False})
    found["rms_norm_backward"] = compiled(row_kernels.rms_norm_backward, kind, target, norm)
    for kernel in (row_kernels.gated_rows, row_kernels.gated_gradients):
        found[kernel.__name__] = compiled(kernel, kind, target, {"SILU": False, "BLOCK": 1024})
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
