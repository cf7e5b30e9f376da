"""Any run directory, whichever system it is of."""

from __future__ import annotations

from pathlib import Path

from newllm_jax.newllm.run import NewLLMRun, restore_newllm


def restore(run_dir: str | Path) -> NewLLMRun:
    """The trained model of a run directory, ready to call, on the default device (a CPU will do).

    Raises:
      InputError: not a run directory, or one without a checkpoint.
    """
    return restore_newllm(run_dir)
