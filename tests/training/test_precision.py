"""Named precisions."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import pytest

from newllm_jax.training.precision import PRECISIONS, resolve_precision

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("capability", "resolved"),
    [(None, "fp32"), ("7.5", "fp32"), ("8.0", "tf32"), ("9.0", "tf32"), ("10.0", "tf32"), ("gfx942", "fp32")],
)
def test_auto_takes_tf32_where_the_device_has_it(monkeypatch, capability, resolved):
    device = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert resolve_precision("auto") == resolved
    assert resolve_precision("fp32") == "fp32"


def test_fp32_is_strict():
    assert PRECISIONS["fp32"] == jax.lax.Precision.HIGHEST
