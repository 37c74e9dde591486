"""A sweep file, read for the value that it holds: what a person's own code does wrong is one line with its place."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import TYPE_CHECKING

from altgrad.sweep.complaints import SpecError, place_of

if TYPE_CHECKING:
    from altgrad.sweep.space.spec import SweepSpec

_being_read: Path | None = None


def check_started() -> None:
    """SpecError where a sweep is started by a file that is only read."""
    if _being_read is not None:
        raise SpecError(
            f'{_being_read} starts its sweep when it is only read: a line `if __name__ == "__main__":` above '
            "sweep_main is expected"
        )


def sweep_in(file: Path) -> SweepSpec:
    """The one sweep that the file holds; SpecError where reading it raises anything, and where it holds no or more."""
    from altgrad.sweep.space.spec import SweepSpec

    global _being_read
    _being_read = file
    try:
        values = runpy.run_path(str(file)).values()
    except SpecError:
        raise
    except (Exception, SystemExit) as error:  # whatever a person's own code raises
        if isinstance(error, OSError) and not file.is_file():
            raise SpecError(f"{file}: {error.strerror}") from None
        raise SpecError(place_of(error, str(file))) from None
    finally:
        _being_read = None
    found = [value for value in values if isinstance(value, SweepSpec)]
    if len(found) != 1:
        raise SpecError(f"{file} holds {len(found)} sweeps; one SweepSpec is expected")
    return found[0]
