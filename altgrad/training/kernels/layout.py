"""Where the compiled step finds what: the columns of its table of tensors, a plan's numbers, a format's words."""

from __future__ import annotations

WEIGHT, GRAD, FIRST, SECOND, DIRECTION, CARRY, STEP, SCALE, STREAK, MEAN, LARGEST, ELEMENTS, SEED, KNOWN = range(14)
"""Columns of the table: addresses, the number of elements, the seed of the draws, whether the largest is known."""

(
    LR,
    BETA1,
    BETA2,
    EPS,
    DECAY,
    MAX_STIFFNESS,
    RUNG_CLIP,
    MASTER_SCALE,
    PER_MAX,
    MAX_VALUE,
    LEAST_STIFFNESS,
    HAS_EXPONENT,
    IS_WIDE,
) = range(13)
"""The numbers of a plan."""

OFFSET, LOWEST, HIGHEST, MAX_INDEX, FIRST_NORMAL, TO_FIXED, MANTISSA_STEP = range(11, 18)
"""The words of a format behind those of the rounding loops."""

PIECE, LANES = 1 << 14, 16
"""Elements of a piece at most, and of a cache line, at which pieces are cut."""
