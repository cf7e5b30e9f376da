"""Named precisions."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from newllm_jax.errors import InputError
from newllm_jax.training.precision import PRECISIONS, resolve_precision, supported_precisions

pytestmark = pytest.mark.quick

ALL = ["fp32", "tf32", "bf16", "fp16"]
DEVICES = {  # compute capability: what `auto` takes, and all that there is
    None: ("fp32", ["fp32"]),
    "6.1": ("fp32", ["fp32"]),
    "7.5": ("fp32", ["fp32", "fp16"]),
    "8.0": ("tf32", ALL),
    "9.0": ("tf32", ALL),
    "10.0": ("tf32", ALL),
    "gfx942": ("fp32", ["fp32"]),
}


@pytest.fixture(params=DEVICES)
def device(request, monkeypatch):
    """Pretends that the default device is one of this compute capability, and gives what is expected of it."""
    found = SimpleNamespace(device_kind="some device")
    if request.param is not None:
        found.compute_capability = request.param
    monkeypatch.setattr(jax, "devices", lambda: [found])
    return DEVICES[request.param]


def test_auto_takes_tf32_where_the_device_has_it(device):
    auto, supported = device
    assert resolve_precision("auto") == auto
    assert supported_precisions() == supported


def test_nothing_else_is_silently_taken_instead(device):
    _, supported = device
    for name in PRECISIONS:
        if name in supported:
            assert resolve_precision(name) == name
        else:
            with pytest.raises(InputError, match=f"precision: {name} needs .* which some device is not; use fp32"):
                resolve_precision(name)


def test_the_line_names_what_to_use_instead(monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind="Tesla T4", compute_capability="7.5")])
    with pytest.raises(InputError) as refused:
        resolve_precision("bf16")
    assert str(refused.value) == (
        "precision: bf16 needs an NVIDIA GPU of compute capability 8.0 or newer, which Tesla T4 is not; use fp32 or "
        "fp16 (a new run), or auto"
    )


def test_fp32_is_strict():
    assert PRECISIONS["fp32"] == jax.lax.Precision.HIGHEST
