"""What a step of an optimizer did, left on the device until someone looks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import torch
from torch import Tensor

from altgrad.training.kernels import FIXED, Count


@dataclass(frozen=True)
class StepCounts:
    """What one step did to one tensor, as 0-d tensors.

    Numbers of elements: `flips` (code changed), `applied` (change not zero), `gradient` (|g| > 1e-10), `overflow`
    (wanted to leave the grid). In codes: `expected` flips under unbiased rounding, `travel` (sum of |code change|),
    `position` (sum of signed code changes). `rescaled` and `skipped` are 0 or 1.
    """

    row: Tensor

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_") or name.upper() not in Count.__members__:
            raise AttributeError(name)
        value = self.row[Count[name.upper()]]
        return value * 2.0**-FIXED if name == "expected" else value


class StepResult(Sequence[int]):
    """(flips, updates) of a step, fetched from the device when first looked at."""

    def __init__(self, rows: Sequence[Tensor]) -> None:
        self._rows = rows
        self._numbers: tuple[int, int] | None = None

    def _fetched(self) -> tuple[int, int]:
        if self._numbers is None:
            columns = [Count.FLIPS, Count.APPLIED]
            sums = [rows[:, columns].sum(0) for rows in self._rows]
            flips, updates = torch.stack(sums).sum(0).tolist() if sums else (0, 0)
            self._numbers = int(flips), int(updates)
        return self._numbers

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self._fetched()[index]

    def __iter__(self) -> Iterator[int]:
        return iter(self._fetched())

    def __len__(self) -> int:
        return 2

    def __eq__(self, other: object) -> bool:
        return self._fetched() == (tuple(other) if isinstance(other, Sequence) else other)

    def __hash__(self) -> int:
        return hash(self._fetched())

    def __repr__(self) -> str:
        return repr(self._fetched())
