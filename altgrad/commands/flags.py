"""The flags of a sweep: what they are called, and from their texts to a spec and the settings of a run."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import cast, get_args

from altgrad.sweep.complaints import SpecError, check_choice, nearest
from altgrad.sweep.options import Checkpoints, Executor, RunOptions
from altgrad.sweep.record.budget import Budget, flag_of
from altgrad.sweep.record.wandb_mirror import mode_of
from altgrad.sweep.space.presets import PRESETS
from altgrad.sweep.space.resolve import resolve
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import MODELS
from altgrad.training.data import NAMED
from altgrad.training.devices import gpu_count

SPEC_FLAGS = {
    "formats": ("formats", "E5M2,E4M3 or all: the eight 8-bit splits, BF16 and FP16; FP32 is the reference"),
    "optimizers": ("optimizers", "adamw,manifold,grid or all"),
    "rung-clip": ("rung_clip", "1,3,10: rungs, for arms that have them"),
    "policies": ("policies", "uniform,attention_bf16,head_bf16,classic or all"),
    "lrs": ("lrs", "1e-3,3e-3: learning rates; left out: each arm's own"),
    "seeds": ("seeds", "paired replicates, at least 1"),
    "first-seed": ("first_seed", "seeds count from here, so that a pilot and what judges it share none; default 0"),
    "steps": ("steps", "training steps of a trial"),
    "margin": ("margin", "how far above BF16's loss a format still trains; default .1 (10 %%)"),
    "equal-within": ("equal_within", "nats within which gains are equal; default a quarter of the arm's in BF16"),
    "task": ("task", "lm or classify"),
    "data": ("data.source", f"{', '.join(NAMED)}, or a text, JSONL, parquet or CSV file, a folder or a glob"),
    "label-field": ("data.label_field", "the field that holds the labels, for --task classify; default labels"),
    "tokenizer": ("data.tokenizer", "bytes, bpe, bpe-N, or for --task classify words, words-N"),
    "model": ("model", f"{', '.join(MODELS)}; left out: the preset's"),
    "search": ("search", "grid, or random or optuna: samples from the axes"),
    "num-samples": ("num_samples", "configurations that a search samples, each with all seeds; default 20"),
    "objectives": ("objectives", "what optuna is told: val_loss, flip_yield, bits_per_byte, val_f1_micro, or several"),
    "scheduler": (
        "scheduler",
        "none; asha: races learning rates within a cell, in a search all samples; pbt: "
        "populations over learning rates and rung clips",
    ),
    "guards": ("guards", "on, off, or rules like 'flip_yield/min < 0.2 for 3 after 50; grad_norm is nonfinite'"),
}
BUDGET_FLAGS = {
    "gpu_hours": ("H", "GPU-hours of all runs together, at which the sweep stops"),
    "usd": ("D", "dollars of all runs together, by --usd-per-gpu-hour"),
    "hours": ("H", "hours of wall time of all runs together"),
    "usd_per_gpu_hour": ("D", "the price of a GPU"),
}
ADDRESS = re.compile(r"local|auto|(?!ray://)[\w.\-\[\]:]+:\d+")


def _path(text: str) -> Path:
    if not text.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed: a path is expected")
    return Path(text)


def default_address() -> str:
    """`auto` where RAY_ADDRESS names a cluster, as in every Ray job, else `local`.

    It may also hold the http:// address of a dashboard, for Ray's own tools.
    """
    address = os.environ.get("RAY_ADDRESS", "local")
    return "local" if address in ("", "local") or "://" in address else "auto"


def add_sweep_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help=", ".join(PRESETS))
    parser.add_argument("--config", type=_path, metavar="FILE", help="the same keys as YAML or JSON; flags win over it")
    for flag, (key, help) in SPEC_FLAGS.items():
        parser.add_argument(f"--{flag}", dest=f"spec:{key}", metavar="X", help=help)
    parser.add_argument("--out", type=_path, help="the sweep's folder; default runs/<name>")
    parser.add_argument("--max-concurrent", metavar="N", help="trials at a time; default one per core")
    parser.add_argument("--executor", default="auto", help="auto, actor (one worker, reused) or train (Ray Train)")
    parser.add_argument("--workers-per-trial", default="1", metavar="N", help="data-parallel processes of a trial")
    parser.add_argument(
        "--gpus-per-trial",
        metavar="F",
        help="GPUs of each worker; .25: four share one; 0: train on CPUs; default one, where there are any",
    )
    parser.add_argument(
        "--mix-devices",
        action="store_true",
        help="let trials of one seed run on GPUs of different kinds; their pairs are marked in the report",
    )
    parser.add_argument(
        "--interval-timeout",
        default="900",
        metavar="S",
        help=("seconds after which a log interval counts as hung, and its trial starts again; 0 for never"),
    )
    parser.add_argument(
        "--address",
        default=default_address(),
        help=("local, auto, or the HOST:PORT of a Ray cluster's head; default local, in a Ray job auto"),
    )
    parser.add_argument(
        "--wandb",
        metavar="MODE",
        help="off, offline or online: mirror trials to W&B; default "
        "WANDB_MODE, else online where WANDB_API_KEY is set, else offline",
    )
    parser.add_argument(
        "--keep-checkpoints",
        default="last",
        metavar="WHICH",
        help="of each trial: all, the last, or none once it has a result (more steps then start anew); default last",
    )
    for name, (metavar, help) in BUDGET_FLAGS.items():
        parser.add_argument(f"--{flag_of(name)}", dest=f"budget:{name}", metavar=metavar, help=help)
    parser.add_argument("--fresh", action="store_true", help="move an old sweep in OUT aside and start again")
    parser.add_argument("--plan", action="store_true", help="say what would run, and run nothing")


def spec_of(request: argparse.Namespace) -> SweepSpec:
    if request.file is not None and request.config is not None:
        raise SpecError(f"{request.file} and --config {request.config}: one file, please")
    try:
        preset = None if request.preset is None else check_choice(request.preset, PRESETS, "preset")
    except ValueError as error:
        raise SpecError(f"--preset: {error}") from None
    flags = {
        name.removeprefix("spec:"): value
        for name, value in vars(request).items()
        if name.startswith("spec:") and value is not None
    }
    return resolve(PRESETS[preset] if preset else request.base, flags, request.file or request.config)


def options_of(request: argparse.Namespace, spec: SweepSpec) -> RunOptions:
    if not ADDRESS.fullmatch(request.address):
        raise SpecError(
            f"--address: {request.address!r} is not allowed: local, auto, or the HOST:PORT of a head "
            f"(for ray:// submit the command as a job){nearest(request.address, ('local', 'auto'))}"
        )
    concurrent, gpus = request.max_concurrent, request.gpus_per_trial
    try:
        options = RunOptions(
            out=request.out or Path("runs") / spec.name,
            address=request.address,
            fresh=request.fresh,
            max_concurrent=None if concurrent is None else _number_of("--max-concurrent", concurrent),
            executor=cast(Executor, check_choice(request.executor, get_args(Executor), "executor")),
            workers_per_trial=_number_of("--workers-per-trial", request.workers_per_trial),
            gpus_per_trial=None if gpus is None else _amount_of("--gpus-per-trial", gpus),
            mix_devices=request.mix_devices,
            interval_timeout=_amount_of("--interval-timeout", request.interval_timeout),
            wandb=mode_of(request.wandb),
            keep_checkpoints=_which(request.keep_checkpoints),
            budget=Budget(
                **{
                    name: _amount_of(f"--{flag_of(name)}", text)
                    for name in BUDGET_FLAGS
                    if (text := getattr(request, f"budget:{name}")) is not None
                }
            ),
        )
        if options.address == "local":
            options = options.settled(gpu_count())
        options.check(spec)
    except ValueError as error:
        text = str(error)
        raise SpecError(text if text.startswith(("--", "WANDB_")) else f"--executor: {text}") from None
    return options


def _which(text: str) -> Checkpoints:
    try:
        return cast(Checkpoints, check_choice(text, get_args(Checkpoints), "choice"))
    except ValueError as error:
        raise ValueError(f"--keep-checkpoints: {error}") from None


def _number_of(flag: str, text: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]{0,8}", text):
        raise ValueError(f"{flag}: {text!r} is not allowed: a whole number, at least 1, is expected")
    return int(text)


def _amount_of(flag: str, text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]*)?|\.[0-9]+", text):
        raise ValueError(f"{flag}: {text!r} is not allowed: a number, at least 0, is expected")
    return float(text)
