"""EurLex from the Hugging Face hub, by short names, through `datasets`.

| name | repository | splits | labels |
| --- | --- | --- | --- |
| eurlex | coastalcph/lex_glue, config eurlex | 55 000 / 5 000 / 5 000 | 100, ClassLabel |
| eurlex-57k | pietrolesci/eurlex-57k | 45 000 / 6 000 / 6 000 | 4 271 strings, `eurovoc_concepts` |
| multi_eurlex | coastalcph/multi_eurlex, English | 55 000 / 5 000 / 5 000 | 21 |

The hub is asked once, with a short timeout, which revision stands behind the name; that revision is what is loaded,
and it is part of the run's record. Where the hub does not answer, the answer is an error that names the local
alternatives, at once: neither another source nor an older copy is taken without being asked for. With HF_HUB_OFFLINE=1
the copy in the cache of `datasets` is what was asked for.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from altgrad.training.data.records import Fields, Piece, labels_of, present_label_field

TIMEOUT_SECONDS = 5.0
BATCH = 256
ALTERNATIVES = (
    "give a local JSONL, parquet or CSV file or a folder of them (--data PATH), or pydoc or synthetic; with a copy in "
    "the cache of datasets, set HF_HUB_OFFLINE=1"
)
SPLITS = {"train": ("train",), "val": ("validation", "dev", "valid", "val"), "test": ("test",)}


@dataclass(frozen=True)
class Repository:
    """Where a short name leads: a dataset's repository, its configuration, and the branch to read."""

    path: str
    config: str | None = None
    data_dir: str | None = None
    branch: str | None = None


REPOSITORIES = {
    "eurlex": Repository("coastalcph/lex_glue", config="eurlex"),
    "eurlex-57k": Repository("pietrolesci/eurlex-57k"),
    "multi_eurlex": Repository("coastalcph/multi_eurlex", data_dir="en", branch="refs/convert/parquet"),
}


@dataclass(frozen=True)
class HubData:
    """Splits of a dataset on the hub: `splits` maps train, val, test to the dataset's own, where it has them."""

    dataset: Any
    splits: dict[str, str]
    revision: str
    fingerprint: dict[str, str]

    def documents(self, split: str, fields: Fields) -> Iterator[Piece]:
        """The documents of 'train', 'val' or 'test'; ValueError where a field is missing or holds no text."""
        own = self.dataset[self.splits[split]]
        label = _label_column(own, fields)
        row = 0
        for batch in own.select_columns([fields.text, *([label] if label else [])]).iter(BATCH):
            for index, text in enumerate(batch[fields.text]):
                where = f"data split {self.splits[split]}: row {row}"
                yield Piece(text or "", True, labels_of(batch[label][index], label, where) if label else None, where)
                row += 1

    def declared_labels(self, field: str) -> tuple[str, ...] | None:
        """The names that a ClassLabel declares; None where the labels are not of that kind."""
        feature = self.dataset[self.splits["train"]].features.get(
            present_label_field(field, self.dataset[self.splits["train"]].column_names) or ""
        )
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", feature)
        names = getattr(inner, "names", None)
        return None if names is None else tuple(names)


def load_hub(name: str, wanted: str | None = None) -> HubData:
    """The dataset behind a short name, at the `wanted` commit, else the newest (offline: the one in the cache).

    ValueError, at once, where neither the hub nor, offline, the cache has it.
    """
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    repository = REPOSITORIES[name]
    revision = None if _is_offline() else _revision(name, repository, wanted)
    try:
        loaded = datasets.load_dataset(
            repository.path, repository.config, data_dir=repository.data_dir, revision=revision or repository.branch
        )
    except (OSError, HfHubHTTPError, OfflineModeIsEnabled, ValueError, RuntimeError) as error:
        why = "it is not in the cache of datasets" if _is_offline() else "it can't be loaded"
        raise ValueError(f"data {name!r}: {why} ({_one_line(error)}){_unwritable()}; {ALTERNATIVES}") from None
    splits = {split: own for split, names in SPLITS.items() if (own := next((n for n in names if n in loaded), None))}
    if "train" not in splits:
        raise ValueError(f"data {name!r}: no split named train; it has: {', '.join(loaded)}")
    fingerprint = {split: str(loaded[own]._fingerprint) for split, own in splits.items()}
    found = revision or _cached_revision(loaded[splits["train"]])
    if wanted is not None and found != wanted:
        raise ValueError(f"data {name!r}: revision {wanted} is wanted, {found} is what there is; {ALTERNATIVES}")
    return HubData(loaded, splits, found, fingerprint)


def reader(data: HubData, split: str, fields: Fields) -> partial[Iterator[Piece]]:
    """A function of nothing that starts reading a split."""
    return partial(data.documents, split, fields)


def _label_column(own: Any, fields: Fields) -> str | None:
    names = own.column_names
    if fields.text not in names:
        raise ValueError(f"data: no column {fields.text!r}; it has: {', '.join(names)}")
    if fields.label is None:
        return None
    label = present_label_field(fields.label, names)
    if label is None:
        raise ValueError(f"data: no column {fields.label!r} for labels; it has: {', '.join(names)}")
    return label


def _unwritable() -> str:
    """'; …' on the variable that puts a cache of datasets where nothing can be written; nothing where none does."""
    import datasets
    from huggingface_hub import constants

    places = {"HF_DATASETS_CACHE": datasets.config.HF_DATASETS_CACHE, "HF_HUB_CACHE": constants.HF_HUB_CACHE}
    for own, place in places.items():
        try:
            Path(place).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            by = next((one for one in (own, "HF_HOME", "XDG_CACHE_HOME") if one in os.environ), "HOME")
            return f"; {by}: the cache {place} can't be written ({error.strerror})"
    return ""


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _revision(name: str, repository: Repository, wanted: str | None) -> str:
    """The commit wanted, or that the hub has now, asked once with a short timeout."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    # OSError, and the base of the HTTP library's errors, whichever library this version of the hub's client uses.
    failures: Any = HfHubHTTPError.__bases__
    try:
        info = HfApi().dataset_info(repository.path, revision=wanted or repository.branch, timeout=TIMEOUT_SECONDS)
    except failures as error:
        raise ValueError(
            f"data {name!r}: the Hugging Face hub does not answer for {repository.path} "
            f"({_one_line(error)}){_unwritable()}; {ALTERNATIVES}"
        ) from None
    if not info.sha:
        raise ValueError(f"data {name!r}: the hub names no revision of {repository.path}")
    return str(info.sha)


def _cached_revision(own: Any) -> str:
    """The revision that a cached copy was made from, by its download's addresses or its folder."""
    addresses = " ".join(own.info.download_checksums or {})
    found = re.search(r"@([0-9a-f]{40})", addresses)
    if found:
        return found[1]
    folders = [part for file in own.cache_files for part in Path(file["filename"]).parts]
    return next((part for part in folders if re.fullmatch(r"[0-9a-f]{16,64}", part)), "unknown")


def _one_line(error: Exception, shown: int = 200) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= shown else text[: shown - 3] + "..."
