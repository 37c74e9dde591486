"""The main arms on the text of EU law, six seeds (sweeps/study.md); --data says where the text lies.

python sweeps/study_law.py            what its ledger lacks
python sweeps/study_law.py --plan     what it would run
"""

import sys

from study_shared import EVAL_BATCHES, rates, study

from altgrad.cli import sweep_main
from altgrad.training.config import DataConfig

SWEEP = study(
    "law",
    optimizers=("adamw", "adamw_sr", "manifold", "grid"),
    data=DataConfig(source="../shared/data/eurlex_sample/extra_lexcorpus.jsonl", eval_batches=EVAL_BATCHES),
    settled_lrs=rates(),
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
