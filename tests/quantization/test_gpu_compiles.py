"""The operands' Triton kernels compile for an NVIDIA GPU, without one: the interpreter forgives what Triton does not.

In a process of its own, since kernels are compiled or interpreted as the environment said when they were defined.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from altgrad.quantization.kernels import gpu_lines, gpu_programs

TYPES = {
    "x_pointer": "*fp32", "y_pointer": "*fp32", "out_pointer": "*fp32", "scales_pointer": "*fp32",
    "scale_pointer": "*fp32", "bias_pointer": "*fp32", "first": "i64", "partial": "*i32", "history": "*fp32",
    "gathered": "*fp32", "opening": "*fp32",
}
INTEGERS = ("lines", "columns", "each", "size", "second", "u", "emax", "elements", "rounds", "length")
FORMAT = {"SHIFT": 20, "OFFSET": 968, "MAX_INDEX": 126}
FORMATS = FORMAT | {f"SCALE_{name}": value for name, value in FORMAT.items()}


def check(kernel, constants, **types):
    signature, known = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], known[place,] = "constexpr", constants[name]
        else:
            signature[name] = types.get(name) or TYPES.get(name) or ("i32" if name in INTEGERS else "fp32")
    options = {"num_warps": 4, "enable_fp_fusion": False}
    source = ASTSource(fn=kernel, signature=signature, constexprs=known)
    text = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert ".ftz" not in text and "div.full" not in text and "div.approx" not in text, kernel
    assert "fma.rn.f32" not in text, kernel


KINDS = ((0, 1, 2048, False), (1, 64, 32, True), (2, 128, 16, False), (2, 2048, 1, True))
for kind, lines, width, is_bfloat16 in KINDS:
    for ones in ({}, {"each": 1}, {"lines": 1, "each": 1, "size": 1, "columns": 1}):
        check(
            gpu_lines._round_lines,
            FORMATS | ones | {
                "KIND": kind, "POWER_OF_TWO": kind == 0, "PARTS": 64, "LINES": lines, "WIDTH": width,
                "ODD": 1, "STOCHASTIC": is_bfloat16, "IS_BFLOAT16": is_bfloat16,
            },
            x_pointer="*i16" if is_bfloat16 else "*fp32",
        )
for ones in ({}, {"rounds": 1, "lines": 1, "each": 1}):
    check(gpu_lines._largest_block, ones | {"PARTS": 64, "LINES": 128, "WIDTH": 16, "IS_BFLOAT16": False})
for is_bfloat16 in (False, True):
    check(
        gpu_programs.largest_parts_of,
        {"PARTS": 1024, "IS_BFLOAT16": is_bfloat16, "BLOCK": 2048},
        x_pointer="*i16" if is_bfloat16 else "*fp32",
    )
    for factors, has_bias in ((0, True), (1, False), (2, True)):
        check(
            gpu_programs.scale_and_add,
            {"FACTORS": factors, "HAS_BIAS": has_bias, "WRITES_BFLOAT16": is_bfloat16, "BLOCK": 2048},
            first="*fp32", second="*fp32", out_pointer="*i16" if is_bfloat16 else "*fp32",
        )
ROUND = FORMAT | {
    "POWER_OF_TWO": False, "ODD": 1, "STOCHASTIC": False, "SATURATES": True, "IS_BFLOAT16": False,
    "WRITES_BFLOAT16": True, "BLOCK": 2048,
}
for parts, delayed, has_history, advances, shared in (
    (0, False, False, False, False), (1024, False, False, False, False), (1, True, True, True, False),
    (1024, True, False, True, False), (0, True, True, False, False), (0, True, False, False, True),
):
    check(
        gpu_programs.round_elements,
        ROUND | {
            "PARTS": parts, "DELAYED": delayed, "HAS_HISTORY": has_history, "WINDOW": 16, "ADVANCES": advances,
            "SHARED": shared, "UNSCALED": parts > 0 or delayed,
        },
        out_pointer="*i16",
    )
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (extra 'gpu')")
def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    script = tmp_path / "compile_kernels.py"
    script.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
