"""Hashes of arrays: of what they hold and not of how they lie in memory."""

from __future__ import annotations

import hashlib
import json

import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.content import array_sha256, check_seal, sealed

pytestmark = pytest.mark.quick


def test_the_hash_is_that_of_type_shape_and_bytes():
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    expected = hashlib.sha256(b"float32 <f4 (2, 3)\n" + array.tobytes()).hexdigest()
    assert array_sha256(array) == expected
    assert array_sha256(np.asfortranarray(array)) == expected
    assert array_sha256(np.stack([array, array], -1)[..., 0]) == expected


def test_whatever_differs_changes_the_hash():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    flipped = array.copy()
    flipped.view(np.uint8)[1, 7] ^= 1
    bits = np.array([1, 2], np.uint16)
    different = [
        array, flipped, array.T, array.ravel(), array[None], array.view(np.int32), array.view(">f4"), -0.0 * array,
        np.abs(0.0 * array), array[:0], array[:, :0], np.array("a"), np.array("b"), np.array(["a"]), np.float32(1)[...],
        bits, bits.view(np.float16), bits.view(jnp.bfloat16),
    ]  # fmt: skip
    assert len({array_sha256(each) for each in different}) == len(different)
    with pytest.raises(TypeError, match="Python objects"):
        array_sha256(np.array([None]))


def test_a_sealed_object_is_what_was_written_or_an_error():
    content = {"loss": 0.1, "list": [1, 2.5, None], "text": "é\ud800", "nested": {"b": 1, "a": True}}
    written = json.loads(json.dumps(sealed(content)))
    check_seal(written, required=True)
    assert {**content, "sha256": written["sha256"]} == written
    assert sealed(written) == written  # sealing again changes nothing
    for damaged in ({**written, "loss": 0.2}, {**written, "more": 1}, {**written, "sha256": "0" * 64}, [], "text"):
        with pytest.raises(ValueError):
            check_seal(damaged, required=False)
    check_seal(content, required=False)
    with pytest.raises(ValueError, match="it has no sha256"):
        check_seal(content, required=True)
