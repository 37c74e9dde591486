"""What activations cost, and which layers a format is too narrow for: policies between, six seeds (sweeps/study.md).

python sweeps/study_layers.py            what its ledger lacks
python sweeps/study_layers.py --plan     what it would run
"""

import sys

from study_shared import rates, study

from altgrad.cli import sweep_main

SPARING = ("uniform_act", "attention_bf16", "mlp_bf16", "head_bf16")
SWEEP = study(
    "layers",
    optimizers=("adamw", "manifold"),
    policies=SPARING,
    settled_lrs=rates(policies=dict.fromkeys(SPARING, "uniform")),
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
