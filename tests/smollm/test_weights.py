"""Safetensors to parameters and back, and every way in which a file can be wrong."""

import json
import os
import struct
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from newllm_jax.errors import InputError
from newllm_jax.files import LARGEST_JSON
from newllm_jax.smollm.weights import read_config, read_params, save_model

QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(golden, tmp_path):
    """The golden model as transformers saves it."""
    (tmp_path / "config.json").write_text(json.dumps(golden.settings))
    save_file(golden.tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


def resave(folder, tensors):
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def assert_equal(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, theirs)


def refuses(folder, config, message):
    with pytest.raises(InputError, match=message) as raised:
        read_params(folder, config)
    assert "\n" not in str(raised.value)


def shard(folder, golden, names=("a.safetensors", "b.safetensors")):
    """Splits the model into two shards with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    tensors = sorted(golden.tensors)
    places = {tensor: names[number % 2] for number, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: golden.tensors[tensor] for tensor in tensors if places[tensor] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.quick
def test_one_file(folder, golden):
    assert read_config(folder) == golden.config
    assert_equal(read_params(folder, golden.config), golden.params)


def test_shards(folder, golden):
    shard(folder, golden)
    assert_equal(read_params(folder, golden.config), golden.params)


@pytest.mark.quick
@pytest.mark.parametrize("kind", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_exactly(folder, golden, kind):
    resave(folder, {name: values.astype(kind) for name, values in golden.tensors.items()})
    expected = jax.tree.map(lambda values: np.asarray(values).astype(kind).astype(np.float32), golden.params)
    assert_equal(read_params(folder, golden.config), expected)


@pytest.mark.quick
def test_there_and_back_bit_by_bit(golden, tmp_path):
    save_model(tmp_path / "saved", golden.config, golden.params)
    saved = tmp_path / "saved"
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = read_config(saved)
    assert config == golden.config
    assert_equal(read_params(saved, config), golden.params)
    # The very tensors that transformers has, by name and value; the golden file has them from its state_dict.
    tensors = load_file(saved / "model.safetensors")
    assert tensors.keys() == golden.tensors.keys()
    for name, values in tensors.items():
        np.testing.assert_array_equal(values, golden.tensors[name])


@pytest.mark.quick
def test_transformers_reads_the_saved_configuration(golden, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(tmp_path, golden.config, golden.params)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.model_type == "llama" and config.head_dim == 8
    assert config.to_dict().get("rope_theta", (config.to_dict().get("rope_parameters") or {}).get("rope_theta")) == 500


def test_tied_head_may_be_there_if_equal(folder, golden):
    head = golden.tensors["model.embed_tokens.weight"].copy()
    resave(folder, {**golden.tensors, "lm_head.weight": head})
    assert_equal(read_params(folder, golden.config), golden.params)
    resave(folder, {**golden.tensors, "lm_head.weight": head + 1})
    refuses(folder, golden.config, r"model\.safetensors: lm_head\.weight differs from the embedding")


def test_missing_tensor(folder, golden):
    resave(folder, {name: values for name, values in golden.tensors.items() if name != QUERY})
    refuses(folder, golden.config, f"1 tensors are missing, the first is {QUERY}")


def test_unknown_tensor(folder, golden):
    resave(folder, {**golden.tensors, "model.layers.1.self_attn.q_proj.bias": np.zeros(32, np.float32)})
    refuses(folder, golden.config, r"model\.safetensors: unknown tensor .model\.layers\.1\.self_attn\.q_proj\.bias")


def test_wrong_shape(folder, golden):
    resave(folder, {**golden.tensors, QUERY: np.ascontiguousarray(golden.tensors[QUERY].T)})
    refuses(folder, golden.config, rf"model\.safetensors: tensor {QUERY} has shape \[24, 32\], expected \[32, 24\]")


def test_wrong_type(folder, golden):
    resave(folder, {**golden.tensors, QUERY: golden.tensors[QUERY].astype(np.int32)})
    refuses(folder, golden.config, rf"model\.safetensors: tensor .{QUERY}. is of type I32")


def test_values_that_are_not_finite(folder, golden):
    values = golden.tensors[QUERY].copy()
    values[3, 4] = np.inf
    resave(folder, {**golden.tensors, QUERY: values})
    refuses(folder, golden.config, rf"model\.safetensors: tensor {QUERY} has values that are not finite")


def test_mislabelled_tensor(folder, golden):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"F32"', b'"F16"', 1))
    refuses(folder, golden.config, r"model\.safetensors: truncated or not a safetensors file")


@pytest.mark.quick
@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_truncated_file(folder, golden, kept):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refuses(folder, golden.config, r"model\.safetensors: truncated or not a safetensors file")


def stored(header, data=b"", length=None):
    """The bytes of a safetensors file."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated"),
        (stored({}, length=2**63), "a header of 9223372036854775808 bytes"),
        (stored(b"{}" + b" " * LARGEST_JSON), f"a header of {LARGEST_JSON + 2} bytes"),
        (stored(b"[" * 100_000), "nested too deeply"),
        (stored(b'{"\xff": 1}'), "a header that is not UTF-8"),
        (stored(b'{"a": %s, "a": %s}' % ((json.dumps(F32).encode(),) * 2), bytes(8)), "'a' is there twice"),
        (stored({"a": F32, "b": F32}, bytes(8)), "truncated or not a safetensors file"),  # over one another
        (stored({"a": {**F32, "shape": [2**62, 4]}}, bytes(8)), "truncated or not a safetensors file"),
        (stored({"a": {**F32, "shape": [2**62, 0]}}, bytes(8)), "truncated or not a safetensors file"),
        (stored({"a": {**F32, "data_offsets": [8, 0]}}, bytes(8)), "truncated or not a safetensors file"),
        (stored({"a": {**F32, "data_offsets": [0, 2**63]}}, bytes(8)), "truncated or not a safetensors file"),
        (stored({"a": F32}, bytes(80)), "truncated or not a safetensors file"),
        (stored({"a": F32}, bytes(8)), "unknown tensor 'a'"),
        (stored({QUERY: {"dtype": "F32", "shape": [0, 24], "data_offsets": [0, 0]}}), r"has shape \[0, 24\]"),
        (stored({QUERY: {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}, bytes(4)), r"has shape \[\]"),
        (stored({}), "29 tensors are missing"),
    ],
)
def test_headers_that_lie(folder, golden, content, message):
    (folder / "model.safetensors").write_bytes(content)
    refuses(folder, golden.config, message)


