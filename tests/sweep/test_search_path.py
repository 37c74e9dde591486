"""Files that hide modules: in the current folder, beside a sweep file, on PYTHONPATH."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from smallest import SMALLEST

from altgrad import search_path
from altgrad.sweep.record.ledger import Ledger
from altgrad.training.outcome import OutcomeKind

ROOT = Path(search_path.__file__).parents[1]
HIDING = ("torch.py", "random.py", "json.py", "numpy.py", "pickle.py", "numba/__init__.py", "ray/__init__.py")
HARMLESS = ("helper.py", "test.py", "code.py", "numba/readme.txt", "not a module.py")
PROGRAM = """
import sys
from altgrad.cli import main
import {name}
if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def written(folder: Path, *names: str, text: str = "raise RuntimeError('the wrong module')") -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def call(cwd: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    own = {"PYTHONPATH": os.pathsep.join([variables.pop("PYTHONPATH", ""), str(ROOT)]).lstrip(os.pathsep)}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd,
        env=os.environ | own | variables,
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )


@pytest.mark.parametrize("way", ["-m", "beside", "current"])
def test_what_lies_where_the_program_starts_hides_nothing(tmp_path: Path, way: str) -> None:
    written(tmp_path, *HIDING)
    (tmp_path / "mine.py").write_text(PROGRAM.format(name="this"))
    (tmp_path / "below").mkdir()
    words = ["-m", "altgrad"] if way == "-m" else [str(tmp_path / "mine.py")]
    done = call(tmp_path / "below" if way == "beside" else tmp_path, *words, "formats")
    assert done.returncode == 0 and "E5M2" in done.stdout and not done.stderr, done


@pytest.mark.parametrize("name", HARMLESS)
def test_other_files_can_still_be_imported(tmp_path: Path, name: str) -> None:
    written(written(tmp_path, "random.py"), name, text="VALUE = 1")
    (tmp_path / "mine.py").write_text(PROGRAM.format(name="helper" if name == "helper.py" else "os"))
    done = call(tmp_path, "mine.py", "status", "nowhere")
    assert done.returncode == 2 and "no sweep" in done.stderr, done


@pytest.mark.parametrize("name", ["random.py", "json.py", "torch.py", "numba/__init__.py", "ray.py"])
def test_what_pythonpath_hides_is_one_line(tmp_path: Path, name: str) -> None:
    place = written(tmp_path / "path", name)
    done = call(tmp_path, "-m", "altgrad", "run", "--plan", PYTHONPATH=str(place))
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done
    module = name.split("/")[0].removesuffix(".py")
    assert done.stderr.startswith(f"altgrad: PYTHONPATH: {place / name.split('/')[0]} hides"), done.stderr
    assert f"module {module}" in done.stderr and "Traceback" not in done.stderr


def test_a_hiding_module_that_works_is_refused_where_it_is_pythons_own(tmp_path: Path) -> None:
    place = written(tmp_path / "path", "colorsys.py", "yaml_helper.py", "test.py", text="")
    (tmp_path / "mine.py").write_text(PROGRAM.format(name="colorsys, yaml_helper"))
    done = call(tmp_path, "mine.py", "status", str(tmp_path), PYTHONPATH=str(place))
    assert done.returncode == 2 and "colorsys.py hides Python's own module colorsys" in done.stderr
    (place / "colorsys.py").unlink()
    done = call(tmp_path, "mine.py", "status", str(tmp_path), PYTHONPATH=str(place))
    assert "no sweep" in done.stderr, "test.py is nobody's concern"


def test_another_installation_on_pythonpath_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = written(tmp_path, "numba/__init__.py")
    monkeypatch.setenv("PYTHONPATH", str(place))
    assert "numba" in (search_path.hidden_installation(("torch", "numba")) or "")
    (place / "numba-0.61.dist-info").mkdir()
    assert search_path.hidden_installation(("torch", "numba")) is None


def test_errors_of_other_kinds_keep_their_traceback(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PROGRAM.format(name="os") + "1 / 0\n")
    written(tmp_path, "random.py")
    done = call(tmp_path, "-c", "import altgrad.cli; 1 / 0")
    assert "ZeroDivisionError" in done.stderr and "Traceback" in done.stderr and "hides" not in done.stderr


@pytest.fixture
def restored() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before


def test_workers_get_nothing_but_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restored: None) -> None:
    from altgrad.sweep.engine.connection import OwnPath

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(sys, "path", [str(tmp_path), str(ROOT), *sys.path])
    assert OwnPath()._py_driver_sys_path == []
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(search_path, "OWN", str(ROOT))
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if "ditable" not in repr(finder)])
    assert OwnPath()._py_driver_sys_path == [str(ROOT)], "a checkout that is not installed"


@pytest.mark.slow
def test_a_sweep_runs_among_files_that_hide_modules(tmp_path: Path) -> None:
    written(tmp_path, *HIDING)
    (tmp_path / "mine.json").write_text(json.dumps(SMALLEST | {"seeds": 1, "steps": 20, "eval_interval": 10}))
    (tmp_path / "mine.py").write_text(PROGRAM.format(name="os"))
    words = ["run", "mine.json", "--out", "out", "--max-concurrent", "1"]
    done = call(tmp_path, "mine.py", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    with Ledger.reading(tmp_path / "out" / "ledger.sqlite") as ledger:
        assert {outcome.kind for outcome in ledger.outcomes().values()} == {OutcomeKind.DONE}
