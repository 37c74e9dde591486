"""The study's learning rates, settled on seeds that judge nothing (sweeps/study.md).

    python sweeps/study_rates.py            what its ledger lacks
    python sweeps/study_rates.py --plan     what it would run

E1M6 is E0M7's grid under another name and takes its rates. Geometry-aware arms and
adamw_nearest have one rate more: of the first four the last was the best for some of their cells.
"""

import sys

from altgrad.cli import sweep_main
from altgrad.sweep import SweepSpec
from altgrad.training.config import ScheduleConfig

RATES = (5e-4, 1e-3, 2e-3, 4e-3)
FURTHER = ("adamw_nearest", "manifold", "manifold_sr", "manifold_fp32", "grid")
SWEEP = SweepSpec(
    name="study_rates",
    formats=("FP32", "BF16", "E0M7", "E2M5", "E3M4", "E4M3", "E5M2", "E6M1", "E7M0"),
    optimizers=("adamw", "adamw_nearest", "adamw_sr", "manifold", "manifold_sr", "manifold_fp32", "grid", "eco"),
    policies=("uniform", "uniform_full"),
    lrs=RATES,
    axes={f"{arm}.lr": (*RATES, 8e-3) for arm in FURTHER},
    seeds=3,
    first_seed=1000,
    steps=400,
    schedule=ScheduleConfig(kind="wsd", decay_fraction=0.5),
    eval_interval=100,
    checkpoint_interval=200,
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
