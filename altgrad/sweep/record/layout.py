"""What lies where in a sweep's folder, and in the folder of an export of it."""

from __future__ import annotations

import re
from pathlib import Path

LEDGER, MANIFEST = "ledger.sqlite", "sweep.json"
SHARD = re.compile(r"\d{4,}-[0-9a-f]{8}")


def shards(folder: Path) -> list[Path]:
    """The shards of the export in a folder (`record.shards`), oldest first; none where it is no export."""
    if not folder.is_dir():
        return []
    found = [item for item in folder.iterdir() if SHARD.fullmatch(item.name) and (item / "trials.parquet").is_file()]
    return sorted(found, key=lambda item: (int(item.name.partition("-")[0]), item.name))
