"""`--auto_batch` finds the largest part of a batch that fits."""

from __future__ import annotations

import pytest

from newllm_jax.cli import micro_batch
from newllm_jax.cli.micro_batch import largest_micro_batch
from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm import plan as newllm_plan
from newllm_jax.training.memory import DoesNotFit


def planned(monkeypatch, usable: int | None) -> None:
    """Plans need 10 bytes for every example that is computed at a time; so much may be used."""

    def plan(config):
        return {"estimated_memory_bytes": 10 * config.examples_at_once, "config": config.to_dict()}

    monkeypatch.setattr(newllm_plan, "plan_newllm", plan)
    monkeypatch.setattr(micro_batch, "usable_memory", lambda: usable)


@pytest.mark.parametrize("usable, expected", [(1000, None), (999, 50), (499, 25), (130, 13), (129, 7), (10, 1)])
def test_the_largest_micro_batch_is_the_first_half_that_fits(monkeypatch, usable, expected):
    planned(monkeypatch, usable)
    config, told = largest_micro_batch(NewLLMConfig(batch_size=100))
    assert config == NewLLMConfig(batch_size=100, micro_batch=expected)
    assert told.startswith(f"{expected or 100} of 100 examples at a time, in ")


@pytest.mark.parametrize(
    "usable, message", [(9, "not even one example at a time fits"), (None, "does not tell how much")]
)
def test_where_nothing_fits_or_is_known(monkeypatch, usable, message):
    planned(monkeypatch, usable)
    with pytest.raises(InputError, match=f"auto_batch: .*{message}"):
        largest_micro_batch(NewLLMConfig())


def test_what_a_smaller_batch_does_not_change_is_named(monkeypatch):
    planned(monkeypatch, 100)

    def refuse(config):
        raise DoesNotFit("memory: the run needs at least 9 GiB; lower train_chunks")

    monkeypatch.setattr(newllm_plan, "plan_newllm", refuse)
    with pytest.raises(InputError, match="lower train_chunks"):
        largest_micro_batch(NewLLMConfig())
