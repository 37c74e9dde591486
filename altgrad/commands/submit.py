"""A sweep on a cluster, from here: its flags are checked first, then it is sent as a job and followed."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from pathlib import Path

from altgrad.commands.flags import options_of, spec_of
from altgrad.commands.sweep_file import sweep_in
from altgrad.commands.sweeps import checked_data
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.engine.jobs import Job, Parcel
from altgrad.sweep.record import monitor
from altgrad.sweep.record.folder import read_manifest
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.data import NAMED

OFFLINE_DATA = "pydoc"
OWN = ("help", "config", "out", "address", "send")
"""Flags that do not go on to the job as they are."""


def default_address() -> str:
    """Where Ray's own tools look for a dashboard too."""
    return os.environ.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"


def submit(request: argparse.Namespace) -> int:
    """The exit code is the job's; 1 where the job counts as succeeded and the sweep's ledger lacks trials."""
    if not re.fullmatch(r"https?://[\w.\-\[\]:]+/?", request.address):
        raise SpecError(
            f"--address: {request.address!r} is not allowed: the http://HOST:PORT of a Ray dashboard is "
            "expected (a sweep on this machine's own Ray is altgrad run)"
        )
    parcel = Parcel()
    entrypoint = shlex.join(_command(request, _check(request), parcel))
    try:
        job = Job(request.address)
        if request.out is None:
            raise SpecError(
                "--out: missing: the sweep's folder on the cluster is expected, where all of its nodes see it "
                "(with cluster/runpod.yaml below /workspace)"
            )
        job.send(entrypoint, parcel)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"--address: {request.address!r}: no Ray dashboard answers ({reason})") from None
    except ValueError as error:
        raise SpecError(str(error)) from None
    out = request.out.absolute()
    print(f"job {job.id} ({request.address}/#/jobs/{job.id}): {entrypoint}", flush=True)
    try:
        code = job.follow(_show)
    except ConnectionError as error:
        print(f"altgrad: job {job.id} can't be followed any more ({error})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"altgrad: job {job.id} goes on; ray job stop {job.id} --address {request.address} ends it", file=sys.stderr
        )
        raise
    return code if code or request.plan else _verdict(out)


def _check(request: argparse.Namespace) -> SweepSpec:
    """The sweep; raises SpecError for what the job would refuse, as far as can be seen from here."""
    # Whether W&B has credentials matters on the cluster only.
    wandb = "off" if request.wandb in (None, "online") else request.wandb
    here = argparse.Namespace(**vars(request) | {"address": "auto", "wandb": wandb})
    if _is_python(request.file):
        here.base, here.file = sweep_in(request.file), None
    spec = spec_of(here)
    options_of(here, spec)
    source = Path(spec.base.data.source)
    if spec.base.data.source == OFFLINE_DATA or (
        spec.base.data.source not in NAMED and (not source.is_absolute() or source.exists())
    ):
        checked_data(spec, here)
    return spec


def _is_python(file: Path | None) -> bool:
    return file is not None and file.suffix == ".py"


def _command(request: argparse.Namespace, spec: SweepSpec, parcel: Parcel) -> list[str]:
    """What the job runs: the same flags, on the cluster it runs in, with paths as it finds them in the parcel."""
    words = ["python", "-m", "altgrad", "run"]
    try:
        if request.file is not None:
            file = str(parcel.add(request.file))
            words = ["python", file] if _is_python(request.file) else [*words, file]
        if request.config is not None:
            words.append(f"--config={parcel.add(request.config)}")
        for more in request.send:
            parcel.add(more)
        data = spec.base.data.source
        if data not in NAMED and not Path(data).is_absolute():
            words.append(f"--data={parcel.add(Path(data))}")
            setattr(request, "spec:data.source", None)
    except ValueError as error:
        raise SpecError(str(error)) from None
    for action in request.parser._actions:
        value = getattr(request, action.dest, None)
        if not action.option_strings or action.dest in OWN or value == action.default:
            continue
        flag = action.option_strings[-1]
        words.append(flag if value is True else f"{flag}={value}")
    return [*words, *([] if request.out is None else [f"--out={request.out.absolute()}"]), "--address=auto"]


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _verdict(out: Path) -> int:
    if not (out / "ledger.sqlite").exists():
        print(f"{out} can't be read from here; that the sweep is whole is the job's word")
        return 0
    with monitor.open_ledger(out) as ledger:
        asked = (read_manifest(out) or {}).get("trials")
        left = len(ledger.remaining(ledger.configs(None if asked is None else set(asked))))
    if left:
        print(
            f"altgrad: the job counts as succeeded, but {out} lacks {left} trials; its driver was killed, and the "
            "same command goes on",
            file=sys.stderr,
        )
    return 1 if left else 0
