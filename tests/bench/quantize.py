"""How long fake quantization takes, in units of copying the same tensor: `python tests/bench/quantize.py`.

A copy into a preallocated tensor reads and writes every element once, which is all that rounding in place of
copying could cost at best; so the ratio to it is what a kernel adds to memory's own price, and it carries over
between machines where milliseconds do not. Every rival is called once between two copies and compared with
these, and the median over the rounds is kept: a neighbour on the machine slows both alike.

The copy is always of the full size, and times are compared per element: a copy that fits a cache would make
whatever ran on few elements look worse. Before each column the copy is timed alone, and a column whose copy is
slower than one thread's holds no ratios: where another process has the second core, torch's threads wait for
each other spinning, the copy takes up to seventy times as long, and everything divided by it looks fast.

Ours writes into the very tensor that the copy writes: another one of the same size costs a copy up to 1.09
times as much, as the caches hold less of it, and that would be counted against the kernel. Rivals do what their
public call does, which for most includes the allocation of the result; slow ones run on fewer elements, as the
table says. Rivals that are not installed are listed as such (the extra `bench` installs them).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from altgrad.quantization import quantize

SPLITS = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
SAVED = Path(__file__).parents[2] / "docs" / "bench" / "quantize.md"
SLOW = 1 << 20


class Case(NamedTuple):
    """One line of the table: what runs, on how many elements at most, and what it does."""

    name: str
    dtype: torch.dtype
    limit: int
    prepare: Callable[[Tensor, Tensor], Callable[[], object]]
    """From the input and a tensor for the result, which rivals that allocate one leave alone."""


class Row(NamedTuple):
    """A measured case; `ratio` by number of threads."""

    name: str
    dtype: str
    elements: int
    ratio: dict[int, float]


def ours() -> Iterator[Case]:
    """Every 8-bit split, nearest and stochastic, in float32 and bfloat16, and a scale that divides."""
    for dtype in (torch.float32, torch.bfloat16):
        for rounding in ("nearest", "stochastic"):
            for name in SPLITS:
                yield Case(f"altgrad {name} {rounding}", dtype, 1 << 40, _ours(name, rounding, 1.0))
            yield Case(f"altgrad E4M3 {rounding}, scale 0.37", dtype, 1 << 40, _ours("E4M3", rounding, 0.37))


def _ours(name: str, rounding: str, scale: float) -> Callable[[Tensor, Tensor], Callable[[], object]]:
    def prepare(x: Tensor, out: Tensor) -> Callable[[], object]:
        return lambda: quantize(x, name, scale, rounding=rounding, seed=1, out=out)

    return prepare


def torch_casts() -> Iterator[Case]:
    """torch's float8 types, there and back."""
    for dtype in (torch.float32, torch.bfloat16):
        for name, small in (("E4M3", torch.float8_e4m3fn), ("E5M2", torch.float8_e5m2)):
            yield Case(f"torch cast {name}", dtype, 1 << 40, lambda x, _, small=small: lambda: x.to(small).to(x.dtype))


