"""What the file system under a sweep can do: network volumes differ from disks where locks and shared memory matter.

SQLite's write-ahead log lives in memory that processes of one machine share, so it is for disks; on a network
file system, where a sweep may be read from another machine, the ledger keeps a rollback journal
(https://www.sqlite.org/wal.html). Locks can't be done without: they say which driver owns a folder, and keep a
trial that was thought lost from writing beside its successor.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from pathlib import Path

LOCAL = {"bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "tmpfs", "xfs", "zfs"}
"""Types of file systems of one machine's own disks and memory; all others may be seen from several."""
MOUNTS = Path("/proc/self/mounts")


def kind(path: Path) -> str | None:
    """The type of the file system that holds `path`, as mounted ("ext4", "nfs4", "fuse.mfs"); None where untold."""
    try:
        lines = MOUNTS.read_bytes().splitlines()
    except OSError:  # no Linux
        return None
    real = path.absolute().resolve()
    found: tuple[int, str] = (0, "")
    for line in lines:
        _, place, name, *_ = line.split(b" ")
        # A blank stands as \040; of two mounts on one point the later hides the other.
        point = Path(os.fsdecode(re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), place)))
        if real.is_relative_to(point) and len(point.parts) >= found[0]:
            found = len(point.parts), os.fsdecode(name)
    return found[1] or None


def journal_mode(path: Path) -> str:
    """SQLite's journal mode that suits a database at `path`: "wal", or "delete" on a network file system."""
    return "wal" if kind(path) in LOCAL | {None} else "delete"


def check_locks(folder: Path) -> None:
    """OSError where files in `folder` can't be locked, by whole file (flock) or by range, as SQLite does (fcntl)."""
    for lock in (fcntl.flock, fcntl.lockf):
        with tempfile.TemporaryFile(dir=folder, prefix=".lock-") as file:
            lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
