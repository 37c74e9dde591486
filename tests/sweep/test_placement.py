"""Trials of one seed ask for one kind of GPU."""

from __future__ import annotations

from collections import Counter

import pytest
from smallest import SMALLEST

from altgrad.sweep.placement import Placement, kinds_here, named_in
from altgrad.sweep.queue import TrialQueue
from altgrad.sweep.spec import SweepSpec

TRIALS = SweepSpec.model_validate(SMALLEST | {"seeds": 6, "optimizers": ["adamw", "grid"]}).trials("d" * 64)


def kinds_by_seed(placement: Placement) -> dict[int, set[str | None]]:
    found: dict[int, set[str | None]] = {}
    for trial_id, config in TRIALS.items():
        found.setdefault(config.seed, set()).add(placement.kind(trial_id))
    return found


def test_each_seed_has_one_kind_and_kinds_share_the_seeds_by_size() -> None:
    found = kinds_by_seed(Placement(TRIALS, kinds=lambda: Counter({"H100": 4, "A100": 2})))
    assert all(len(kinds) == 1 for kinds in found.values())
    assert Counter(kind for kinds in found.values() for kind in kinds) == {"H100": 4, "A100": 2}


@pytest.mark.parametrize("here", [Counter(), Counter({"H100": 8})])
def test_where_there_is_no_choice_nothing_is_asked_for(here: Counter[str]) -> None:
    assert set().union(*kinds_by_seed(Placement(TRIALS, kinds=lambda: here)).values()) == {None}


def test_a_seed_goes_on_where_it_ended_before_and_elsewhere_once_that_kind_is_gone() -> None:
    here = Counter({"A100": 1, "H100": 1})
    ended = dict.fromkeys(TRIALS, "NVIDIA H100 80GB HBM3") | {"another sweep's": "NVIDIA A100-SXM4-80GB"}
    placement = Placement(TRIALS, ended, kinds=lambda: here)
    assert set().union(*kinds_by_seed(placement).values()) == {"H100"}
    here.clear()
    here |= Counter({"A100": 1, "L40S": 1})
    after = kinds_by_seed(placement)
    assert all(len(kinds) == 1 for kinds in after.values()) and "H100" not in set().union(*after.values())


@pytest.mark.parametrize(
    ("device", "kind"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("AMD EPYC", None),
        ("", None),
    ],
)
def test_a_kind_is_found_in_a_devices_full_name(device: str, kind: str | None) -> None:
    assert named_in(device, Counter({"A10": 1, "A100": 1, "H100": 1, "RTX-4090": 1})) == kind


def test_kinds_are_those_of_the_nodes_that_live() -> None:
    nodes = [
        {"Alive": True, "Resources": {"GPU": 8.0, "accelerator_type:H100": 1.0}},
        {"Alive": True, "Resources": {"GPU": 1.0, "accelerator_type:A100": 1.0}},
        {"Alive": False, "Resources": {"GPU": 4.0, "accelerator_type:A100": 1.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
    ]
    assert kinds_here(lambda: nodes) == {"H100": 8, "A100": 1}


def test_the_queue_asks_for_the_kind_and_for_no_more_than_there_are_slots() -> None:
    slots = [2]
    queue = TrialQueue(
        {name: {"trial_id": name} for name in TRIALS},
        {},
        slots=lambda: slots[0],
        placement=Placement(TRIALS, kinds=lambda: Counter({"H100": 1, "A100": 1})),
    )
    first = [queue.suggest(str(n)) for n in range(3)]
    assert [isinstance(one, dict) and one["trial"]["accelerator"] in ("H100", "A100") for one in first[:2]] == [
        True
    ] * 2
    assert first[2] is None
    slots[0] = 3  # a node has come
    assert isinstance(queue.suggest("3"), dict) and queue.suggest("4") is None