def rivals() -> Iterator[Case]:
    """The other packages that are installed."""
    if _has("ml_dtypes"):
        import ml_dtypes

        def cast(x: Tensor, _: Tensor) -> Callable[[], object]:
            array = x.numpy()
            return lambda: array.astype(ml_dtypes.float8_e4m3fn).astype("float32")

        yield Case("ml_dtypes E4M3", torch.float32, 1 << 22, cast)
    if _has("gfloat"):
        import gfloat
        from gfloat.formats import format_info_ocp_e4m3

        def round_gfloat(x: Tensor, _: Tensor) -> Callable[[], object]:
            array = x.double().numpy()
            return lambda: gfloat.round_ndarray(format_info_ocp_e4m3, array, sat=True)

        yield Case("gfloat E4M3", torch.float32, SLOW, round_gfloat)
    if _has("qtorch"):
        from qtorch.quant import float_quantize

        for rounding in ("nearest", "stochastic"):
            yield Case(
                f"qtorch E4M3 {rounding}",
                torch.float32,
                1 << 22,
                lambda x, _, rounding=rounding: lambda: float_quantize(x, exp=4, man=3, rounding=rounding),
            )
    if _has("torchao"):
        from torchao.prototype.custom_fp_utils import _f32_to_floatx_unpacked, _floatx_unpacked_to_f32

        yield Case(
            "torchao E3M2",
            torch.float32,
            SLOW,
            lambda x, _: lambda: _floatx_unpacked_to_f32(_f32_to_floatx_unpacked(x, 3, 2), 3, 2),
        )


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def measure(case: Case, elements: int, rounds: int, threads: int) -> float:
    """Median over rounds of the case's time by the mean of the copies before and after it."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    source = torch.randn(elements, generator=generator).to(case.dtype)
    x = source[: min(elements, case.limit)]
    target = torch.empty_like(source)
    run = case.prepare(x, target[: x.numel()])

    def copy() -> object:
        return target.copy_(source)

    copy(), run()
    found = []
    for _ in range(rounds):
        before, own, after = _seconds(copy), _seconds(run), _seconds(copy)
        found.append(2 * own / (before + after) * elements / x.numel())
    return statistics.median(found)


def copy_milliseconds(elements: int, rounds: int, threads: int) -> float:
    """Median time of the float32 copy alone."""
    torch.set_num_threads(threads)
    source = torch.randn(elements)
    target = torch.empty_like(source)
    target.copy_(source)
    return 1e3 * statistics.median(_seconds(lambda: target.copy_(source)) for _ in range(rounds))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class Table(NamedTuple):
    """All rows, and what a copy took by number of threads, in ms."""

    rows: list[Row]
    copies: dict[int, float]


def table(elements: int, rounds: int, threads: tuple[int, ...]) -> Table:
    """All cases on each number of threads whose copy is usable; the setting of torch is restored."""
    cases, before = [*ours(), *torch_casts(), *rivals()], torch.get_num_threads()
    try:
        copies = {count: copy_milliseconds(elements, rounds, count) for count in {1, *threads}}
        usable = [count for count in threads if copies[count] <= 1.1 * copies[1]]
        columns = {count: [measure(case, elements, rounds, count) for case in cases] for count in usable}
    finally:
        torch.set_num_threads(before)
    rows = [
        Row(
            case.name,
            str(case.dtype).removeprefix("torch."),
            min(elements, case.limit),
            {count: columns[count][i] for count in usable},
        )
        for i, case in enumerate(cases)
    ]
    return Table(rows, copies)


def as_markdown(measured: Table) -> str:
    """The table, what it was measured on, what a copy took, and who was absent."""
    threads = sorted(measured.copies)
    head = ["case", "dtype", "elements", *(f"{count} thread{'s' * (count > 1)}" for count in threads)]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in measured.rows:
        ratios = [f"{row.ratio[count]:.2f}" if count in row.ratio else "–" for count in threads]
        lines.append(" | ".join([row.name, row.dtype, str(row.elements), *ratios]))
    body = "\n".join(f"| {line} |" for line in lines)
    copies = ", ".join(f"{measured.copies[count]:.2f} ms on {count}" for count in threads)
    note = (
        f"copy_ of float32 took {copies} thread(s). Where it is no faster on more threads, the ratios do not "
        "show how anything scales; where it is slower (–) they were not taken."
    )
    absent = [name for name in ("ml_dtypes", "gfloat", "qtorch", "torchao") if not _has(name)]
    note += f"\n\nNot installed here: {', '.join(absent)}." if absent else ""
    return f"# Time of fake quantization, × a preallocated copy_\n\n{provenance()}\n\n{body}\n\n{note}\n"


def provenance() -> str:
    """Machine, versions, commit and day."""
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "numba", "llvmlite", "numpy"))
    day = datetime.now(UTC).date().isoformat()
    load, policy = os.getloadavg()[0], os.environ.get("OMP_WAIT_POLICY", "default")
    machine = f"{_commit()}; {day}; load {load:.1f}, OMP_WAIT_POLICY {policy}"
    return f"{_cpu()}, {os.cpu_count()} cores; Python {platform.python_version()}, {packages}; {machine}."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    fields = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line) if info.exists() else {}
    named = {key.strip(): value.strip() for key, value in fields.items()}
    if "model name" not in named:
        return platform.processor() or platform.machine()
    return f"{named['model name']} (family {named.get('cpu family', '?')}, {platform.machine()})"


def _commit() -> str:
    root = Path(__file__).parents[2]
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    return f"commit {answer.stdout.strip()}" if answer.returncode == 0 else "no commit"


def main() -> None:
    """Measures, prints and saves the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 24, help="of each tensor")
    parser.add_argument("--rounds", type=int, default=11, help="of which the median is kept")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--save", type=Path, default=SAVED, help="markdown file to write")
    asked = parser.parse_args()
    text = as_markdown(table(asked.elements, asked.rounds, tuple(asked.threads)))
    asked.save.parent.mkdir(parents=True, exist_ok=True)
    asked.save.write_text(text)
    print(text)


@pytest.mark.bench
def test_the_benchmark_runs_and_prints_its_table() -> None:
    text = as_markdown(table(1 << 16, 3, (1, 2)))
    print(text)
    assert all(f"altgrad {name} {rounding}" in text for name in SPLITS for rounding in ("nearest", "stochastic"))


if __name__ == "__main__":
    main()
