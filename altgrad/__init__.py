"""AltGrad: which 8-bit floating-point format can a model be trained in, and why do the others fail?

Four floors, imports run only downward: `altgrad.quantization` (numbers and the layers that use them),
`altgrad.training` (one loop), `altgrad.sweep` (Ray), `altgrad.analysis` (reads ledgers, writes reports).
Importing this package loads none of ray, wandb, datasets or matplotlib.
"""

__version__ = "0.1.0"

NUMERICS_VERSION = 3
"""Raised when the same configuration would give other weights, losses or scores; it is part of a trial's identity."""
