"""Files that hide modules: a random.py beside a sweep file, a torch.py in the current folder or in one of PYTHONPATH.

Python looks into the folder of the program, or with -m into the current one, before it looks for its own modules.
Importing this module, which the command line does first of all, puts that folder last where something in it would hide
a module: the rest of it can still be imported. What PYTHONPATH hides was asked for, and every worker inherits it; but
an error that nobody catches is then told as what it comes of, and a command refuses to start.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import PathFinder
from traceback import walk_tb
from types import TracebackType

import altgrad


def _own_folder() -> str | None:
    """Where Python looks first by itself: the program's folder or the current one; None where it does not."""
    if sys.flags.safe_path or not sys.path:
        return None
    program = getattr(sys.modules.get("__main__"), "__file__", None)
    own = [""] if program is None else ["", os.path.dirname(os.path.realpath(program))]  # noqa: PTH120
    return sys.path[0] if _real(sys.path[0]) in map(_real, own) else None


def _real(place: str) -> str:
    """The folder that an entry of a path means; its own text where the current folder, which it is about, is gone."""
    try:
        return os.path.realpath(place or ".")
    except FileNotFoundError:
        return place


def variable_folders() -> list[str]:
    """The folders of PYTHONPATH."""
    value = os.environ.get("PYTHONPATH")
    return [_real(place) for place in value.split(os.pathsep)] if value else []


def _modules_in(folder: str) -> Iterator[tuple[str, str]]:
    """Names and files of the modules and packages in a folder."""
    try:
        names = sorted(os.listdir(folder or "."))  # noqa: PTH208
    except OSError:
        return
    for name in names:
        path = os.path.join(folder, name)  # noqa: PTH118
        stem, ending = os.path.splitext(name)  # noqa: PTH122
        if ending == ".py" and stem.isidentifier():
            yield stem, path
        elif name.isidentifier() and os.path.isfile(os.path.join(path, "__init__.py")):  # noqa: PTH113, PTH118
            yield name, path


def _is_elsewhere(name: str, folder: str) -> bool:
    """Whether Python, or another folder of the path, has a module of this name."""
    if name in sys.stdlib_module_names:
        return True
    other = [place for place in sys.path if place != folder]
    found = PathFinder.find_spec(name, other)
    return found is not None and found.origin is not None


def settle() -> str | None:
    """Puts the own folder last where it hides modules; returns it."""
    folder = _own_folder()
    if folder is not None and any(
        _is_elsewhere(name, folder) for name, _ in _modules_in(folder) if name != altgrad.__name__
    ):
        sys.path.remove(folder)
        sys.path.append(folder)
    return folder


def hiding(error: BaseException | None = None) -> str | None:
    """A line on a module that is loaded from the own folder, or from one of PYTHONPATH, in place of Python's own.

    With an error: or in place of an installed one, which somebody may have meant; or one whose code raised the error.
    """
    variable = variable_folders()
    trace = None if error is None else error.__traceback__
    raised_in = {os.path.realpath(frame.f_code.co_filename) for frame, _ in walk_tb(trace)}
    for folder in [*([] if OWN is None else [_real(OWN)]), *variable]:
        for name, path in _modules_in(folder):
            if name == altgrad.__name__ or (error is None and name not in sys.stdlib_module_names):
                continue
            loaded = getattr(sys.modules.get(name), "__file__", None) or ""
            files = {os.path.realpath(loaded), *raised_in}
            is_in_use = any(f"{file}/".startswith(f"{os.path.realpath(path)}/") for file in files)
            if is_in_use and _is_elsewhere(name, folder):
                return _line(path, name, "PYTHONPATH: " if folder in variable else "")
    return None


def hidden_installation(names: Iterable[str]) -> str | None:
    """A line on a file or folder in one of PYTHONPATH that stands before an installed package of one of these names.

    Not on one that is an installation itself: beside it stands which version it is.
    """
    for folder in variable_folders():
        here = dict(_modules_in(folder))
        for name in sorted(set(names) & here.keys()):
            about = [entry for entry in os.listdir(folder) if entry.endswith(("-info", ".egg-link"))]  # noqa: PTH208
            is_installed = any(entry.lower().replace("-", "_").startswith(name.lower()) for entry in about)
            if not is_installed and _is_elsewhere(name, folder):
                return _line(here[name], name, "PYTHONPATH: ")
    return None


def _line(path: str, name: str, way: str) -> str:
    owner = "Python's own" if name in sys.stdlib_module_names else "the installed"
    return f"{way}{path} hides {owner} module {name}: give it another name, or keep it elsewhere"


def is_found_by_workers() -> bool:
    """Whether a process with the same environment, but another program in another folder, would import this package."""
    own = None if OWN is None or _real(OWN) in variable_folders() else _real(OWN)
    places = [place for place in sys.path if _real(place) != own]
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        if find is None:
            continue
        spec = PathFinder.find_spec(altgrad.__name__, places) if finder is PathFinder else find(altgrad.__name__, None)
        if spec is not None:
            return spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(altgrad.__file__)
    return False


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Python's hook for errors that nobody catches."""
    line = next((said for explain in EXPLAIN if (said := explain(error))), None)
    if line is None:
        _before(kind, error, trace)
    else:
        if sys.stderr is not None:
            print(f"altgrad: {line}", file=sys.stderr)
        raise SystemExit(2)


def _hidden(error: BaseException) -> str | None:
    line = hiding(error)
    return None if line is None else f"{line} ({type(error).__name__}: {error})"


OWN = settle()
EXPLAIN: list[Callable[[BaseException], str | None]] = [_hidden]
"""What may have a line for an error that nobody has caught, in place of its traceback."""
_before, sys.excepthook = sys.excepthook, _tell
