"""Tests tokenize into a cache of their own, which goes away with them, and mirror nothing to W&B."""

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_environment(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALTGRAD_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("WANDB_MODE", "disabled")
        patch.delenv("WANDB_API_KEY", raising=False)
        yield


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans count and check without training a probe of every cost class, which takes seconds each."""
    from altgrad.sweep import plan

    monkeypatch.setattr(plan, "measure", lambda trials, _: {plan.cost_class(t): plan.Cost(1, 2, 3) for t in trials})
