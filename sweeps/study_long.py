"""The main question again over 1 000 steps, where effects are larger: six other seeds (sweeps/study.md).

python sweeps/study_long.py            what its ledger lacks
python sweeps/study_long.py --plan     what it would run
"""

import sys

from study_shared import rates, study

from altgrad.cli import sweep_main

SWEEP = study("long", first_seed=10, steps=1000, settled_lrs=rates())

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
