"""Tests tokenize into a cache of their own, which goes away with them."""

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory):
    before = os.environ.get("ALTGRAD_CACHE")
    os.environ["ALTGRAD_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("ALTGRAD_CACHE")
    if before is not None:
        os.environ["ALTGRAD_CACHE"] = before
