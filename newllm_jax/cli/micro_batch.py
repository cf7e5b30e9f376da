"""`--auto_batch`: the largest part of a batch that fits into memory at a time."""

from __future__ import annotations

import math

import jax

from newllm_jax.config import Config
from newllm_jax.errors import InputError
from newllm_jax.records.machine import peak_memory_bytes
from newllm_jax.systems import SYSTEMS, call
from newllm_jax.training.memory import USABLE_SHARE, DoesNotFit, device_memory


def largest_micro_batch(config: Config) -> tuple[Config, str]:
    """The configuration with the largest micro batch that fits into the memory that is free, and a line that tells it.

    The batch is halved until the memory that `--dry_run` estimates fits.

    Raises:
      InputError: not even single examples fit, or it is not known what is free.
    """
    size = config.batch_size
    while True:
        tried = config.override({"micro_batch": size if size < config.batch_size else None})
        usable = usable_memory()
        if usable is None:
            raise InputError("auto_batch: this device does not tell how much memory is free; set micro_batch instead")
        try:
            needed = call(SYSTEMS[config.system].plan, tried)["estimated_memory_bytes"]
        except DoesNotFit:
            if size == 1:
                raise
            needed = math.inf
        told = f"{needed / 2**30:.2f} of {usable / 2**30:.2f} GiB"
        if needed <= usable:
            return tried, f"{size} of {config.batch_size} examples at a time, in {told}"
        if size == 1:
            raise InputError(
                f"auto_batch: not even one example at a time fits (it needs {told}); use a smaller model or less data"
            )
        size = -(-size // 2)


def usable_memory() -> int | None:
    """Bytes that a run may be planned to need, a tenth of what is free left alone; None where that is not known.

    On a CPU with what this process has by now, which the plans of runs count.
    """
    _, free = device_memory()
    held = peak_memory_bytes() if jax.devices()[0].platform == "cpu" else 0
    return None if free is None else held + int(USABLE_SHARE * free)
