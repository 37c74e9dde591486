"""One driver owns a folder, a dead one owns nothing, and nothing is ever deleted."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.sweep.record.folder import FolderError, check_folder, check_ledger, has_driver, manifest, owned
from altgrad.sweep.record.ledger import Ledger

OWNER = """
import sys, time
from pathlib import Path
from altgrad.sweep.record.folder import owned
with owned(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


def test_a_live_driver_keeps_others_out_and_a_killed_one_does_not(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(out)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "mine\n"
    with pytest.raises(FolderError, match="in use by another running sweep"), owned(out):
        pass
    with pytest.raises(FolderError, match="in use"), owned(out, fresh=True):
        pass
    assert has_driver(out)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    assert not has_driver(out)
    with owned(out):
        assert has_driver(out)


def test_fresh_moves_the_old_sweep_aside(tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    with owned(out, fresh=True):
        (out / "ledger.sqlite").write_text("evidence")
    with owned(out, fresh=True):
        assert [item.name for item in out.iterdir()] == [".lock"]
        assert has_driver(out)
    (aside,) = tmp_path.glob("sweep.*")
    assert (aside / "ledger.sqlite").read_text() == "evidence"


def test_only_empty_new_or_sweep_folders_will_do(tmp_path: Path) -> None:
    check_folder(tmp_path)
    check_folder(tmp_path / "a" / "b")
    (tmp_path / "ledger.sqlite").touch()
    check_folder(tmp_path)
    (tmp_path / "ledger.sqlite").rename(tmp_path / "thesis.tex")
    with pytest.raises(FolderError, match=r"other things \(thesis.tex\)"):
        check_folder(tmp_path)
    with pytest.raises(FolderError, match="is a file"):
        check_folder(tmp_path / "thesis.tex")


def test_the_manifest_names_versions_and_machine() -> None:
    found = manifest()
    assert {"torch", "ray", "altgrad"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1 and {"git", "numerics", "python"} <= set(found)


def test_a_path_through_a_file_and_the_folder_one_stands_in_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="file is a file"):
        check_folder(tmp_path / "file" / "sub")
    with pytest.raises(FolderError, match="can't be used"), owned(tmp_path / "file" / "sub"):
        pass
    (tmp_path / "sweep" / "trials").mkdir(parents=True)
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "sweep" / "trials")
    check_folder(Path(".."))
    for out in (Path(".."), tmp_path / "sweep"):
        with pytest.raises(FolderError, match="can't be moved aside"):
            check_folder(out, fresh=True)


def test_a_ledger_that_is_none_is_refused_and_an_empty_one_holds_no_sweep(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.touch()
    assert not check_ledger(path, 0)
    path.write_text("garbage " * 100)
    with pytest.raises(FolderError, match="no readable ledger"):
        check_folder(tmp_path)
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE recipes (name)")
    with pytest.raises(FolderError, match="no ledger"):
        check_folder(tmp_path)
    path.unlink()
    Ledger(path).close()
    assert check_ledger(path, 0)
