"""The page, chapter by chapter: what is asked, what was found, how surely, and what speaks against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from altgrad.analysis.figures import heat_map
from altgrad.analysis.study import Study
from altgrad.analysis.why import timeline
from altgrad.analysis.wording import counted, listed
from altgrad.results import elsewhere, failing, forecasts, geometry, provenance, training
from altgrad.results.evidence import Evidence, together
from altgrad.results.expectations import Expectation, expectations, ours
from altgrad.results.expectations import table as expectation_table
from altgrad.results.page import Block, Chapter, Figures

POLICIES = ("uniform", "uniform_full")
SHOWN = ("adamw", "adamw_sr", "manifold", "manifold_sr", "grid")
MAIN_STEPS = 400

Parts = Mapping[str, Evidence]
Verdicts = Mapping[str, Sequence[training.Trained]]
Pairs = Sequence[geometry.Judged]


def chapters(parts: Parts, figures: Figures, root: Path) -> list[Chapter]:
    """All of the page, in order."""
    main = parts["main"]
    whole = together([parts[name] for name in ("main", "twins", "wider", "layers") if name in parts])
    longer = parts["long"].study if "long" in parts else None
    one_rate = geometry.at_one_rate(parts["rates"].study) if "rates" in parts else None
    pairs = geometry.judged_pairs(main.study, longer, one_rate)
    verdicts = {policy: training.trained(main, parts.get("long"), policy) for policy in POLICIES}
    return [
        _answer(parts, verdicts, pairs),
        _design(parts),
        _training(main.study, verdicts, figures),
        _geometry(parts, pairs, figures),
        _failing(main.study, whole, figures),
        _expectations(parts, pairs),
        _forecasts(parts),
        _order(main.study),
        _elsewhere(parts, root),
        _threats(),
        _provenance(parts),
    ]


def _answer(parts: Parts, verdicts: Verdicts, pairs: Pairs) -> Chapter:
    study = parts["main"].study
    said = [f"{word.capitalize()}: {names}." for word in ("more", "less") if (names := geometry.named(pairs, word))]
    blocks: list[Block] = [
        f"1. **Which formats train?** {training.sentence(verdicts)}",
        "2. **Which benefits most from geometry-aware updates, beyond what the step rule gives anyway?** "
        + " ".join((geometry.sentence(pairs), *said)),
        f"3. **Why do the others fail?** {failing.sentence(study)}",
    ]
    if lacking := provenance.lacking(parts):
        blocks.append(f"**{lacking}** What is said below is of what has a result.")
    blocks.append(
        f"Scope: {parts['main'].trials['scope'].iloc[0]}, {elsewhere.seeds_of(study)} paired seeds, two CPU cores, "
        "learning rates settled per cell on other seeds. The plan, [sweeps/study.md](sweeps/study.md), was committed "
        "before the first judged run. `make results` writes this page from the shards in sweeps/study."
    )
    return Chapter("The answer", blocks)


def _design(parts: Parts) -> Chapter:
    blocks: list[Block] = [
        "Length, schedule and learning rates were chosen on seeds that judge nothing "
        "([docs/bench/study_design.md](docs/bench/study_design.md)): 400 steps, of which half decay (wsd), and again "
        "1 000 on other seeds. Each cell of format, arm and policy has one rate, the best of its grid on seeds 1000 to "
        "1002. `uniform` quantizes the weights of every linear layer; `uniform_full` activations and gradients too "
        "(gradients of E4M3 in E5M2). Formats are emulated, with one scale per tensor. A gain is the loss of the plain "
        "arm whose weights live in the same place minus that of the geometry-aware arm; an interaction is that gain "
        "minus the same gain in BF16, paired by seed."
    ]
    if "rates" in parts:
        blocks += [
            "Settled rates, in thousandths; † at an end of the grid. What two policies train alike (BF16, FP32, the "
            "control) stands under `uniform`.",
            provenance.rates_table(parts["rates"]),
        ]
    return Chapter("How it was asked", blocks)


def _training(study: Study, verdicts: Verdicts, figures: Figures) -> Chapter:
    blocks: list[Block] = [
        f"A format trains if one of its arms ends within {100 * study.margin:.0f} % of BF16 AdamW's loss, and fails if "
        "all end beyond it: one-sided tests at 5 %, paired by seed, corrected over arms or formats. Where the two "
        "lengths differ the longer one's word stands. At 400 steps little lies between training and not training: the "
        "last column asks for 2 %."
    ]
    for policy in POLICIES:
        blocks += [f"### {policy}", training.table(verdicts[policy])]
        blocks += figures.draw(
            f"excess_{policy}",
            f"Excess over BF16 AdamW's loss, {policy}",
            lambda path, policy=policy: training.excesses(study, policy, path, SHOWN),  # type: ignore[misc]
        )
        blocks += figures.draw(
            f"losses_{policy}",
            f"Loss minus BF16's by format and arm, {policy}; bordered: decided",
            lambda path, policy=policy: heat_map(study, [policy], path),  # type: ignore[misc]
        )
    return Chapter("Which formats train", blocks)


def _geometry(parts: Parts, pairs: Pairs, figures: Figures) -> Chapter:
    disagreeing = [one.name for one in pairs if one.item.disagrees]
    blocks: list[Block] = [
        geometry.sentence(pairs)
        + " *more*, *less*: the joint sign-flip test over whole seeds and the moderated simultaneous interval both "
        "exclude 0, and the median agrees; *equal*: the interval lies within a quarter of the arm's gain in BF16; "
        "*open* otherwise, with the seeds that would decide it. A gain in BF16 below 0 means that the step rule itself "
        "costs something here. E0M7 has one spacing, so that manifold steps are the plain ones there and their "
        "interaction is minus the gain in BF16, by construction. `grid` differs from adamw_sr in more than geometry.",
        "Which may gain most: " + " ".join(geometry.most(parts["main"].study, policy) for policy in POLICIES),
        f"The two tests disagree on {listed(disagreeing)}." if disagreeing else "The two tests agree on every pair.",
    ]
    if again := [one.again for one in pairs if one.again]:
        blocks.append(
            f"At 1 000 steps, {elsewhere.seeds_of(parts['long'].study)} other seeds: {again.count('confirmed')} of "
            f"{counted(len(again), 'word')} confirmed, {again.count('contradicted')} contradicted, the others not "
            "decided at one of the lengths."
        )
    for policy in POLICIES:
        blocks += [f"### {policy}", geometry.table(pairs, policy)]
    blocks += figures.draw(
        "interactions",
        "What geometry-aware arms gain beyond their gain in BF16, with simultaneous intervals",
        lambda path: geometry.forest(pairs, POLICIES, path),
    )
    return Chapter("Which benefit from geometry, beyond the step rule", blocks)


def _failing(study: Study, whole: Study, figures: Figures) -> Chapter:
    blocks: list[Block] = [
        failing.sentence(study),
        "Cells that fail, were stopped by a guard, or lie above BF16 by a decided amount; the first sign of failure is "
        "that of the earliest rule of `altgrad.sweep.record.signs` to hold.",
    ]
    if silent := failing.silent(study):
        texts = (f"{cell.format} {cell.arm} {cell.policy}" for cell in silent)
        blocks.append(f"Worse without any sign, too little being lost at any one place: {listed(texts)}.")
    for policy in POLICIES:
        found = failing.table(study, policy)
        if found.lines:
            blocks += [f"### {policy}", found]
    blocks += figures.draw(
        "first_signs",
        "First signs of failure by direction, and stops",
        lambda path: timeline(study, POLICIES, MAIN_STEPS, path),
    )
    for title, text, table in (
        (
            "What a policy changes, against weights alone",
            "Positive: the policy ends lower. `uniform_act` adds activations in 8 bits, `uniform_full` gradients too; "
            "the others leave a kind of layer in BF16.",
            failing.relief_table(whole),
        ),
        (
            "What the missing mantissa bits cost",
            "An 8-bit format minus 16 bits with its exponent bits, each at its own rate.",
            failing.width_table(whole),
        ),
    ):
        if table.lines:
            blocks += [f"### {title}", text, table]
    return Chapter("Why the others fail", blocks)


def _expectations(parts: Parts, pairs: Pairs) -> Chapter:
    main = parts["main"]
    races = forecasts.race(parts["rates"]).word if "rates" in parts else "not run"
    guards = forecasts.guard_word(main, parts.get("unguarded"))
    alarms = [Expectation(f"alarm: {one.name}", one.word, "next chapter") for one in forecasts.alarms(main)]
    blocks: list[Block] = [
        "The original planned these and never ran them:",
        expectation_table([*expectations(parts, pairs), *alarms]),
        "Ours, written down before the runs:",
        expectation_table(ours(pairs, forecasts.forecasts(main), guards, races)),
    ]
    return Chapter("What was expected", blocks)


def _forecasts(parts: Parts) -> Chapter:
    main = parts["main"]
    blocks: list[Block] = [
        '"Flip yield by 15 % of the run predicts the final loss better than the loss itself does": rank correlations '
        "with the final loss, and their difference with an interval from resampled seeds.",
        forecasts.forecast_table(forecasts.forecasts(main)),
        "The original's alarms, over runs in 8 bits; bad: more than 10 % above BF16 of its seed, or stopped. Useful: "
        "the exact intervals of both shares lie above .8.",
        forecasts.alarm_table(forecasts.alarms(main)),
        "Guards: runs that they stopped; of those trained on without guards, how many ended within 10 % of BF16.",
        forecasts.guard_table(main, parts.get("unguarded")),
    ]
    if "rates" in parts:
        blocks.append(forecasts.race_text(forecasts.race(parts["rates"])))
    return Chapter("What could be known early", blocks)


def _order(study: Study) -> Chapter:
    blocks: list[Block] = [
        "The published law for floating-point training (arXiv 2501.02423: the penalty is a product of falling powers "
        f"of E + .5 and M + .5) puts our formats in the order {listed(training.LAW)}. It gives E0M7 and E1M6 different "
        "penalties, though with a scale per tensor they are one grid.",
        *(f"`{policy}`: {training.order_text(study, policy)}" for policy in POLICIES),
    ]
    return Chapter("The order of formats", blocks)


def _elsewhere(parts: Parts, root: Path) -> Chapter:
    blocks: list[Block] = [
        "Exploratory: are the signs of the main setting found again? The same cells, at the rates settled for it.",
        elsewhere.training_table(parts, POLICIES),
        elsewhere.geometry_table(parts, POLICIES),
        "### On a GPU",
        elsewhere.gpu_text(root / "docs" / "bench" / "gpu.md"),
    ]
    return Chapter("In other settings", blocks)


def _threats() -> Chapter:
    text = (Path(__file__).parent / "threats.md").read_text(encoding="utf-8").strip()
    return Chapter("What speaks against it, and what is open", [text])


def _provenance(parts: Parts) -> Chapter:
    count, size = provenance.shard_count(parts)
    blocks: list[Block] = [
        f"{counted(count, 'shard')}, {size:.1f} MB, in sweeps/study. `altgrad report sweeps/study/main` (or another) "
        "shows each cell's trials by id, and the command that trains one of them again to the same bits.",
        provenance.costs(parts),
        provenance.sources(parts),
    ]
    return Chapter("Where the numbers come from", blocks)
