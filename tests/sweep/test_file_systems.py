"""File systems that are no disks: the ledger's journal suits them, and one without locks is refused before a trial."""

import errno
import fcntl
import os
import sqlite3
from pathlib import Path

import pytest

from altgrad.sweep.record import file_systems
from altgrad.sweep.record.folder import FolderError, owned
from altgrad.sweep.record.ledger import Ledger


def mount(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> None:
    """Makes `folder` look like a mount of the file system `name`."""
    mounts = folder.parent / f"mounts-{name}"
    point = str(folder).replace(" ", r"\040")
    lines = "/dev/root / ext4 rw 0 0", f"/dev/x {point} ext4 rw 0 0", f"server:/x {point} {name} rw 0 0"
    mounts.write_text("\n".join([*lines, f"tmpfs {point}er tmpfs rw 0 0", ""]))
    monkeypatch.setattr(file_systems, "MOUNTS", mounts)


def journal(path: Path) -> str:
    connection = sqlite3.connect(path)
    (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
    connection.close()
    return str(mode)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("ext4", "wal"), ("overlay", "wal"), ("nfs4", "delete"), ("fuse.mfs", "delete"), ("9p", "delete")],
)
def test_the_ledger_shares_memory_on_disks_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, mode: str
) -> None:
    volume = tmp_path / "a volume, données"
    volume.mkdir()
    mount(monkeypatch, volume, name)
    assert file_systems.kind(volume / "not" / "yet") == name and file_systems.kind(tmp_path) == "ext4"
    with Ledger(volume / "run" / "ledger.sqlite"):
        pass
    assert journal(volume / "run" / "ledger.sqlite") == mode


def test_a_ledger_that_came_from_a_disk_changes_its_journal_once_nobody_has_it_open(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.sqlite"
    with Ledger(path) as driver:
        driver.note("a", "from a disk")
        mount(monkeypatch, tmp_path, "nfs")
        with Ledger(path) as reader:
            reader.suit_file_system()
            assert reader.notices() == {"a": "from a disk"}
        assert journal(path) == "wal"
        driver.note("b", "still written")
    with Ledger(path) as moved:
        assert journal(path) == "wal", "nobody but the folder's owner changes it"
        moved.suit_file_system()
        assert moved.notices() == {"a": "from a disk", "b": "still written"}
    assert journal(path) == "delete"


@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_a_file_system_without_locks_is_named_and_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, call, refuse)
    mount(monkeypatch, tmp_path, "fuse.sshfs")
    said = r"fuse\.sshfs\) has no file locks \(No locks available\).*another$"
    with pytest.raises(FolderError, match=said), owned(tmp_path / "run"):
        raise AssertionError("the folder is owned")
    assert not list((tmp_path / "run").iterdir())


def test_a_machine_that_tells_no_mounts_keeps_the_log(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(file_systems, "MOUNTS", tmp_path / "none")
    assert file_systems.kind(tmp_path) is None and file_systems.journal_mode(tmp_path) == "wal"
