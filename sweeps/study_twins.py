"""E1M6, which is E0M7's grid under another name: two seeds of what study_main.py trains (sweeps/study.md).

python sweeps/study_twins.py            what its ledger lacks
python sweeps/study_twins.py --plan     what it would run
"""

import sys

from study_shared import rates, study

from altgrad.cli import sweep_main

SWEEP = study(
    "twins",
    formats=("BF16", "E1M6"),
    optimizers=("adamw", "adamw_nearest", "adamw_sr", "manifold", "manifold_sr", "grid", "eco"),
    seeds=2,
    settled_lrs=rates(),
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
