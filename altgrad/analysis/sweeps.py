"""A sweep's folder as a report takes it: its manifest, the trials of its last sweep, by setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from altgrad.analysis.grids import SettledRates
from altgrad.analysis.records import Records, by_setting, load, newest_setting, of_sweep
from altgrad.analysis.scores import judged
from altgrad.analysis.study import MARGIN, Study, build_study
from altgrad.sweep.complaints import SpecError
from altgrad.sweep.record.folder import read_manifest


@dataclass(frozen=True)
class Sweep:
    """`recorded`: all that the folder's ledger holds; `selected`: the sweep's trials; `settings`: those, by setting."""

    manifest: Mapping[str, Any] | None
    recorded: Records
    selected: Records
    settings: Mapping[str, Records]

    def margin(self, asked: float | None) -> float:
        """As asked, else the sweep's own."""
        return float(self._spec.get("margin", MARGIN)) if asked is None else asked

    def equal_within(self, asked: float | None) -> float | None:
        """As asked, else the sweep's own."""
        return self._spec.get("equal_within") if asked is None else asked

    @property
    def settled_lrs(self) -> SettledRates:
        """Format to arm to policy: the learning rates that were settled before the sweep."""
        return self._spec.get("settled_lrs") or {}

    def study(self, records: Records, margin: float | None, equal_within: float | None) -> Study:
        """The study of one of the settings, by the sweep's own margins where None is asked for."""
        return build_study(
            judged(records.trials),
            margin=self.margin(margin),
            equal_within=self.equal_within(equal_within),
            settled=self.settled_lrs,
        )

    @property
    def axes(self) -> tuple[str, ...]:
        """The paths of the sweep's own axes."""
        return declared_axes(self.manifest)

    @property
    def _spec(self) -> Mapping[str, Any]:
        return (self.manifest or {}).get("spec") or {}


def declared_axes(manifest: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The paths of the axes that the spec in a manifest names."""
    return tuple(((manifest or {}).get("spec") or {}).get("axes") or ())


def read_sweep(out_dir: Path, trial_ids: Sequence[str] | None = None) -> Sweep:
    """The trials named, else those under `trials` in sweep.json, else all that share the newest setting.

    FileNotFoundError where the folder has no ledger; SpecError where the ledger holds none of the trials.
    """
    recorded = load(out_dir)
    manifest = read_manifest(out_dir)
    named = manifest.pop("trials", None) if manifest else None
    asked = named if trial_ids is None else trial_ids
    selected = recorded if asked is None else of_sweep(recorded, asked)
    if selected.trials.empty:
        lack = "no trials" if asked is None else f"none of the sweep's {len(asked)} trials"
        raise SpecError(f"{out_dir / 'ledger.sqlite'} holds {lack}")
    settings = {"": newest_setting(selected)} if asked is None else by_setting(selected)
    if asked is not None:
        counts = {label: len(selected.trials) - len(records.trials) for label, records in settings.items()}
        settings = {
            label: replace(records, outside=records.outside - counts[label]) for label, records in settings.items()
        }
    return Sweep(manifest, recorded, selected, settings)
