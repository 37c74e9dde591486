"""Tests tokenize into a cache of their own, which goes away with them, and mirror nothing to W&B.

They run in several processes at once, so torch has one thread in each, and Ray's workers, which are nice by default,
have the same priority as the tests beside them.
"""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "disabled")
        patch.setenv("RAY_worker_niceness", "0")
        patch.delenv("WANDB_API_KEY", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors are small here; on busy cores torch's threads would wait for each other, spinning."""
    torch.set_num_threads(1)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans count and check without training a probe of every cost class, which takes seconds each."""
    from altgrad.sweep import plan

    monkeypatch.setattr(plan, "measure", lambda trials, _: {plan.cost_class(t): plan.Cost(1, 2, 3) for t in trials})


@pytest.fixture(scope="module")
def running_ray() -> Iterator[str]:
    """Address of one Ray for a module's sweeps that do not test how Ray starts or ends: a start takes seconds."""
    from ray.cluster_utils import Cluster

    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 200_000_000})
    yield started.address
    started.shutdown()
