"""What this process computes on: its GPUs, what they are called in a trial's record, and whether they work.

A machine without a GPU can stand in for one with several: `ALTGRAD_STAND_IN_GPUS=8` makes eight logical GPUs of the
CPU, which Ray hands out and hides as it does real ones, and on which trials compute what they compute on a CPU. Their
records say so. It is for tests of scheduling; nothing falls back to it.
"""

from __future__ import annotations

import os
import platform
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

STAND_IN = "ALTGRAD_STAND_IN_GPUS"
VISIBLE = "CUDA_VISIBLE_DEVICES"
DRIVER_FILES = (Path("/sys/module/nvidia/version"), Path("/proc/driver/nvidia/version"))


class NoGpu(RuntimeError):
    """A GPU was asked for, and this process has none."""


@dataclass(frozen=True)
class Device:
    """Where a trial computes: the torch device, and what stands in the trial's record."""

    torch_device: str
    kind: str
    """model of the GPU or CPU; trials of one kind can be compared bit for bit"""
    host: str
    driver: str = ""
    """of the GPU"""
    cuda: str = ""
    """version of CUDA that torch was built with"""
    torch: str = str(torch.__version__)
    index: str = ""
    """of the GPUs that this process may use, by the machine's numbers"""

    def to_dict(self) -> dict[str, str]:
        return dict(vars(self))

    def __str__(self) -> str:
        versions = [f"driver {self.driver}"] * bool(self.driver) + [f"CUDA {self.cuda}"] * bool(self.cuda)
        return ", ".join([self.kind, *versions, f"torch {self.torch}", self.host])


def gpu_count() -> int:
    """GPUs that this process may use. ValueError where the stand-in's number is none."""
    stated = os.environ.get(STAND_IN)
    if stated is None:
        return torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not stated.isdigit():
        raise ValueError(f"{STAND_IN}: {stated!r} is not allowed: a whole number is expected")
    visible = os.environ.get(VISIBLE)
    return int(stated) if visible is None else min(int(stated), len([part for part in visible.split(",") if part]))


def own_device(gpus: float) -> Device:
    """The device of a process that asked for so many GPUs. NoGpu where it asked for one and sees none."""
    if not gpus:
        return device_of("cpu")
    if not gpu_count():
        raise NoGpu(why_no_gpu(gpus))
    if STAND_IN in os.environ:
        kind = f"stand-in for a GPU ({_cpu()})"
        return Device("cpu", kind, socket.gethostname(), index=os.environ.get(VISIBLE, ""))
    return device_of("cuda")


def device_of(name: torch.device | str) -> Device:
    """The device that torch calls so."""
    device = torch.device(name)
    if device.type == "cuda":
        kind = torch.cuda.get_device_name(device)
        versions = {"driver": _driver(), "cuda": torch.version.cuda or ""}
        return Device(str(device), kind, socket.gethostname(), **versions, index=os.environ.get(VISIBLE, ""))
    return Device(str(device), _cpu() if device.type == "cpu" else device.type, socket.gethostname())


def places_of(devices: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """`device`, `driver` and `hostname` of an outcome, from the devices that a trial's record names, in their order."""
    found = list(devices)
    names = {"device": "kind", "driver": "driver", "hostname": "host"}
    texts = {field: "; ".join(dict.fromkeys(d[name] for d in found if d.get(name))) for field, name in names.items()}
    return {field: text for field, text in texts.items() if text}


def why_no_gpu(gpus: float) -> str:
    """One line: what this process sees of the GPUs it asked for."""
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs only"
    driver = _driver()
    return (
        f"{gpus:g} GPU asked for, none usable on {socket.gethostname()}: torch {torch.__version__} ({build}), "
        f"{f'NVIDIA driver {driver}' if driver else 'no NVIDIA driver'}, "
        f"{VISIBLE}={os.environ.get(VISIBLE, '(unset)')}"
    )


def self_test(expected: int) -> Iterator[str]:
    """One line for each thing that would keep trials from using the machine's `expected` GPUs."""
    found = gpu_count()
    if found < expected:
        yield why_no_gpu(expected) if not found else f"{expected} GPUs are expected, torch sees {found}"
    for index in range(found):
        device = "cpu" if STAND_IN in os.environ else f"cuda:{index}"
        try:
            if not _computes(device):
                yield f"GPU {index}: computes wrong numbers"
        except Exception as error:  # whatever a broken device raises, it is what keeps trials from running
            yield f"GPU {index}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _computes(device: str) -> bool:
    """Whether a product of whole numbers and a rounding come out there as they do on a CPU, bit for bit."""
    from altgrad.quantization import quantize

    whole = (torch.arange(64 * 64, dtype=torch.float32) % 17 - 8).reshape(64, 64)
    x = torch.linspace(-3.0, 3.0, 4096, dtype=torch.float32)
    product, rounded = whole.to(device) @ whole.to(device), quantize(x.to(device), "E4M3")
    return torch.equal(product.cpu(), whole @ whole) and torch.equal(rounded.cpu(), quantize(x, "E4M3"))


@cache
def _cpu() -> str:
    """The CPU's model."""
    try:
        found = re.search(
            r"^model name\s*:\s*(.+)$",
            Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"),
            re.MULTILINE,
        )
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


@cache
def _driver() -> str:
    """The NVIDIA driver's version; "" where none is loaded."""
    for file in DRIVER_FILES:
        try:
            found = re.search(r"\d+\.\d+(\.\d+)?", file.read_text(encoding="utf-8"))
        except OSError:
            continue
        if found:
            return found[0]
    return ""
