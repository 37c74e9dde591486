"""Sweeps whose truth is known, and what a report must and must never say of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from synthetic import explode, stall

from altgrad.training.outcome import Outcome, OutcomeKind

Effects = dict[tuple[object, ...], object]
PLAIN = ["adamw", "manifold"]
OOM = Outcome(OutcomeKind.OOM, 3, message="out of memory")
PRUNED = Outcome(OutcomeKind.PRUNED, 50)


def mended(moves: str = "E4M3->E5M2", kind: str = "done") -> Outcome:
    """A run that a shift of its head brought to a loss that no other has."""
    return Outcome(OutcomeKind(kind), 100, train_loss=0.5, val_loss=0.5, formats=f"lm_head: {moves}")


def offsets(effects: Effects, spread: float = 0.003) -> Callable[..., object]:
    """Offsets by (format, arm), each run with noise of its own; E1M6 is E0M7 under another name."""

    def offset(name: str, arm: str, seed: int) -> object:
        name = "E0M7" if name == "E1M6" else name
        value = effects.get((name, arm), 0.0)
        noise = float(np.random.default_rng([seed, *map(ord, name + arm)]).normal(0, spread))
        return value + noise if isinstance(value, float) else value

    return offset


CASES: dict[str, tuple[list[str], list[str], int, Effects, list[tuple[int, str]], list[str]]] = {
    "the step rule gives more than the format": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("BF16", "manifold"): -0.20, ("E4M3", "manifold"): -0.12},
        [
            (1, "Neither of the 2 format–arm pairs is decided to gain more than in BF16."),
            (1, "Decided to gain less than in BF16: E5M2 manifold −0.20"),
            (1, "E4M3 manifold −0.0"),
        ],
        ["benefits most", "Decided to gain more"],
    ),
    "one format benefits": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.2},
        [(1, "Of 3 pairs compared E4M3 with manifold benefits most (decided): +0."), (1, "beyond its gain of")],
        ["Not compared"],
    ),
    "two benefit alike": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.1, ("E5M2", "manifold"): -0.1},
        [(1, "Which one is not decided: it may be E"), (1, "Decided to gain more than in BF16: E")],
        ["benefits most", "it may be E3M4"],
    ),
    "one grid under two names": (
        ["BF16", "E0M7", "E1M6", "E5M2"],
        PLAIN,
        6,
        {("E0M7", "manifold"): -0.1},
        [(1, "E0M7 = E1M6 with manifold benefits most (decided)"), (0, "E0M7, E1M6 and E5M2 train (decided)")],
        [],
    ),
    "nothing differs": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        4,
        {},
        [
            (0, "E4M3 and E5M2 train (decided)"),
            (1, "Neither of the 2 format–arm pairs is decided to gain more"),
            (1, "4 seeds can show differences from BF16's gain of about 0.0"),
            (2, "No 8-bit format or arm is decided to fail. No run was stopped."),
        ],
        ["benefits most", "Decided to gain"],
    ),
    "two seeds, close to the margin": (
        ["BF16", "E4M3", "E7M0"],
        ["adamw"],
        2,
        {("E4M3", "adamw", 0): 0.25, ("E4M3", "adamw", 1): 0.35, ("E7M0", "adamw"): 3.0},
        [
            (0, "E7M0 fails in every arm (decided)"),
            (0, "Not decided: E4M3 (its best arm, adamw, +1"),
            (0, "would decide it"),
        ],
        ["E4M3 fails", "E4M3 trains"],
    ),
    "out of memory in an unrelated cell": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.03, ("E3M4", "manifold"): OOM},
        [(1, "E4M3 with manifold benefits most (decided): +0.0"), (0, "E3M4, E4M3 and E5M2 train (decided)")],
        [],
    ),
    "the reference lost a seed": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        5,
        {("E4M3", "manifold"): -0.1, ("BF16", "adamw", 3): None},
        [
            (0, "E4M3 and E5M2 train (decided)"),
            (1, "E4M3 with manifold benefits most (decided)"),
            (3, "BF16 AdamW has no loss at seed 3"),
        ],
        [],
    ),
    "a rescue that trains": (
        ["BF16", "E4M3", "E7M0"],
        PLAIN,
        6,
        {("E7M0", "adamw"): stall(), ("E7M0", "manifold"): 0.02},
        [
            (0, "E4M3 and E7M0 train (decided)"),
            (
                1,
                "manifold rescues E7M0, decided (p = 0.0043; E7M0: manifold stopped in 0 of 6 seeds, adamw in 6 of 6).",
            ),
            (2, "adamw fails in E7M0 (stopped in 6 of 6 seeds by flip_yield in lm_head (step 30, median 30; 0 % to 46"),
        ],
        [],
    ),
    "a rescue that does not train": (
        ["BF16", "E4M3", "E7M0"],
        PLAIN,
        6,
        {("E7M0", "adamw"): stall(), ("E7M0", "manifold"): 1.0},
        [(1, "decided (p = 0.0043), but manifold fails to train there."), (0, "E7M0 fails in every arm (decided)")],
        ["rescues"],
    ),
    "too few seeds for a rescue": (
        ["BF16", "E4M3", "E7M0"],
        PLAIN,
        3,
        {("E7M0", "adamw"): stall()},
        [(1, "E7M0: manifold stopped in 0 of 3 seeds, adamw in 3 of 3: not decided (p = 0.2).")],
        ["rescues"],
    ),
    "all runs of a format were pruned": (
        ["BF16", "E5M2", "E6M1"],
        ["adamw"],
        3,
        {("E6M1", "adamw"): PRUNED},
        [(0, "Without result: E6M1 (all runs were pruned or lost)."), (0, "E5M2 trains (decided)")],
        ["E6M1 fail"],
    ),
    "all runs of a format needed another": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "adamw"): mended(), ("E4M3", "manifold"): mended(kind="stalled"), ("E5M2", "manifold"): -0.1},
        [
            (0, "E5M2 trains (decided)"),
            (0, "Without result of their own: E4M3 (adamw needed rescue: shifted to E5M2 in 6 of 6 seeds; manifold ne"),
            (1, "Only E5M2 with manifold could be compared"),
            (1, "Not compared: E4M3 manifold (runs of E4M3 adamw and E4M3 manifold needed a shift of formats)."),
            (2, "Not by themselves, which is no verdict: E4M3 adamw needed rescue: shifted to E5M2 in 6 of 6 seeds;"),
            (
                3,
                "Left out of every verdict, gain and choice: 12 trials in which a layer had to be moved to another for",
            ),
            (3, "E4M3 adamw: E4M3->E5M2 in 6 of 6 seeds and E4M3 manifold: E4M3->E5M2 in 6 of 6 seeds."),
        ],
        ["E4M3 trains", "E4M3 and", "E4M3 fails", "No run was stopped", "stopped in", "Incomplete", "pruned or lost"],
    ),
    "one run of an arm needed another format": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw"],
        6,
        {("E4M3", "adamw", 2): mended("E4M3->E3M4, x.y: E4M3->E5M2")},
        [
            (0, "E5M2 trains (decided)"),
            (0, "Not decided: E4M3 (adamw, its best arm, needed rescue: shifted to E3M4 and E5M2 in 1 of 6 seeds)"),
            (3, "a layer had to be moved to another format, E4M3 adamw: E4M3->E3M4 and E4M3->E5M2 in 1 of 6 seeds."),
        ],
        ["E4M3 and E5M2", "E4M3 trains"],
    ),
    "one run of the reference needed another format": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("BF16", "adamw", 2): mended("BF16->FP32"), ("E4M3", "manifold"): -0.1},
        [
            (0, "5 seeds): E4M3 and E5M2 train (decided)"),
            (1, "Not compared: E4M3 manifold and E5M2 manifold (runs of BF16 adamw needed a shift of formats)."),
            (3, "BF16 AdamW has no loss at seed 2: nothing is compared there."),
        ],
        ["benefits most"],
    ),
    "all runs of the reference needed another format": (
        ["BF16", "FP32", "E5M2"],
        ["adamw"],
        3,
        {("BF16", "adamw"): mended("BF16->FP32")},
        [(0, "no BF16 AdamW reference has finished by itself (needed rescue: shifted to FP32 in 3 of 3 seeds)")],
        ["train (decided)"],
    ),
    "arms on the grid against the plain arm on the grid": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw", "adamw_sr", "grid"],
        6,
        {("E4M3", "adamw_sr"): 0.1, ("E4M3", "grid"): 0.1, ("E5M2", "grid"): -0.05},
        [(1, "E5M2 with grid benefits most (decided): +0.0")],
        ["E4M3 with grid benefits"],
    ),
    "one run diverges to a finite number": (
        ["BF16", "E2M5", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E2M5", "adamw", 0): 3e5, ("E4M3", "manifold"): -0.1, ("E3M4", "manifold"): -0.05},
        [
            (1, "it may be E2M5 with manifold or E4M3 with manifold"),
            (1, "Decided to gain more than in BF16: E4M3 manifold +0."),
        ],
        ["As in BF16 in every seed"],
    ),
    "a rival with a stopped seed": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.1, ("E5M2", "manifold"): -0.4, ("E5M2", "manifold", 2): stall()},
        [(1, "Of 2 pairs compared"), (1, "Not compared: E5M2 manifold (stopped runs of E5M2 manifold).")],
        [],
    ),
    "a rival that was lost, and one without its plain arm": (
        ["BF16", "E3M4", "E4M3", "E5M2"],
        [*PLAIN, "grid"],
        6,
        {("E4M3", "manifold"): -0.1, ("E5M2", "manifold"): OOM},
        [
            (1, "Of 2 pairs compared E4M3 with manifold benefits most (decided)"),
            (1, "E3M4 grid, E4M3 grid and E5M2 grid (its plain arm, adamw_sr, was not run"),
            (1, "E5M2 manifold (no result of E5M2 manifold)"),
        ],
        [],
    ),
    "stops of the plain arm in BF16 too": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw", "adamw_sr", "grid"],
        6,
        {(name, "adamw_sr"): stall() for name in ("BF16", "E4M3", "E5M2")},
        [
            (1, "but runs stop in BF16 too, so that the format is not the reason"),
            (2, "Stopped elsewhere: BF16 adamw_sr"),
        ],
        ["rescues", "No run was stopped"],
    ),
    "an arm that stops more": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): stall()},
        [(1, "manifold stopped in 6 of 6 seeds, adamw in 0 of 6: manifold stops more, decided (p = 0.0043)")],
        ["rescues"],
    ),
    "a twin that lost a seed": (
        ["BF16", "E0M7", "E1M6", "E5M2"],
        PLAIN,
        6,
        {("E0M7", "manifold"): -0.1, ("E1M6", "manifold", 2): None},
        [(1, "Of 2 pairs compared E0M7 = E1M6 with manifold benefits most (decided)")],
        ["E0M7 with manifold or"],
    ),
    "a twin whose other name lost the arm that trains": (
        ["BF16", "E0M7", "E1M6"],
        PLAIN,
        4,
        {("E0M7", "adamw"): 0.5, **{("E0M7", "manifold", seed): OOM for seed in range(4)}},
        [(0, "E0M7 and E1M6 train (decided)")],
        [],
    ),
    "runs that explode in the first step": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw"],
        3,
        {("E4M3", "adamw"): explode(1)},
        [(0, "E4M3 fails in every arm (decided)"), (2, "stopped in 3 of 3 seeds by train_loss (step 1")],
        [],
    ),
    "losses beyond all measure": (
        ["BF16", "E2M5", "E4M3", "E5M2", "E6M1"],
        ["adamw"],
        2,
        {("E2M5", "adamw", 0): 1e30, ("E4M3", "adamw", 0): 1e30},
        [(0, "E2M5 (its best arm")],
        ["00000000000"],
    ),
    "an arm that ends low and has not learned": (
        ["BF16", "E4M3", "E5M2"],
        PLAIN,
        6,
        {("E4M3", "manifold"): -0.1, **{("E4M3", "adamw", seed): OOM for seed in range(6)}},
        [(1, "Not compared: E4M3 manifold (no result of E4M3 adamw)")],
        ["E4M3 with manifold benefits"],
    ),
    "everything explodes": (
        ["BF16", "E4M3", "E5M2"],
        ["adamw"],
        3,
        {("E4M3", "adamw"): explode(), ("E5M2", "adamw"): explode()},
        [(0, "E4M3 and E5M2 fail in every arm (decided)."), (2, "stopped in 3 of 3 seeds by train_loss (step 12")],
        ["train (decided)"],
    ),
}
