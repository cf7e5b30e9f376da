"""What trains New-LLM: the precision that `auto` stands for, and the form of the time loop."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import jax
import pytest

from newllm_jax.config import NewLLMConfig, load_config
from newllm_jax.errors import InputError
from newllm_jax.newllm import updates
from newllm_jax.newllm.recurrence import cluster
from newllm_jax.newllm.updates import slow_loop_warning, training_model, training_precision
from newllm_jax.training.mesh import DeviceMesh

pytestmark = pytest.mark.quick


def pretend(monkeypatch, capability: str | None) -> None:
    capabilities = {"compute_capability": capability} if capability else {}
    found = SimpleNamespace(device_kind="some device", platform="gpu", core_count=132, **capabilities)
    monkeypatch.setattr(jax, "devices", lambda: [found])


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("name", ["baseline", "advanced", "ctx1024"])
def test_auto_takes_bf16_where_the_loops_are_kernels(monkeypatch, name):
    for capability, expected in (("9.0", "bf16"), ("8.0", "bf16"), ("7.5", "fp32"), (None, "fp32")):
        pretend(monkeypatch, capability)
        assert training_precision(load_config(name)) == expected


def test_auto_takes_tf32_for_sizes_that_the_kernels_cannot_cut(monkeypatch):
    pretend(monkeypatch, "9.0")
    assert training_precision(NewLLMConfig(hidden_dim=384)) == "tf32"


def test_a_named_precision_is_taken_or_refused(monkeypatch):
    pretend(monkeypatch, "9.0")
    for name in ("fp32", "tf32", "bf16", "fp16"):
        assert training_precision(NewLLMConfig(precision=name)) == name
    pretend(monkeypatch, "7.5")
    with pytest.raises(InputError, match="precision: bf16 needs"):
        training_precision(NewLLMConfig(precision="bf16"))


def test_a_gpu_that_loses_its_kernels_says_why(monkeypatch):
    even, uneven = load_config("baseline"), load_config("baseline", {"hidden_dim": 384})
    pretend(monkeypatch, "9.0")
    assert "powers of two from 256" in slow_loop_warning(uneven)
    assert slow_loop_warning(uneven.override({"precision": "fp32"})) == ""  # asked for
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    assert "this version of JAX has no jax.experimental.pallas.triton" in slow_loop_warning(even)
    pretend(monkeypatch, "7.5")
    assert slow_loop_warning(uneven) == ""  # a T4 never had them


@pytest.mark.usefixtures("triton")
def test_a_gpu_with_its_kernels_says_nothing(monkeypatch):
    pretend(monkeypatch, "9.0")
    assert slow_loop_warning(load_config("advanced")) == ""


def test_what_fits_into_clusters_needs_no_other_kernels(monkeypatch):
    config = load_config("advanced")
    monkeypatch.setattr(cluster, "mosaic_obstacle", lambda: "")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    for capability, precision, lost in (("9.0", "bf16", False), ("8.9", "tf32", True)):
        pretend(monkeypatch, capability)
        assert training_precision(config) == precision
        assert bool(slow_loop_warning(config)) == lost


@pytest.mark.usefixtures("triton")
def test_the_form_of_the_time_loop_follows_the_texts_on_a_device(monkeypatch):
    """Of members that a device computes side by side, all of them count."""
    monkeypatch.setattr(cluster, "mosaic_obstacle", lambda: "")
    pretend(monkeypatch, "9.0")
    config = load_config("advanced", {"mesh": "data=1"})

    def form(batch, *members):
        return training_model(config.override({"batch_size": batch}), 11, "bf16", *members).form

    assert [form(64), form(512), form(64, 4), form(512, 2)] == ["gpu", "cluster", "cluster", "gpu"]


def test_a_sweep_counts_the_members_of_each_device(monkeypatch):
    counted, config = [], load_config("quickstart")
    model = training_model(config, 11, "fp32")
    monkeypatch.setattr(updates, "training_model", lambda *given: counted.append(given[-1]) or model)
    monkeypatch.setattr(updates, "make_program", lambda *_: None)
    updates.build_members(config, model, 1, 5, DeviceMesh(2))
    assert counted[0] == 3
