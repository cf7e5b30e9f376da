"""A JAX without Pallas's Triton back end, deprecated since JAX 0.11: `python -m pytest -p tests.without_triton`.

Importing it fails and `importlib.util.find_spec` finds nothing, as if a later JAX had removed it. The tests of the
kernels for GPUs are skipped, and all others must pass as they do with it.
"""

from __future__ import annotations

import sys

sys.modules["jax.experimental.pallas.triton"] = None  # type: ignore[assignment]  # Python's own sign for "not there"
