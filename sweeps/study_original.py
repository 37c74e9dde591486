"""The original's five formats and its BF16 baseline over 2 000 steps on its schedule, three seeds (sweeps/study.md).

python sweeps/study_original.py            what its ledger lacks
python sweeps/study_original.py --plan     what it would run
"""

import sys

from study_shared import study

from altgrad.cli import sweep_main
from altgrad.training.config import ObserveConfig, ScheduleConfig

SWEEP = study(
    "original",
    formats=("BF16", "E5M2", "E3M4", "E1M6", "E0M7", "E7M0"),
    optimizers=("adamw", "manifold"),
    policies=("uniform",),
    seeds=3,
    steps=2000,
    schedule=ScheduleConfig(kind="constant", warmup=100),
    observe=ObserveConfig(shadow_every=5),
    log_interval=20,
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
