"""Where the time of a rounding loop goes: `python tests/bench/quantize_profile.py`.

A loop that reads and writes each element once can hide as many instructions behind the copy of an element as the
core gets through while memory moves it. Per 16 elements (one AVX-512 register of float32) that is the time of
`copy_` for 64 bytes in and out if they are float32, and for half as many if they are bfloat16: the same arithmetic
has half the room. So each loop is measured on tensors in memory, by `copy_`, and on tensors in the second-level cache,
where arithmetic alone counts; and with parts left out:

    constant draw     the hash is replaced by a number, everything else stays
    widen and narrow  elements become float32, are multiplied by one, and go back
    words             elements are loaded and stored as they are

Instructions are counted in the machine code of the loop over whole vectors, and given per 16 elements; where no such
loop is found (no AVX-512) they are missing. All times come from one run, one thread, each loop between two copies.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from altgrad.quantization import get_format
from altgrad.quantization.kernels import cpu, grid_of, loops

sys.path.insert(0, str(Path(__file__).parent))
from quantize import provenance

SAVED = Path(__file__).parents[2] / "docs" / "bench" / "quantize_profile.md"
IN_CACHE = 1 << 17
GRID = grid_of(get_format("E4M3"))
_load, _store, _bits, _drawn, _finished = loops._load, loops._store, loops._bits, loops._drawn, loops._finished
_scaled, _constants = loops._scaled, loops._constants
U32, F32 = np.uint32, np.float32


def constant_draw(x, out, scale, inverse, constants):  # type: ignore[no-untyped-def]
    c, scale = _constants(constants), F32(scale)
    for i in range(x.size):
        bits = _bits(_scaled(_load(x[i]), scale, inverse))
        value = _finished(bits, _drawn(U32(bits & U32(0x7FFFFFFF)), U32(0x2AAAAAAA), c), c)
        out[i] = _store(F32(value * scale), x[i])


def widen_and_narrow(x, out, scale):  # type: ignore[no-untyped-def]
    scale = F32(scale)
    for i in range(x.size):
        out[i] = _store(F32(_load(x[i]) * scale), x[i])


def words(x, out):  # type: ignore[no-untyped-def]
    for i in range(x.size):
        out[i] = x[i]


class Loop(NamedTuple):
    """A loop, and what it takes beside its arrays."""

    name: str
    dtype: torch.dtype
    function: Callable[..., None]
    numbers: tuple[Any, ...]


class Row(NamedTuple):
    """A measured loop; ns are per 16 elements."""

    loop: Loop
    instructions: float | None
    cached: float
    memory: float
    ratio: float


def all_loops() -> list[Loop]:
    """Both roundings of both dtypes, and the stochastic ones with parts left out."""
    stochastic = (1.0, 1.0, cpu._constants(GRID, "stochastic", "saturate"))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        nearest, numbers = cpu._loop(dtype, 1.0, GRID, "nearest", "saturate")
        found += [
            Loop("nearest", dtype, nearest.py_func, numbers),  # type: ignore[attr-defined]
            Loop("stochastic", dtype, loops.round_stochastic.py_func, (*stochastic, 1, 2, 0)),  # type: ignore[attr-defined]
            Loop("stochastic, constant draw", dtype, constant_draw, stochastic),
            Loop("widen and narrow", dtype, widen_and_narrow, (1.0,)),
            Loop("words", dtype, words, ()),
        ]
    return found


def measure(loop: Loop, elements: int, rounds: int) -> Row:
    """The loop compiled anew, for the machine code of a cached one cannot be read."""
    kernel = numba.njit(nogil=True, error_model="numpy")(loop.function)
    source = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(loop.dtype)
    memory, ratio = _beside_copies(kernel, loop, source, rounds)
    cached, _ = _beside_copies(kernel, loop, source[: min(IN_CACHE, elements)].clone(), 20 * rounds)
    return Row(loop, instructions(kernel), cached, memory, ratio)


def _beside_copies(kernel: Any, loop: Loop, source: Tensor, rounds: int) -> tuple[float, float]:
    """Median ns per 16 elements, and × the copies before and after."""
    target = torch.empty_like(source)
    arrays = cpu._words(source), cpu._words(target)
    kernel(*arrays, *loop.numbers), target.copy_(source)
    own, ratio = [], []
    for _ in range(rounds):
        times = [
            _seconds(lambda: target.copy_(source)),
            _seconds(lambda: kernel(*arrays, *loop.numbers)),
            _seconds(lambda: target.copy_(source)),
        ]
        own.append(times[1])
        ratio.append(2 * times[1] / (times[0] + times[2]))
    return statistics.median(own) * 16e9 / len(source), statistics.median(ratio)


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def instructions(kernel: Any) -> float | None:
    """Instructions per 16 elements in the longest innermost loop on 512-bit registers; None without one."""
    (assembly,) = kernel.inspect_asm().values()
    (signature,) = kernel.signatures
    lines = [line.strip() for line in assembly.split("\n")]
    place = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.LBB\w+:", line)}
    bodies = []
    for i, line in enumerate(lines):
        jump = re.fullmatch(r"j\w+\s+(\.LBB\w+)", line)
        if jump and place.get(jump[1], i) < i:
            body = [one for one in lines[place[jump[1]] : i + 1] if one and not one.startswith((".", "#"))]
            is_innermost = not any(place[jump[1]] < other < i for other in place.values())
            stores = [one for one in body if re.match(r"vmov\w+\s+%[xyz]mm\d+, [^%]*\(", one)]
            if is_innermost and stores and any("zmm" in one for one in body):
                # Every vector of 512 bits that is stored holds so many elements.
                width = sum({"x": 16, "y": 32, "z": 64}[one.split("%")[1][0]] for one in stores)
                bodies.append(16 * len(body) / (8 * width / signature[0].dtype.bitwidth))
    return max(bodies) if bodies else None


def as_markdown(rows: list[Row]) -> str:
    """The table and what it says."""
    head = ["loop", "dtype", "instructions", "ns in cache", "ns in memory", "× copy_"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        dtype = str(row.loop.dtype).removeprefix("torch.")
        count = "–" if row.instructions is None else f"{row.instructions:.0f}"
        numbers = [f"{row.cached:.2f}", f"{row.memory:.2f}", f"{row.ratio:.2f}"]
        lines.append(" | ".join([row.loop.name, dtype, count, *numbers]))
    body = "\n".join(f"| {line} |" for line in lines)
    return (
        f"# Where the time of fake quantization goes, per 16 elements\n\n{provenance()}\n\n{body}\n\n"
        f"{conclusion(rows)}\n"
    )


def conclusion(rows: list[Row]) -> str:
    """Why stochastic rounding of bfloat16 is not at the speed of memory, in this run's figures."""
    by = {(row.loop.name, row.loop.dtype): row for row in rows}
    wide, half = by["stochastic", torch.float32], by["stochastic", torch.bfloat16]
    constant, nearest = by["stochastic, constant draw", torch.bfloat16], by["nearest", torch.bfloat16]
    shell = by["widen and narrow", torch.bfloat16]
    room = {row.loop.dtype: row.memory / row.ratio for row in (wide, half)}
    return (
        f"A copy takes {room[torch.float32]:.2f} ns for 16 elements of float32 and {room[torch.bfloat16]:.2f} ns for "
        f"16 of bfloat16. The arithmetic of stochastic rounding takes {wide.cached:.2f} ns and {half.cached:.2f} ns by "
        f"itself, in cache: {wide.cached / room[torch.float32]:.1f} and {half.cached / room[torch.bfloat16]:.1f} times "
        "the copy. Memory hides what stays well below 1; what comes near it or lies above is bound by arithmetic. Of "
        f"the time for bfloat16 in cache the hash makes {half.cached - constant.cached:.2f} ns, widening and narrowing "
        f"{shell.cached:.2f} ns, and the rounding the rest. The 16-bit loop that nearest rounding has "
        f"({nearest.cached:.2f} ns) does not carry over: a draw of 31 bits meets fractions that have as many, far "
        "below the normals, so 32-bit lanes are needed, and with them twice the registers."
    )


def main() -> None:
    """Measures, prints and saves the profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24, help="of each tensor")
    parser.add_argument("--rounds", type=int, default=21, help="of which the median is kept")
    parser.add_argument("--save", type=Path, default=SAVED, help="markdown file to write")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = as_markdown([measure(loop, asked.elements, asked.rounds) for loop in all_loops()])
    asked.save.parent.mkdir(parents=True, exist_ok=True)
    asked.save.write_text(text)
    print(text)


@pytest.mark.bench
def test_the_profile_runs_and_prints_its_table() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        text = as_markdown([measure(loop, 1 << 16, 3) for loop in all_loops()])
    finally:
        torch.set_num_threads(before)
    assert text.count("| stochastic ") == 2 and text.count("| words ") == 2


if __name__ == "__main__":
    main()
