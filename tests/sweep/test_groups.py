"""Placement groups: what an unplaced one waits for, and which are removed, by hand and in a real Ray."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from altgrad.sweep.engine import groups as module
from altgrad.sweep.engine.driver import Breaker, Follower
from altgrad.sweep.engine.groups import Group, GroupWatch
from altgrad.sweep.pace.schedulers import HealthScheduler
from altgrad.sweep.record.folder import owned
from altgrad.sweep.record.ledger import Ledger
from altgrad.sweep.record.monitor import notices
from altgrad.sweep.record.progress import Progress
from altgrad.sweep.record.recorder import Recorder
from altgrad.training.config import TrainConfig

WORKER = {"CPU": 0.9, "GPU": 1.0}
PAIR = (WORKER, WORKER)


class World:
    """Groups and a clock, set by hand."""

    def __init__(self) -> None:
        self.now, self.removed, self.groups = 0.0, list[str](), dict[str, Group]()
        self.watch = GroupWatch(
            WORKER,
            grace=30,
            patience=10,
            clock=lambda: self.now,
            read=lambda: self.groups.values(),
            remove=self.remove,
            sizes=lambda: ({"CPU": 4.0}, {"CPU": 0.5}),
        )

    def remove(self, name: str) -> None:
        self.removed.append(name)
        del self.groups[name]

    def put(self, name: str, bundles: tuple[dict[str, float], ...] = PAIR, *, is_placed: bool = True) -> None:
        self.groups[name] = Group(name, bundles, is_placed)

    def look(self, *running: str, after: float = 0.0) -> dict[str, str]:
        self.now += after
        return self.watch.look(running)


def test_a_group_is_removed_when_it_has_outlived_its_trial_by_the_grace_time() -> None:
    world = World()
    world.put("g")
    world.look("a", "b")
    world.watch.belongs("g", "a")
    assert not world.look("b", after=5) and not world.look("b", after=29)
    said = world.look("b", after=2)
    assert world.removed == ["g"] and "2 x (0.9 CPU + 1 GPU)" in said["g"] and "by 31 s" in said["g"]
    assert not world.look("b", after=100), "once"


def test_a_group_that_may_be_of_a_running_trial_stays() -> None:
    world = World()
    world.put("g")
    world.look("a", "b")
    world.look("b", after=100)
    world.look("b", after=100)
    assert not world.removed
    world.look(after=100)
    assert world.look(after=31) and world.removed == ["g"]


def test_a_trial_that_begins_again_owns_none_of_its_earlier_groups() -> None:
    world = World()
    world.put("old")
    world.look("a")
    world.watch.started("a")
    world.put("new")
    world.look("a", after=5)
    world.look("a", after=31)
    assert world.removed == ["old"]


def test_tunes_own_groups_are_left_alone() -> None:
    world = World()
    world.put("tune", ({"CPU": 0.01},))
    world.look()
    world.look(after=100)
    assert not world.removed


def test_what_is_asked_stands_beside_what_there_is_once_it_lasts() -> None:
    world = World()
    world.put("g", is_placed=False)
    world.look("a")
    assert world.watch.waiting is None
    world.look("a", after=11)
    assert world.watch.waiting == "1 times 2 x (0.9 CPU + 1 GPU); the cluster has 4 CPU (3.5 in use), no GPU"
    world.put("g")
    world.look("a", after=11)
    assert world.watch.waiting is None


def test_line_and_status_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world, trials = World(), {"a": TrainConfig()}
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.add_trials(trials, "0" * 64)
        progress = Progress(trials, 1, live=False)
        follower = Follower(Recorder(ledger, tmp_path / "trials"), progress, HealthScheduler(trials), Breaker())
        follower.groups = world.watch
        trial = SimpleNamespace(config={"trial": {"trial_id": "a"}}, status="RUNNING")
        follower.on_trial_start(0, [trial], trial)
        world.put("g", is_placed=False)
        for now in (0.0, 11.0):
            world.now = now
            follower.on_step_end(0, [trial])
        assert "1 waiting (for resources: 1 times 2 x (0.9 CPU + 1 GPU); the cluster has 4 CPU" in progress.line()
        with owned(tmp_path):
            assert notices(tmp_path) == [f"waiting for resources: {world.watch.waiting}"]
        assert notices(tmp_path) == [], "it was true while the driver ran"
        trial.status = "TERMINATED"
        trial.run_metadata = SimpleNamespace(metric_analysis={"step": {"max": 5}}, metric_n_steps={"step": {}})
        for now in (20.0, 60.0):
            world.now = now
            follower.on_step_end(0, [trial])
        assert world.removed == ["g"] and "outlived its trial" in notices(tmp_path)[0]
        assert not trial.run_metadata.metric_analysis and not trial.run_metadata.metric_n_steps


@pytest.mark.slow
def test_in_a_real_ray_a_dead_actors_group_is_freed_and_a_large_one_says_what_it_lacks() -> None:
    ray.init("local", num_cpus=2, object_store_memory=100_000_000, include_dashboard=False, log_to_driver=False)
    try:

        @ray.remote(num_cpus=0)
        class Driver:
            def make(self) -> str:
                made = placement_group([{"CPU": 0.9}, {"CPU": 0.9}])
                assert made.wait(30)
                return str(made.id.hex())

        driver = Driver.remote()
        leaked = ray.get(driver.make.remote())
        watch = GroupWatch({"CPU": 0.9}, grace=1, patience=0)
        watch.look({"a"})
        watch.belongs(leaked, "a")
        ray.kill(driver)
        large = placement_group([{"CPU": 5}]).id.hex()
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline and not watch.look(()):
            time.sleep(0.2)
        states = {name: row["state"] for name, row in placement_group_table().items()}
        assert states[leaked] == "REMOVED" and states[large] == "PENDING"
        watch.look(())
        assert watch.waiting is not None and watch.waiting.startswith("1 times 1 x (5 CPU); the cluster has 2 CPU (")
        module.remove_group(large)
        assert placement_group_table()[large]["state"] == "REMOVED"
    finally:
        ray.shutdown()
