"""The cells of study_main.py in which a guard stopped a run, trained to the end without guards (sweeps/study.md).

python sweeps/study_unguarded.py            what its ledger lacks
python sweeps/study_unguarded.py --plan     what it would run
"""

import sys

from study_shared import MAIN, cells_with_stops, left_out, rates, study

from altgrad.cli import sweep_main

STOPPED = cells_with_stops(MAIN)
SWEEP = study(
    "unguarded",
    formats=tuple(dict.fromkeys(format for format, _, _ in STOPPED)),
    optimizers=tuple(dict.fromkeys(arm for _, arm, _ in STOPPED)),
    policies=tuple(dict.fromkeys(policy for _, _, policy in STOPPED)),
    seeds=10,
    settled_lrs=rates(),
    constraints=left_out(STOPPED),
    guards="off",
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
