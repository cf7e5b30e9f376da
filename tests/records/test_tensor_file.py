"""Trees in safetensors files: what comes back, and every way in which a stranger's file can be another."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from newllm_jax.errors import InputError
from newllm_jax.records.tensor_file import read_tree, write_tree

pytestmark = pytest.mark.quick
TREE = {"cell": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "probe": None, "bias": np.ones(2, np.float32)}


@pytest.fixture
def file(tmp_path):
    write_tree(tmp_path / "model.safetensors", TREE)
    return tmp_path / "model.safetensors"


def test_a_tree_comes_back(file):
    assert set(load_file(file)) == {"cell.kernel", "bias"}
    read = read_tree(file, jax.eval_shape(lambda: TREE))
    assert jax.tree.structure(read) == jax.tree.structure(TREE)
    jax.tree.map(np.testing.assert_array_equal, read, TREE)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bias": np.ones(3, np.float32)}, r"tensor 'bias' is F32 \[3\], expected F32 \[2\]"),
        ({"bias": np.ones(2, np.float16)}, r"tensor 'bias' is F16 \[2\], expected F32 \[2\]"),
        ({"bias": np.full(2, np.nan, np.float32)}, "tensor 'bias' has values that are not finite"),
        ({"other": np.ones(2, np.float32)}, "tensor 'other' is not expected"),
        ({"bias": None}, "tensor 'bias' is missing"),
    ],
)
def test_another_tensor_is_named(file, changed, message):
    save_file({name: array for name, array in (load_file(file) | changed).items() if array is not None}, file)
    with pytest.raises(InputError, match=message):
        read_tree(file, TREE)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"\xff" * 100])
def test_what_is_no_safetensors_file(file, content):
    file.write_bytes(content)
    with pytest.raises(InputError, match="truncated or not a safetensors file|not valid JSON"):
        read_tree(file, TREE)


def test_half_a_file(file):
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(InputError, match="truncated or not a safetensors file"):
        read_tree(file, TREE)
