"""What is done with sweeps: plan and run. Each takes the parsed request and returns the exit code."""

from __future__ import annotations

import argparse
import math
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from altgrad.commands.flags import options_of, spec_of
from altgrad.commands.interrupts import terminable
from altgrad.sweep.complaints import SpecError, headline, nearest
from altgrad.sweep.engine.environment import check_environment
from altgrad.sweep.options import GROWING, RunOptions
from altgrad.sweep.plan import LOOK_STEPS, estimate, look_ahead
from altgrad.sweep.record import monitor
from altgrad.sweep.record.folder import check_folder, check_ledger, cores, is_disk_full
from altgrad.sweep.record.held import READER_SECONDS
from altgrad.sweep.record.ledger import outdated_text
from altgrad.sweep.record.monitor import print_table
from altgrad.sweep.record.progress import duration
from altgrad.sweep.run import SweepResult, preflight, run_sweep
from altgrad.sweep.space.sampling import sample_count
from altgrad.sweep.space.spec import SweepSpec
from altgrad.training.config import BASELINE, TrainConfig
from altgrad.training.data import NAMED, Corpus, Documents
from altgrad.training.data.cache import CacheError
from altgrad.training.devices import gpu_count


def _checked_corpus(
    spec: SweepSpec, options: RunOptions, request: argparse.Namespace, patience: float = math.inf
) -> Corpus | Documents:
    """The corpus, its notes printed; SpecError or FolderError, before a word is said, where a run can't be."""
    corpus = checked_data(spec, request)
    check_folder(options.out, fresh=options.fresh, patience=patience)
    for note in corpus.notes:
        print(f"data: {note}")
    return corpus


def checked_data(spec: SweepSpec, request: argparse.Namespace) -> Corpus | Documents:
    """The corpus; SpecError where there is none, or none for this model."""
    try:
        return preflight(spec)
    except CacheError as error:
        raise SpecError(str(error)) from None
    except ValueError as error:
        path = Path(spec.base.data.source)
        is_missing = spec.base.data.source not in NAMED and not path.exists() and path.parent.is_dir()
        close = nearest(path.name, [*NAMED, *(item.name for item in path.parent.iterdir())]) if is_missing else ""
        file = request.file or request.config
        where = "--" if getattr(request, "spec:data.source") is not None or file is None else f"{file}: "
        raise SpecError(f"{where}{error}{close}") from None


def run(request: argparse.Namespace) -> int:
    if request.plan:
        return plan(request)
    spec = spec_of(request)
    options = options_of(request, spec)
    _checked_corpus(spec, options, request)
    try:
        with terminable():
            result = run_sweep(spec, options)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        raise SpecError(f"--address: {options.address!r}: no Ray cluster answers ({reason})") from None
    except Exception as error:  # Ray wraps what its callbacks raise in errors of its own
        if not is_disk_full(error):
            raise
        print(
            f"altgrad: the disk of {options.out} is full; what is recorded is whole, and the same command goes on "
            "from there",
            file=sys.stderr,
        )
        return 1
    return _conclude(result)


def _conclude(result: SweepResult) -> int:
    from altgrad.analysis.report import write_report

    check_ledger(result.out / "ledger.sqlite", math.inf)  # the report's own reading does not wait for long
    finding = write_report(result.out)
    print(finding)
    endings = ", ".join(f"{count} {name}" for name, count in result.endings.most_common())
    print(f"{result.trials} trials: {endings}" + ("" if result.ran else "; nothing was left to run"))
    if result.outdated:
        print(outdated_text(result.outdated))
    print(f"report: {finding.path}")
    if result.broken is not None:
        print(f"altgrad: the sweep ended early: {result.broken}", file=sys.stderr)
    if result.over_budget is not None:
        print(
            f"altgrad: the budget is used up: {result.over_budget}; a higher cap goes on from the checkpoints",
            file=sys.stderr,
        )
    if result.left:
        print(
            f"altgrad: {result.left} trials are unfinished; altgrad why {result.out} says why, and the same "
            "command goes on",
            file=sys.stderr,
        )
    return 1 if result.left else 0


def plan(request: argparse.Namespace) -> int:
    spec = spec_of(request)
    options = options_of(request, spec)
    check_environment(options.address)
    trials = spec.trials(_checked_corpus(spec, options, request, READER_SECONDS).sha256)
    cells = Counter((config.format, config.arm, config.policy) for config in trials.values())
    print(f"{spec.name}: {len(trials)} trials of {spec.base.steps} steps in {len(cells)} cells, {spec.seeds} seeds")
    rows = [(*cell, str(count)) for cell, count in cells.items()]
    if rows:
        print_table([("format", "arm", "policy", "trials"), *rows])
    if spec.search == "optuna":
        print(f"and {sample_count(spec)} samples of {spec.seeds} seeds each, which optuna chooses as it goes")
    for exclusion in spec.exclusions():
        print(f"left out: {exclusion.trials} trials by {exclusion.rule} ({exclusion.reason})")
    left = trials
    if not options.fresh and check_ledger(options.out / "ledger.sqlite", READER_SECONDS):
        with monitor.open_ledger(options.out) as ledger:
            left = ledger.remaining(trials)
            print(f"{options.out} lacks {len(left)} of them")
            if outdated := ledger.outdated():
                print(f"{options.out}: {outdated_text(len(outdated))}")
    _print_estimate(spec, options, left)
    from altgrad.analysis.power import planned_power

    for line in planned_power(trials.values(), spec.seeds, spec.margin):
        print(line)
    _print_prospects(trials.values())
    return 0


def _print_prospects(trials: Iterable[TrainConfig]) -> None:
    """What a short reference run says of the formats that are asked for; nothing where the plan has no reference."""
    reference = next((config for config in trials if config.is_reference and config.format == BASELINE), None)
    if reference is None:
        return
    import pandas as pd

    from altgrad.analysis.prediction import planned, prospects_of, prospects_table

    asked = {config.format for config in trials}
    look = pd.DataFrame(look_ahead(reference), columns=["step", "layer", "signal", "value"])
    prospects = prospects_of(look)
    table = prospects_table({name: own for name, own in prospects.items() if name in asked})
    if table.lines:
        print(f"what formats would make of BF16 AdamW's tensors and steps, after {LOOK_STEPS} steps of it:")
        print_table([tuple(table.columns), *map(tuple, table.lines)])
    for line in planned(prospects, list(trials)):
        print(line)


def _print_estimate(spec: SweepSpec, options: RunOptions, left: dict[str, TrainConfig]) -> None:
    here = {"CPU": float(cores()), "GPU": float(gpu_count())}
    concurrent = options.concurrent(here) if options.address == "local" else options.max_concurrent or GROWING
    try:
        found = estimate(left, concurrent, min(concurrent, cores()), options)
    except Exception as error:  # whatever a trial raises in its probe it would raise in the sweep
        raise SpecError(f"a probe of the sweep's trials failed: {headline(error)}") from None
    if not left:
        print("nothing is left to run")
        return
    where = "" if options.address == "local" else "; by this machine's speed"
    cost = f", {found.gpu_seconds / 3600:.2g} GPU-hours" if options.gpus else ""
    cost += "" if found.usd is None else f", {found.usd:.2f} dollars"
    print(
        f"estimate: {duration(found.wall_seconds)} for {len(left)} trials, {concurrent} at a time{cost} "
        f"({found.classes} cost classes, measured by 20 steps each; early stops not counted{where})"
    )
    if spec.search == "optuna":
        more = (spec.num_samples or 0) * spec.seeds
        print(f"optuna samples up to {more} trials on the way; they are not in the estimate")
