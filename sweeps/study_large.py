"""The main arms in a net of 4 × 128, six seeds (sweeps/study.md).

python sweeps/study_large.py            what its ledger lacks
python sweeps/study_large.py --plan     what it would run
"""

import sys

from study_shared import rates, study

from altgrad.cli import sweep_main
from altgrad.training.config import ModelConfig

SWEEP = study(
    "large", optimizers=("adamw", "manifold"), model=ModelConfig(layers=4, heads=4, width=128), settled_lrs=rates()
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
