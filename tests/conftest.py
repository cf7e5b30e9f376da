"""Real data where it is, a cache of the tests' own, and small runs that many tests read."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """No test reads or fills the user's cache."""
    os.environ["NEWLLM_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def compile_once(tmp_path_factory):
    """Runs of the same shapes compile the same programs: keep them for the session."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real data sets and reference numbers."""
    folder = os.environ.get("NEWLLM_TEST_DATA")
    if not folder:
        pytest.skip("NEWLLM_TEST_DATA names no folder with the real data")
    return Path(folder).absolute()
