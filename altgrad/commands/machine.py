"""What is asked of this installation: formats, the matrix of combinations, the doctor."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record.folder import PACKAGES, cores, installed
from altgrad.sweep.record.monitor import print_table


def formats(request: argparse.Namespace) -> int:
    from altgrad.quantization import FORMATS, get_format

    try:
        asked = [get_format(name) for name in request.names] or FORMATS.values()
    except ValueError as error:
        raise SpecError(str(error)) from None
    table: list[tuple[str, ...]] = [
        ("format", "bits", "exponent", "mantissa", "bias", "max", "min normal", "min subnormal", "inf", "nan")
    ]
    for fmt in asked:
        whole = (fmt.total_bits, fmt.exponent_bits, fmt.mantissa_bits, fmt.bias)
        real = (fmt.max, fmt.min_normal, fmt.min_subnormal)
        table.append((fmt.name, *map(str, whole), *map(_number, real), *map(_yes_no, (fmt.has_inf, fmt.has_nan))))
    print_table(table)
    if not request.names:
        print("and by name, other ExMy of 4 to 16 bits, INT8 and INT4, and what others call theirs:")
        print("altgrad formats E2M3 E4M3/finite E4M3b11/fnuz INT8 binary8p3 binary8p4sf float8_e4m3fn F8_E5M2")
    return 0


def _yes_no(value: bool) -> str:
    return "yes" if value else "no"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def test_matrix(request: argparse.Namespace) -> int:
    from altgrad.analysis.test_matrix import render

    path, text = Path("TEST_MATRIX.md"), render()
    if request.check:
        same = path.exists() and path.read_text(encoding="utf-8") == text
        print(f"{path} is {'current' if same else 'not current: run altgrad test-matrix'}")
        return 0 if same else 1
    path.write_text(text, encoding="utf-8")
    print(f"{path} written")
    return 0


def doctor(request: argparse.Namespace) -> int:
    import platform

    import torch

    from altgrad.quantization.kernels.dispatch import kernel_report

    try:
        kernels = kernel_report()
    except (ValueError, ModuleNotFoundError) as error:
        raise SpecError(str(error)) from None
    versions = [(name, installed(name) or "missing") for name in PACKAGES]
    print_table(
        [
            ("python", platform.python_version()),
            *versions,
            ("cores", str(cores())),
            *kernels,
            ("cuda", _yes_no(torch.cuda.is_available())),
        ]
    )
    missing = [name for name, version in versions if version == "missing"]
    if missing:
        print(f"altgrad: missing: {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0
