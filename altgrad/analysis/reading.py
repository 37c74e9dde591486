"""How to read a report: what its words claim, and how surely."""

from __future__ import annotations

from altgrad.analysis.cells import LEARNED_NATS, LEARNED_SHARE, UNITS
from altgrad.analysis.contrasts import PRIMARY_FREE
from altgrad.analysis.inference import ALPHA, LEAST_JOINT
from altgrad.analysis.study import Study
from altgrad.analysis.wording import share

GAIN = (
    "Gain: the plain arm's {measure} minus the geometry-aware arm's, both with weights in the same place (master "
    "weights, or the grid), so that only the step rule differs; positive is a gain. Beyond BF16: minus what the "
    "same arm gains in BF16, where the format plays no part. Beyond FP32 control: minus what the same steps gain "
    "over float32 weights that nothing rounds. Intervals are simultaneous over each column."
)


def words(study: Study) -> dict[str, str]:
    """What the prose calls the number that cells are judged by, and how a run has learned and a choice is made."""
    found = {"measure": study.measure, "unit": study.unit}
    if study.unit == UNITS["lm"]:
        return found | {
            "mean": "Mean validation loss",
            "choice": "least mean validation loss",
            "learned": f"{share(LEARNED_SHARE)} or {LEARNED_NATS:g} nats below the training loss of its first step",
        }
    return found | {
        "mean": "Mean error on test documents, 1 − F1 micro,",
        "choice": "greatest mean F1 micro on validation documents",
        "learned": f"{share(LEARNED_SHARE)} below the error of giving every document the commonest labels",
    }


def how_to_read(study: Study) -> list[str]:
    """The meaning of trains, fails, decided, and of what is not averaged; a paragraph each."""
    margin, named = share(study.margin), words(study)
    measure, learned, choice = named["measure"], named["learned"], named["choice"]
    return [
        f"An arm trains in a format if the interval of its excess over BF16 AdamW's {measure}, paired by seed, lies "
        f"below {margin}, none of its runs was stopped and all have learned; a format trains if one of its arms "
        f"does. An arm fails if that interval lies above {margin}, and a format if those of all of its arms do; a "
        f"stopped run counts there with the {measure} of its first step. Anything else is not decided. A run has "
        f"learned if it ends {learned}; if BF16 AdamW itself has not, nothing is judged.",
        "Differences share their seed's weights and batches. An interval borrows part of its variance from the "
        "others of its table, is corrected for their number, and is never shorter than the plain 95 % t interval. "
        f"What is called decided is false in at most {share(ALPHA)} of sweeps, a question at a time. Differences "
        "that are skewed in one direction (rare bad seeds of one arm) break that, as they break every test of so "
        "few seeds: the median stands beside the mean.",
        f"From {LEAST_JOINT} seeds on a distribution-free test (sign flips of whole seeds, max-T) stands beside the "
        f"interval, and from {PRIMARY_FREE} seeds on nothing is decided unless both say so.",
        "Which benefits most: the pairs named are those that no other is shown to beat; the true best is among them in "
        f"{share(1 - ALPHA)} of sweeps.",
        f"A stopped run has no final {measure} and is never averaged. Gains with a stopped seed are compared by an "
        "exact test of stops and ranks, corrected by Holm. A run that a race pruned ranks its setting below the "
        "others of its cell; a lost one costs its seed only. A run in which a layer was shifted to another format is "
        "in no mean, no gain and no choice, and an arm with one is not said to train.",
        f"Of several learning rates a cell is shown at the one with the {choice}. Cells are compared over equal "
        "grids, so that choosing flatters all alike, or each at the one rate that was settled for it on other seeds.",
        "Flip yield is realised over expected code changes under unbiased rounding; stall ratio is 1 − flips / "
        "updates, high in healthy runs too.",
    ]
