"""The main arms as classifiers of EU law by its domains, six seeds (sweeps/study.md); --data says where it lies.

python sweeps/study_classify.py            what its ledger lacks
python sweeps/study_classify.py --plan     what it would run
"""

import sys

from study_shared import rates, study

from altgrad.cli import sweep_main
from altgrad.sweep.space.presets import CLASSIFY
from altgrad.training.config import DataConfig

FOLDER = "../shared/data/eurlex_sample"
SETTING = CLASSIFY["quick"] | {"data": DataConfig(source=FOLDER, label_field="labels_l1", **CLASSIFY["quick"]["data"])}
SWEEP = study(
    "classify", task="classify", optimizers=("adamw", "adamw_sr", "manifold", "grid"), settled_lrs=rates(), **SETTING
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
