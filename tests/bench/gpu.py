"""What everything costs and whether it is right on a GPU, in one run: `python tests/bench/gpu.py --out FILE.json`.

Needs torch, triton and pydantic; no ray, no numba, no network. Each section checks before it times, prints as it goes
and keeps its rows, with the card, the driver, the versions and the commit, in one JSON file; a table comes last. A
ratio's two sides run in this process on this card: quantizing over a device copy, a step of an arm over torch's fused
AdamW, a training step over the same step in BF16. Times are medians of device events.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from altgrad.quantization import get_format, quantize
from altgrad.quantization.kernels import dispatch
from altgrad.training import ARMS, GridOptim, ManifoldAdamW, RoundedAdamW, TrainConfig, Trainer
from altgrad.training.config import ModelConfig
from altgrad.training.kernels import MEAN_EVERY
from altgrad.training.model import build_model
from altgrad.training.tasks import LanguageModelling

SPLITS = ("E0M7", "E1M6", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0")
GPT2 = ModelConfig(layers=12, heads=12, width=768, block=1024)
GPT2_VOCABULARY = 50304
Row = dict[str, Any]


def milliseconds(call: Callable[[], object], rounds: int = 20, warm: int = 3) -> float:
    """Median time of a call between two device events."""
    for _ in range(warm):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def provenance(commit: str) -> Row:
    """Card, driver, versions, commit and time."""
    import triton

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    card = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "card": card or torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def ceilings() -> list[Row]:
    """What the card does at best: a device copy and a BF16 product."""
    x = torch.randn(2**28, device="cuda")
    out = torch.empty_like(x)
    copy = milliseconds(lambda: out.copy_(x))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: a @ b)
    return [
        {"what": "copy of 2^28 float32", "ms": copy, "TB/s": 2 * 4 * 2**28 / copy / 1e9},
        {"what": "8192³ bf16 product", "ms": product, "TFLOP/s": 2 * 8192**3 / product / 1e9},
    ]


def rounding_equals_the_cpus(elements: int = 2**26) -> list[Row]:
    """Every format and rounding on random bit patterns (NaN, infinities and subnormals among them), bit for bit."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (elements,), generator=generator, dtype=torch.int64).to(torch.int32)
    x = bits.view(torch.float32)
    x[: elements // 2] = torch.randn(elements // 2, generator=generator)
    on_card, rows = x.cuda(), []
    for name in SPLITS:
        for rounding in ("nearest", "stochastic", "toward_zero"):
            own = quantize(on_card, name, 0.37, rounding=rounding, seed=7).cpu()
            cpus = quantize(x, name, 0.37, rounding=rounding, seed=7)
            both_nan = own.isnan() & cpus.isnan()
            differ = int(((own.view(torch.int32) != cpus.view(torch.int32)) & ~both_nan).sum())
            rows.append(
                {
                    "format": name,
                    "rounding": rounding,
                    "elements": elements,
                    "differ": differ,
                    "kernels": f"{dispatch.kernel_in_use(on_card)} / {dispatch.kernel_in_use(x)}",
                }
            )
    return rows


def rounding(elements: int = 2**28) -> list[Row]:
    """Quantizing into a preallocated tensor over copying it there."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(elements, device="cuda", dtype=dtype)
        out = torch.empty_like(x)
        scale = torch.tensor(0.37, device="cuda")
        for name in SPLITS:
            for kind in ("nearest", "stochastic"):
                copy = milliseconds(lambda out=out, x=x: out.copy_(x), 10)
                own = milliseconds(
                    lambda out=out, x=x, name=name, kind=kind, scale=scale: quantize(
                        x, name, scale, rounding=kind, seed=1, out=out
                    ),
                    10,
                )
                again = milliseconds(lambda out=out, x=x: out.copy_(x), 10)
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "format": name,
                        "rounding": kind,
                        "ms": own,
                        "over_copy": own / ((copy + again) / 2),
                    }
                )
    return rows


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda p: RoundedAdamW(p, format="E4M3"),
    "adamw_sr": lambda p: RoundedAdamW(p, format="E4M3", rounding="stochastic"),
    "eco": lambda p: RoundedAdamW(p, format="E4M3", rounding="stochastic", error_feedback=True),
    "manifold": lambda p: ManifoldAdamW(p, format="E4M3"),
    "manifold_sr": lambda p: ManifoldAdamW(p, format="E4M3", rounding="stochastic"),
    "grid": lambda p: GridOptim(p, format="E4M3"),
    "torch AdamW, foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "torch AdamW, single tensors": lambda p: torch.optim.AdamW(p, foreach=False, fused=False),
}


def gpt_parameters(config: ModelConfig, vocabulary: int) -> list[nn.Parameter]:
    """A GPT's parameters with gradients, on the card."""
    parameters = list(build_model(config, vocabulary=vocabulary, seed=0).cuda().parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return parameters


def optimizers(config: ModelConfig = GPT2, vocabulary: int = GPT2_VOCABULARY) -> list[Row]:
    """A step of each arm over torch's fused AdamW: counting everything at every step, as it comes, and not."""
    baseline = torch.optim.AdamW(gpt_parameters(config, vocabulary), fused=True)
    rows = []
    for name, make in OPTIMIZERS.items():
        own: Any = make(gpt_parameters(config, vocabulary))
        row: Row = {"arm": name, "millions": sum(p.numel() for p in own.param_groups[0]["params"]) / 1e6}
        settings = {"all": (True, 1), "default": (True, 8), "none": (False, 1)}
        for _ in range(MEAN_EVERY + 1):
            own.step()
        for setting, (own.telemetry, own.count_every) in settings.items():
            before = milliseconds(baseline.step, 16)
            each = milliseconds(lambda own=own: [own.step() for _ in range(16)], 3, 1) / 16
            after = milliseconds(baseline.step, 16)
            row |= {f"{setting}_ms": each, f"{setting}_over_fused": 2 * each / (before + after)}
            if "torch" in name:
                break
        rows.append(row)
        print(row, flush=True)
        del own
        torch.cuda.empty_cache()
    return rows


def products() -> list[Row]:
    """Emulated float8 products against the hardware's: the difference by the sum of the magnitudes."""
    from altgrad.quantization.products import Operand, matmul_transposed

    rows = []
    for left, right in (("E4M3", "E4M3"), ("E5M2", "E4M3"), ("E4M3", "E5M2"), ("E0M7", "E0M7"), ("E1M6", "E0M7")):
        for k in (256, 1024, 4096):
            a, b = torch.randn(512, k, device="cuda"), torch.randn(768, k, device="cuda")
            operands = []
            for x, name in ((a, left), (b, right)):
                fmt = get_format(name)
                scale = x.abs().max() / fmt.max
                operands.append(Operand(quantize(x, fmt, scale), fmt, scale))
            native, emulated = (matmul_transposed(*operands, kind).double() for kind in ("native", "emulated"))
            exact = operands[0].values.double() @ operands[1].values.double().T
            size = operands[0].values.double().abs() @ operands[1].values.double().abs().T
            rows.append(
                {
                    "formats": f"{left} · {right}",
                    "K": k,
                    "native_error": float(((native - exact).abs() / size).max()),
                    "emulated_error": float(((emulated - exact).abs() / size).max()),
                }
            )
    return rows


def step_config(model: ModelConfig, batch: int, **changes: Any) -> TrainConfig:
    return TrainConfig(
        **{
            "model": model.model_dump(),
            "data": {"source": os.environ.get("ALTGRAD_BENCH_TEXT", "pydoc"), "batch": batch, "eval_batches": 1},
            "steps": 10_000,
            "guards": (),
            "log_interval": 20,
            "eval_interval": 10_000,
            "checkpoint_interval": 10_000,
        }
        | changes
    )


def plain_step(batch: int, model_config: ModelConfig, steps: int = 20) -> Row:
    """What a user would write: the model under autocast to BF16, fused AdamW, clipped gradients; nothing emulated."""
    own = step_config(model_config, batch, format="FP32")
    task = LanguageModelling(own)
    model = task.build().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    def train(step: int) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = task.loss(model, step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    train(1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for step in range(2, steps + 2):
        train(step)
    torch.cuda.synchronize()
    ms = (time.perf_counter() - start) * 1e3 / steps
    return {"format": "plain PyTorch, autocast", "ms": ms, "tokens_per_s": batch * model_config.block / ms * 1e3}


def training_step(batch: int = 16, model: ModelConfig = GPT2, intervals: int = 2) -> list[Row]:
    """A whole step of the trainer, by format, policy and product, over that in BF16 without observers."""
    cases = [
        ("BF16", "uniform", False),
        ("BF16", "uniform", True),
        ("E4M3", "uniform", False),
        ("E4M3", "uniform", True),
        ("E5M2", "uniform", True),
        ("E3M4", "uniform", True),
        ("E7M0", "uniform", True),
        ("E4M3", "uniform_full", True),
        ("E5M2", "uniform_full", True),
        ("E0M7", "uniform_full", True),
        ("FP32", "uniform", False),
    ]
    rows: list[Row] = []
    plain = plain_step(batch, model)
    for name, policy, observe in cases:
        own = step_config(model, batch, format=name, policy=policy, optimizer=ARMS["adamw"].model_dump())
        trainer = Trainer(own, observe=observe, device="cuda")
        turns = trainer.intervals()
        next(turns)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(intervals):
            next(turns)
        torch.cuda.synchronize()
        ms = (time.perf_counter() - start) * 1e3 / (intervals * own.log_interval)
        row = {
            "format": name,
            "policy": policy,
            "observed": observe,
            "ms": ms,
            "tokens_per_s": batch * model.block / ms * 1e3,
            "loss": trainer.rows[-1]["train_loss"],
        }
        row["over_bf16"] = ms / rows[0]["ms"] if rows else 1.0
        turns.close()
        del trainer, turns
        rows.append(row)
        print(row, flush=True)
        torch.cuda.empty_cache()
    return [*rows, plain | {"over_bf16": plain["ms"] / rows[0]["ms"]}]


SECTIONS: dict[str, Callable[[], list[Row]]] = {
    "ceilings": ceilings,
    "equality": rounding_equals_the_cpus,
    "rounding": rounding,
    "optimizers": optimizers,
    "products": products,
    "step": training_step,
}


def main() -> None:
    """Runs the sections and keeps what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--commit", default="unknown", help="of the code that is measured")
    asked = parser.parse_args()
    found: dict[str, Any] = {"provenance": provenance(asked.commit)}
    print(found["provenance"], flush=True)
    for name in asked.sections:
        started = time.perf_counter()
        found[name] = SECTIONS[name]()
        found["provenance"][f"{name}_seconds"] = time.perf_counter() - started
        asked.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    for name in asked.sections:
        print(f"\n{name} ({found['provenance'][f'{name}_seconds']:.0f} s)")
        for row in found[name]:
            print("  " + "  ".join(f"{key} {_short(value)}" for key, value in row.items()))


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@pytest.mark.bench
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_benchmark_runs_and_keeps_its_rows(tmp_path: Path) -> None:
    rows = [*products(), *rounding(2**16), *rounding_equals_the_cpus(2**16)]
    assert all(row.get("differ", 0) == 0 for row in rows)


if __name__ == "__main__":
    main()
