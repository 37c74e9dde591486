"""Trials of one seed ask for one kind of GPU."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from smallest import SMALLEST

from altgrad.sweep.complaints import SpecError
from altgrad.sweep.engine.driver import with_gpus
from altgrad.sweep.engine.nodes import grown
from altgrad.sweep.engine.placement import Placement, kinds_here, named_in
from altgrad.sweep.options import RunOptions
from altgrad.sweep.pace.queue import TrialQueue
from altgrad.sweep.record.budget import Budget
from altgrad.sweep.space.spec import SweepSpec

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


def test_a_seed_that_began_on_the_only_kind_stays_there_when_another_comes() -> None:
    here = Counter({"H100": 1})
    placement = Placement(TRIALS, kinds=lambda: here)
    first, *others = [trial_id for trial_id, config in TRIALS.items() if config.seed == 0]
    assert placement.kind(first) is None, "no cluster can grow for a kind that its nodes do not announce"
    here["A100"] = 9
    assert {placement.kind(other) for other in others} == {"H100"}
    # It was placed on a node that came later.
    placement.ended(first, "NVIDIA A100-SXM4-80GB")
    assert {placement.kind(other) for other in others} == {"A100"} and placement.is_gone("L40S")


def test_a_trial_that_was_taken_back_is_handed_out_again_for_another_kind() -> None:
    here = Counter({"H100": 1, "A100": 1})
    queue = TrialQueue(
        {name: {"trial_id": name} for name in TRIALS}, {}, placement=Placement(TRIALS, kinds=lambda: here)
    )
    (first,) = [queue.suggest("1")]
    assert isinstance(first, dict)
    here.pop(first["trial"]["accelerator"])
    queue.on_trial_complete("1")
    again = queue.suggest("2")
    assert again == {"trial": {"trial_id": first["trial"]["trial_id"]}}


CONFIG = yaml.safe_load((Path(__file__).parents[2] / "cluster" / "runpod.yaml").read_text())
WIDE = {
    "max_workers": 3,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 2}},
        "big": {"resources": {"CPU": 8, "GPU": 8}, "max_workers": 2},
        "small": {"resources": {"CPU": 64}},
    },
}


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (CONFIG, {"CPU": 16.0, "GPU": 4.0}),
        (WIDE, {"CPU": 2 + 3 * 64.0, "GPU": 16.0}),
        ({"max_workers": 2, "available_node_types": {"local.cluster.node": {"resources": {}}}}, None),
        ({}, None),
    ],
)
def test_what_a_cluster_can_grow_to_stands_in_its_file(config: dict[str, Any], most: dict[str, float] | None) -> None:
    assert grown(config) == most


@pytest.mark.parametrize(
    ("asked", "now", "most", "expected"),
    [
        (None, {"CPU": 2.0}, {"GPU": 4.0}, 1.0),
        (None, {"GPU": 1.0}, None, 1.0),
        (None, {"CPU": 2.0}, {"GPU": 0.0}, 0.0),
        (None, {"CPU": 2.0}, None, "--gpus-per-trial: missing: no node"),
        (0.0, {"CPU": 2.0}, None, 0.0),
        (0.5, {"CPU": 2.0}, None, 0.5),
    ],
)
def test_no_trial_asks_for_cpus_of_nodes_that_may_have_gpus(
    monkeypatch: pytest.MonkeyPatch, asked: float | None, now: Any, most: Any, expected: float | str
) -> None:
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head")
    options = RunOptions(Path("x"), address="auto", gpus_per_trial=asked)
    if isinstance(expected, str):
        with pytest.raises(SpecError, match=expected):
            with_gpus(options, now, most)
    else:
        assert with_gpus(options, now, most).gpus_per_trial == expected


def test_a_cap_that_counts_gpus_is_an_error_in_words_where_there_are_none() -> None:
    options = RunOptions(Path("x"), address="auto", budget=Budget(gpu_hours=1.0))
    with pytest.raises(SpecError, match="--max-gpu-hours"):
        with_gpus(options, {"CPU": 2.0}, {"CPU": 4.0})
