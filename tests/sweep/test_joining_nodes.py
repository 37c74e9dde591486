"""Nodes that join a running sweep are looked at once each, and one that does not see its folder ends it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError

from altgrad.sweep.engine.nodes import NodeWatch


class Cloud:
    """Nodes that answer when told to, whether they see a path, or with what is raised there."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str]] = []
        self.answers: dict[str, bool | Exception] = {}

    def join(self, name: str) -> None:
        self.nodes.append({"NodeID": name, "NodeManagerAddress": f"10.0.0.{name}", "Alive": True})

    def ask(self, path: str, node: dict[str, Any]) -> str:
        self.asked.append((path, node["NodeID"]))
        return str(node["NodeID"])

    def wait(self, asked: list[str], **_: object) -> tuple[list[str], list[str]]:
        return [name for name in asked if name in self.answers], []

    def get(self, name: str) -> bool:
        answer = self.answers[name]
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def cloud(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    cloud = Cloud()
    monkeypatch.setattr(ray, "wait", cloud.wait)
    monkeypatch.setattr(ray, "get", cloud.get)
    yield cloud


def test_each_node_is_asked_once_and_the_one_that_sees_nothing_is_named(cloud: Cloud, tmp_path: Path) -> None:
    watch = NodeWatch(tmp_path / "out" / "trials", lambda: cloud.nodes, cloud.ask)
    assert watch.look() is None and not cloud.asked
    cloud.join("1")
    assert watch.look() is None and watch.look() is None and [name for _, name in cloud.asked] == ["1"]
    assert Path(cloud.asked[0][0]).exists(), "what nodes look for is there"
    cloud.answers["1"] = True
    cloud.join("2")
    assert watch.look() is None
    cloud.answers["2"] = False
    text = watch.look()
    assert text is not None and f"--out: {tmp_path / 'out'} is not on shared storage: node 10.0.0.2" in text
    assert [name for _, name in cloud.asked] == ["1", "2"]


def test_a_node_that_leaves_before_it_answers_is_no_fault_and_is_asked_again_when_it_is_back(
    cloud: Cloud, tmp_path: Path
) -> None:
    watch = NodeWatch(tmp_path / "trials", lambda: cloud.nodes, cloud.ask)
    cloud.join("1")
    cloud.answers["1"] = RayActorError()
    assert watch.look() is None
    cloud.nodes[0]["Alive"] = False
    cloud.join("1b")
    cloud.answers["1b"] = True
    assert watch.look() is None and [name for _, name in cloud.asked] == ["1", "1b"]
