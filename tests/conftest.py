"""Real data where it is, a cache of the tests' own, and small runs that many tests read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    os.environ["NEWLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets and reference numbers."""
    folder = os.environ.get("NEWLLM_TEST_DATA")
    if not folder:
        pytest.skip("NEWLLM_TEST_DATA names no folder with the real data")
    return Path(folder).absolute()
