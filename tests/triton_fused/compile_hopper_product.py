"""Compile every form of ``hopper_product_kernel`` for a Hopper GPU, on any machine: a program of its own, since Triton
is told before its import not to interpret. Prints the shared memory that each form takes, in bytes."""

from __future__ import annotations

import os
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from sdpo_implementations.triton_fused.kernels import hopper_product as module

HALF = module.ROWS // 2
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def descriptor(dtype: torch.dtype, rows: int, columns: int) -> str:
    """A tensor descriptor's type, as Triton writes it."""
    return f"tensordesc<{NAMES[dtype]}[{rows}, {columns}],{module._layout((rows, columns), dtype)!r}>"


def compile_form(dtype: torch.dtype, stored: str, takes: bool, masked: bool) -> int:
    parts = {"exponentials": module.PARTS_OF_EXPONENTIALS, "logits": module.PARTS_OF_LOGITS}.get(stored, 1)
    constants: dict[str, Any] = {
        "ROWS": module.ROWS, "COLUMNS": module.COLUMNS, "INNER": module.INNER, "GROUP": module.GROUP,
        "STAGES": module.STAGES, "MASKED": masked, "TAKES": takes, "STORED": stored, "PARTS": parts, "num_warps": 4,
    }  # fmt: skip
    types = {
        "hidden": descriptor(dtype, HALF, module.INNER),
        "head": descriptor(dtype, module.COLUMNS, module.INNER),
        "links": "*i32",
        "most_above": "fp32",
        **dict.fromkeys(("n_rows", "n_columns", "width", "n_entries"), "i32"),
    }
    if stored == "nothing":
        constants["buffer"] = None
    else:
        types["buffer"] = descriptor(torch.float32 if stored == "logits" else dtype, HALF, module.COLUMNS // parts)
    kernel = module.hopper_product_kernel.kernel
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    source = GluonASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, {})
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    return int(compiled.metadata.shared)


if __name__ == "__main__":
    for form in (
        (torch.bfloat16, "nothing", False, False),
        (torch.float16, "nothing", True, True),
        (torch.bfloat16, "exponentials", True, True),
        (torch.bfloat16, "logits", False, False),
    ):
        print(compile_form(*form))
