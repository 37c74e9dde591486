"""16-bit formats with the exponent bits of 8-bit ones: range told from precision (sweeps/study.md).

python sweeps/study_wider.py            what its ledger lacks
python sweeps/study_wider.py --plan     what it would run
"""

import sys

from study_shared import rates, study

from altgrad.cli import sweep_main

WIDER = ("FP16", "E0M15", "E4M11", "E7M8")
SWEEP = study(
    "wider",
    formats=("BF16", *WIDER),
    optimizers=("adamw", "manifold"),
    settled_lrs=rates(dict.fromkeys(WIDER, "BF16"), {"uniform_full": "uniform"}),
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
