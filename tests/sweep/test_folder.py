"""One driver owns a folder, a dead one owns nothing, and nothing is ever deleted."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from altgrad.sweep.folder import FolderError, check_folder, has_driver, manifest, owned

OWNER = """
import sys, time
from pathlib import Path
from altgrad.sweep.folder import owned
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
