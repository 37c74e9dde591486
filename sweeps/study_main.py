"""The study's main question: formats × arms × what is quantized, ten paired seeds (sweeps/study.md).

python sweeps/study_main.py            what its ledger lacks
python sweeps/study_main.py --plan     what it would run
"""

import sys

from study_shared import GRIDS, rates, study

from altgrad.cli import sweep_main

SWEEP = study(
    "main",
    formats=("FP32", "BF16", *GRIDS),
    optimizers=("adamw", "adamw_nearest", "adamw_sr", "manifold", "manifold_sr", "manifold_fp32", "grid", "eco"),
    seeds=10,
    settled_lrs=rates(),
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
