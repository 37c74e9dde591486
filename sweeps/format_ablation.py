"""Which 8-bit format can a small language model be trained in, and which gains from geometry-aware updates?

    python sweeps/format_ablation.py            about three minutes on two CPU cores
    python sweeps/format_ablation.py --plan     what it would run
    python sweeps/format_ablation.py --help     what can be changed

Equal seeds mean equal initial weights and equal batches in every cell, so differences are paired.
"""

import sys

from altgrad.cli import sweep_main
from altgrad.sweep import SweepSpec

SWEEP = SweepSpec(
    name="format_ablation",
    formats=("FP32", "BF16", "E0M7", "E1M6", "E3M4", "E5M2", "E7M0"),
    optimizers=("adamw", "adamw_nearest", "manifold", "grid"),
    seeds=2,
    steps=100,
)

if __name__ == "__main__":
    sys.exit(sweep_main(SWEEP))
