"""Sweeps trained without Ray: what workers leave and a driver takes in, trial after trial, in this process."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from altgrad.sweep.engine.executors import read_reference
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.recorder import Recorder
from altgrad.sweep.record.references import references
from altgrad.sweep.run import preflight
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.record import write_json
from altgrad.training.trainer import Trainer

SPEC = SweepSpec.model_validate(
    {
        "name": "tiny",
        "formats": ["E5M2", "E7M0"],
        "optimizers": ["adamw", "adamw_nearest"],
        "seeds": 2,
        "steps": 20,
        "model": {"layers": 1, "heads": 1, "width": 16, "block": 16},
        "data": {"batch": 2, "eval_batches": 1},
        "guards": "off",
        "log_interval": 5,
        "eval_interval": 10,
        "checkpoint_interval": 10,
    }
)


def train(out: Path, spec: SweepSpec = SPEC, *, first: int | None = None, interrupted: Collection[int] = ()) -> Path:
    """Trains what the sweep's folder lacks: all, or of the first trials; those at the places `interrupted` half-way."""
    sha = preflight(spec).sha256
    trials = spec.trials(sha)
    against = references(trials)
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, sha)
        recorder = Recorder(ledger, out / "trials")
        recorder.ingest(trials)
        left = ledger.remaining(trials)
        for place, (name, config) in enumerate(list(trials.items())[:first]):
            if name not in left:
                continue
            reference = read_reference(out / "trials", against.get(name, ""))
            rows = Trainer(config, folder=out / "trials" / name, reference=reference).intervals()
            for row in rows:
                if place in interrupted and row["step"] >= spec.base.steps // 2:
                    rows.close()
            recorder.finish(name)
    write_json(out / "sweep.json", {"spec": spec.model_dump(mode="json"), "trials": list(trials)})
    return out
