"""What a large sweep costs its driver: `python tests/bench/ledger.py`.

A ledger of finished trials is written (rows and outcomes as workers leave them, no training), then `status`, `report`
and the same sweep asked for again are timed, each in a process of its own as a user would call it. Beside that, trials
that do nothing run through the real driver on a local Ray, and the growth of its memory is read between the first
tenth and the last.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.data import load_corpus
from altgrad.training.outcome import Outcome, OutcomeKind

sys.path.insert(0, str(Path(__file__).parents[1]))
from planting import planted_path

TINY = {"layers": 1, "heads": 1, "width": 16, "block": 16}
ROWS = 10


def spec_of(trials: int) -> SweepSpec:
    """As many trials, nearly: ten formats x eight arms x six seeds, the rest learning rates."""
    return SweepSpec.model_validate(
        {
            "name": "large",
            "formats": "all",
            "seeds": 6,
            "steps": 10 * ROWS,
            "optimizers": "adamw,adamw_nearest,adamw_sr,manifold,manifold_sr,grid,eco,muon",
            "lrs": tuple(1e-3 * 1.1**i for i in range(max(1, trials // 480))),
            "model": TINY,
            "data": {"batch": 2, "eval_batches": 1},
            "eval_interval": 10,
        }
    )


def fill(out: Path, spec: SweepSpec) -> int:
    """Writes the ledger of the finished sweep; returns the number of trials."""
    sha256 = load_corpus(spec.base.data).sha256
    trials = spec.trials(sha256)
    with Ledger(out / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, sha256)
        for number, (trial_id, config) in enumerate(trials.items()):
            loss = 2.5 + 0.1 * len(config.format) + 0.01 * (number % 7)
            rows = [
                {
                    "step": 10 * (i + 1),
                    "train_loss": 5.5 - (3 - loss / 2) * i / ROWS,
                    "val_loss": loss + (9 - i) / 10,
                    "flip_yield": 0.9,
                    "stall_ratio": 0.4,
                }
                for i in range(ROWS)
            ]
            ledger.record_rows(trial_id, rows)
            ledger.record_outcome(
                trial_id,
                Outcome(
                    OutcomeKind.DONE, 10 * ROWS, train_loss=loss, val_loss=loss, bits_per_byte=loss / 0.693, seconds=1.0
                ),
            )
    return len(trials)


def timed(*words: str) -> tuple[float, float]:
    """Wall and CPU seconds of an altgrad command in a process of its own."""
    begun, before = time.perf_counter(), cpu_of_children()
    subprocess.run([sys.executable, "-m", "altgrad", *words], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begun, cpu_of_children() - before


def cpu_of_children() -> float:
    """CPU seconds of the processes that have ended under this one."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


STUB = """
def plant(module):
    def interval(run):
        outcome = module.Outcome(module.OutcomeKind.DONE, run._config.steps, train_loss=2.0, val_loss=2.0)
        run._folder.mkdir(parents=True, exist_ok=True)
        module.write_json(run._folder / "outcome.json", outcome.to_dict())
        return module._ending(outcome)
    module.TrialRun._interval = interval
"""


def growth(trials: int, folder: Path) -> float:
    """MB by which a driver grows from the first tenth of its trials to the last; the trials are stubs."""
    import os

    path, spec = folder / "many.json", spec_of(trials)
    path.write_text(spec.model_dump_json())
    trials = len(spec.expand())
    environment = os.environ | {"PYTHONPATH": planted_path(folder, STUB)}
    driver = subprocess.Popen(
        [sys.executable, "-m", "altgrad", "run", str(path), "--out", str(folder / "many")],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    readings: list[tuple[int, int]] = []
    while driver.poll() is None:
        ended = len(list((folder / "many" / "trials").glob("*/outcome.json")))
        try:
            readings.append((ended, psutil.Process(driver.pid).memory_info().rss))
        except psutil.NoSuchProcess:
            break
        time.sleep(0.5)
    early = max(rss for ended, rss in readings if 0 < ended <= max(trials // 10, 20))
    # Before the last ending: what follows is the report, which is measured by itself.
    late = max(rss for ended, rss in readings if 0.9 * trials <= ended < trials)
    return (late - early) / 2**20


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--stubs", type=int, default=1_000, help="trivial trials for the driver's memory; 0: none")
    asked = parser.parse_args()
    for name, value in measured(asked.trials, asked.stubs).items():
        print(f"| {name} | {value:.1f} |")


def measured(trials: int, stubs: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        out, spec = Path(name) / "large", spec_of(trials)
        count = fill(out, spec)
        path = Path(name) / "large.json"
        path.write_text(spec.model_dump_json())
        for what, words in (
            (f"status of {count} trials", ("status", str(out))),
            ("report", ("report", str(out))),
            ("starting again, with its report", ("run", str(path), "--out", str(out))),
        ):
            found[f"{what}, s"], found[f"{what}, CPU-s"] = timed(*words)
        if stubs:
            found[f"driver's growth over {stubs} trivial trials, MB"] = growth(stubs, Path(name))
    return found


@pytest.mark.bench
def test_the_benchmark_runs() -> None:
    assert all(value > 0 for value in measured(20, 0).values())


if __name__ == "__main__":
    main()
