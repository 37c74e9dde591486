"""Why formats and arms fail: what stopped their runs and when, or how far above BF16 they end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from altgrad.analysis.cells import Cell, Key
from altgrad.analysis.shifts import rescue_text
from altgrad.analysis.signs import sign_text
from altgrad.analysis.study import Study
from altgrad.analysis.verdicts import survival
from altgrad.analysis.wording import counted, listed, percent, several, share


def failure_answer(study: Study) -> str:
    """Of every failing format its arms, then the arms that fail in formats that do not, then other stops."""
    parts: list[str] = []
    told: set[Key] = set()
    for item in study.formats:
        if item.word == "fails":
            told.update(arm.cell.key for arm in item.arms)
            parts.append(f"{listed(item.formats)}: {_reasons(study, [arm.cell for arm in item.arms])}.")
    failing: dict[str, list[Cell]] = {}
    for key, verdict in study.verdicts.items():
        if verdict.word == "fails" and key not in told and verdict.cell in study.judged:
            failing.setdefault(verdict.cell.arm, []).append(verdict.cell)
    for arm, cells in failing.items():
        told.update(cell.key for cell in cells)
        parts.append(f"{arm} fails in {listed(f'{cell.format} ({reason(study, cell)})' for cell in cells)} (decided).")
    if others := [cell for cell in study.judged if cell.stops and cell.key not in told]:
        named = "; ".join(f"{cell.format} {cell.arm}, {reason(study, cell)}" for cell in others)
        parts.append(f"Stopped, not decided to fail: {named}.")
    if not parts:
        parts.append("No 8-bit format or arm is decided to fail.")
    if shifted := [cell for cell in study.judged if cell.shifted]:
        named = "; ".join(f"{cell.format} {cell.arm} {rescue_text(cell)}" for cell in shifted)
        parts.append(f"Not by themselves, which is no verdict: {named}.")
    # Stops that the answers do not speak of: of BF16 and FP32, other policies, rates that were not chosen.
    elsewhere = [
        f"{item.format} {item.arm}{'' if item.policy == study.policy else f' ({item.policy})'}, "
        f"{len(item.stops)} of {counted(item.n, 'seed')}{'' if item.lr == cell.lr else f' at rate {item.lr:g}'}"
        for cell in study.cells
        for item in cell.tried or (cell,)
        if item.stops and (item.lr != cell.lr or cell not in study.judged)
    ]
    if elsewhere:
        parts.append(f"Stopped elsewhere: {several(elsewhere)}.")
    elif not any(cell.stops or cell.shifted for cell in study.cells):
        parts.append("No run was stopped.")
    return " ".join(parts)


def _reasons(study: Study, cells: Sequence[Cell]) -> str:
    """The arms of a failing format, those with one reason together."""
    stopped = [cell for cell in cells if cell.stops]
    above = [cell for cell in cells if not cell.stops]
    parts = [f"{cell.arm} {reason(study, cell)}" for cell in stopped]
    if above:
        excesses = [study.verdicts[cell.key].excess for cell in above]
        low, high = percent(min(excesses)), percent(max(excesses))
        distance = low if low == high else f"{low} to {high}"
        unlearned = [cell.arm for cell in above if not any(map(cell.seed_learned, cell.losses))]
        tail = f", {listed(unlearned)} without having learned" if unlearned else ""
        signs = {text: cell.arm for cell in reversed(above) if (text := sign_text(list(cell.signs.values())))}
        tail += "".join(f"; {arm}: {text}" for text, arm in reversed(signs.items()))
        parts.append(
            f"{listed(cell.arm for cell in above)} {'ends' if len(above) == 1 else 'end'} {distance} from BF16{tail}"
        )
    return "; ".join(parts)


def reason(study: Study, cell: Cell) -> str:
    """What stopped the cell's runs, when, and how many finish; or how far above BF16 it ends."""
    sign = sign_text(list(cell.signs.values()))
    if not cell.stops:
        verdict = study.verdicts.get(cell.key)
        tail = f" ({sign})" if sign else ""
        return "" if verdict is None else f"ends {percent(verdict.excess)} from BF16{tail}"
    steps = [item.step for item in cell.stops.values()]
    when = f"step {steps[0]:.0f}" if min(steps) == max(steps) else f"steps {min(steps):.0f} to {max(steps):.0f}"
    if len(steps) > 2:
        when += f", median {statistics.median(steps):.0f}"
    low, high = survival(cell)
    return (
        f"stopped in {len(cell.stops)} of {counted(cell.n, 'seed')} by {stop_text(cell)} ({when}; "
        f"{share(low)} to {share(high)} of runs finish{f'; {sign}' if sign else ''})"
    )


def stop_text(cell: Cell) -> str:
    """Why the cell's seeds were stopped, by their commonest signal and layer."""
    stop = cell.main_stop()
    return stop.signal + (f" in {stop.layer}" if stop.layer else "")