def test_pipes_are_not_read(folder, golden):
    shard(folder, golden)
    (folder / "a.safetensors").unlink()
    os.mkfifo(folder / "a.safetensors")
    refuses(folder, golden.config, r"a\.safetensors: not a regular file")
    os.mkfifo(folder / "model.safetensors")
    refuses(folder, golden.config, r"model\.safetensors: not a regular file")


def test_sizes_that_do_not_fit_into_memory(folder, golden, monkeypatch):
    largest = 100_000_000
    config = replace(golden.config, hidden_size=largest, intermediate_size=largest, vocab_size=largest)
    monkeypatch.setattr(np, "empty", None)  # nothing is allocated
    refuses(folder, config, r"the parameters take [\d,]+\.\d\d GiB as float32, this machine has [\d,.]+ GiB free")


def test_pickled_weights_are_not_read(folder, golden):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refuses(folder, golden.config, r"no model\.safetensors .* pickled weights are never read")


def test_tensor_in_two_shards(folder, golden):
    places = shard(folder, golden)
    other = folder / ({"a.safetensors", "b.safetensors"} - {places[QUERY]}).pop()
    save_file({**load_file(other), QUERY: golden.tensors[QUERY]}, other)
    refuses(folder, golden.config, rf"[ab]\.safetensors: tensor {QUERY} is there twice \(also in [ab]\.safetensors\)")


def test_tensor_that_the_index_misplaces(folder, golden):
    places = shard(folder, golden)
    file = folder / places[QUERY]
    save_file({name: values for name, values in load_file(file).items() if name != QUERY}, file)
    refuses(folder, golden.config, rf"[ab]\.safetensors: tensor .{QUERY}. is missing")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"x": "../elsewhere.safetensors"}}', "is not a file name"),
        ('{"weight_map": {"x": "none.safetensors"}}', r"none\.safetensors: cannot be read \(No such file"),
        ('{"weight_map": {"x": ""}}', "not a regular file"),
        ('{"weight_map": {"x": ".."}}', "not a regular file"),
        (r'{"weight_map": {"x": "\u0000"}}', "not a file name"),
        ('{"weight_map": {"x": "a.safetensors", "x": "b.safetensors"}}', "'x' is there twice"),
        ('{"weight_map": {"x": "a.safetensors"}}', r"a\.safetensors: unknown tensor .* does not list it"),
    ],
)
def test_broken_index(folder, golden, index, message):
    shard(folder, golden)
    (folder / "model.safetensors.index.json").write_text(index)
    refuses(folder, golden.config, message)


@pytest.mark.parametrize(("content", "message"), [("{", "not valid JSON"), ("[1]", "not a JSON object")])
def test_broken_config(folder, content, message):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match=rf"config\.json: {message}"):
        read_config(folder)


def test_no_config(tmp_path):
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        read_config(tmp_path)
