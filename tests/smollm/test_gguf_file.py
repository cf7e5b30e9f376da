"""GGUF files, made here from the golden Llama; the real one is tested in test_model.py and test_tokenizer.py."""

import os
import struct
import time

import jax
import numpy as np
import pytest

from newllm_jax.errors import InputError
from newllm_jax.smollm.gguf_file import GGUFFile, halves_apart
from newllm_jax.smollm.weights import GGUF, SAFETENSORS, TENSOR_NAMES, read_config, read_params

gguf = pytest.importorskip("gguf")


def planes_together(rows, heads):
    """The order in which GGUF keeps query and key rows, row by row: 0, d/2, 1, d/2 + 1, ... of each head."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def gguf_tensors(golden):
    """The golden tensors under their GGUF names and in GGUF's order."""
    names = {}
    for pair in TENSOR_NAMES.values():
        for layer in range(golden.config.num_layers):
            names[pair[SAFETENSORS].format(layer=layer)] = pair[GGUF].format(layer=layer)
    tensors = {names[name]: values for name, values in golden.tensors.items()}
    for name in tensors:
        if "attn_q" in name or "attn_k" in name:
            heads = golden.config.num_heads if "attn_q" in name else golden.config.num_kv_heads
            tensors[name] = planes_together(tensors[name], heads)
    return tensors


METADATA = {
    "llama.context_length": 64,
    "llama.embedding_length": 24,
    "llama.feed_forward_length": 40,
    "llama.block_count": 3,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.key_length": 8,
    "llama.attention.layer_norm_rms_epsilon": 1e-3,
    "llama.rope.freq_base": 500.0,
    "llama.rope.dimension_count": 8,
}


def write(path, tensors, metadata=METADATA, architecture="llama", kinds=()):
    """A GGUF file; `kinds` gives some tensors a quantisation type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        add = writer.add_string if isinstance(value, str) else None
        add = add or (writer.add_uint32 if isinstance(value, int) else writer.add_float32)
        add(key, value)
    writer.add_token_list([f"t{i}" for i in range(61)])
    for name, values in tensors.items():
        writer.add_tensor(name, values, raw_dtype=dict(kinds).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refuses(path, message):
    with pytest.raises(InputError, match=message) as raised:
        files = GGUFFile(path)
        read_params(files, read_config(files))
    assert "\n" not in str(raised.value) and str(path) in str(raised.value)


@pytest.fixture
def tensors(golden):
    return gguf_tensors(golden)


def test_rows_of_a_head():
    rows = np.arange(16)[:, None]  # two heads of eight rows
    np.testing.assert_array_equal(planes_together(rows, 2)[:8, 0], [0, 4, 1, 5, 2, 6, 3, 7])
    np.testing.assert_array_equal(halves_apart(planes_together(rows, 2), 2), rows)


@pytest.mark.quick
def test_reads_what_was_written(golden, tensors, tmp_path):
    files = GGUFFile(write(tmp_path / "tiny.gguf", tensors))
    config = read_config(files)
    assert config == golden.config
    jax.tree.map(np.testing.assert_array_equal, read_params(files, config), golden.params)


@pytest.mark.quick
def test_half_precision(golden, tensors, tmp_path):
    half = {name: values.astype(np.float16) for name, values in tensors.items()}
    files = GGUFFile(write(tmp_path / "tiny.gguf", half))
    params = read_params(files, read_config(files))
    for ours, exact in zip(jax.tree.leaves(params), jax.tree.leaves(golden.params), strict=True):
        np.testing.assert_array_equal(ours, np.asarray(exact).astype(np.float16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.type": "linear"}, "rotary scaling 'linear' is not supported"),
        ({"llama.rope.dimension_count": 4}, "rotary positions on a part of each head"),
        ({"llama.block_count": None}, "metadata llama.block_count is missing"),
        ({"llama.block_count": 2}, "unknown tensor .blk.2"),
        ({"llama.block_count": 4}, "9 tensors are missing, the first is blk.3"),
        ({"llama.feed_forward_length": 41}, r"tensor blk.0.ffn_gate.weight has shape \[40, 24\], expected \[41, 24\]"),
        ({"llama.attention.head_count": 8}, "blk.0.attn_(q|output).weight has shape"),
        ({"llama.embedding_length": "24"}, "hidden_size: '24' is not int"),
        ({"llama.attention.layer_norm_rms_epsilon": "1e-5"}, "layer_norm_rms_epsilon is not of type float"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps: must be above 0"),
    ],
)
def test_metadata_that_does_not_fit(tensors, tmp_path, change, message):
    metadata = {key: value for key, value in {**METADATA, **change}.items() if value is not None}
    refuses(write(tmp_path / "tiny.gguf", tensors, metadata), message)


def test_other_architecture(tensors, tmp_path):
    path = write(tmp_path / "tiny.gguf", tensors, architecture="qwen2")
    refuses(path, "architecture 'qwen2' is not supported, only llama is")


DOWN = "blk.0.ffn_down.weight"


def with_quantised(tensors, path, kind, values):
    """A file whose first tensor is the quantised `DOWN`, `[24, values]`; of such a row all bytes are 0x7C."""
    width = gguf.GGML_QUANT_SIZES[kind][1] * values // gguf.GGML_QUANT_SIZES[kind][0]
    tensors = {DOWN: np.full((24, width), 0x7C, np.uint8), **{name: tensors[name] for name in tensors if name != DOWN}}
    return write(path, tensors, {**METADATA, "llama.feed_forward_length": values}, kinds=[(DOWN, kind)])


def test_quantisation_that_cannot_be_undone(tensors, tmp_path):
    kind = gguf.GGMLQuantizationType.Q8_K  # a type of intermediate results only
    path = with_quantised(tensors, tmp_path / "tiny.gguf", kind, 256)
    refuses(path, f"tensor .{DOWN}.: quantisation Q8_K cannot be read")


def test_scales_that_are_not_finite(tensors, tmp_path, recwarn):
    path = with_quantised(tensors, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q2_K, 256)
    refuses(path, f"tensor {DOWN} has values that are not finite")
    assert not recwarn.list


def test_not_gguf(tmp_path):
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" * 20)
    refuses(tmp_path / "other.gguf", "not a GGUF file")
    (tmp_path / "other.gguf").write_bytes(b"")
    refuses(tmp_path / "other.gguf", "not a GGUF file")
    refuses(tmp_path / "none.gguf", "No such file")
    refuses(tmp_path, "not a regular file")
    os.mkfifo(tmp_path / "pipe.gguf")
    refuses(tmp_path / "pipe.gguf", "not a regular file")


def test_truncated_anywhere(tensors, tmp_path):
    path = write(tmp_path / "tiny.gguf", tensors)
    content = path.read_bytes()
    for kept in [4, 7, 12, 23, *range(24, len(content), len(content) // 60), len(content) - 33]:
        path.write_bytes(content[:kept])
        refuses(path, "truncated or corrupt")


def u32(*numbers):
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers):
    return struct.pack(f"<{len(numbers)}Q", *numbers)


KEY = u64(1) + b"a"
F32, Q4_0 = 0, 2
UINT8, UINT32, TEXT, ARRAY = 0, 4, 8, 9


def tensor(name, axes, kind=F32, offset=0):
    return u64(len(name)) + name + u32(len(axes)) + u64(*axes) + u32(kind) + u64(offset)


@pytest.mark.parametrize(
    ("counts", "header", "message"),
    [
        # Counts and lengths that lie: each of them would cost the package hours or gigabytes.
        ((0, 2**40), b"", "1099511627776 keys and 0 tensors"),
        ((2**40, 0), b"", "0 keys and 1099511627776 tensors"),
        ((0, 1), u64(2**63) + b"a", "ends in the middle of its header"),
        ((0, 1), KEY + u32(TEXT) + u64(2**40), "ends in the middle of its header"),
        ((0, 1), KEY + u32(ARRAY, UINT8) + u64(2**40), "arrays of more than 600000 elements"),
        ((0, 1), KEY + u32(ARRAY, TEXT) + u64(2**40), "arrays of more than 600000 elements"),
        ((0, 1), KEY + u32(ARRAY, UINT8) + u64(500_000) + b"\0" * 37_000, "ends in the middle of its header"),
        ((0, 2), (KEY + u32(ARRAY, UINT8) + u64(400_000) + b"\0" * 400_000) * 2, "arrays of more than 600000 elements"),
        ((0, 1), KEY + u32(ARRAY) + u32(ARRAY, 1, 0) * 2000, "unknown type 9"),
        ((0, 1), KEY + u32(13) + u64(0), "unknown type 13"),
        ((0, 2), (KEY + u32(UINT32, 1)) * 2, "Duplicate a"),
        ((0, 1), u64(1) + b"\xff" + u32(UINT32, 1), "'utf-8' codec can't decode"),
        ((0, 1), u64(17) + b"general.alignment" + u32(TEXT) + u64(0), "Bad type for general.alignment"),
        # Tensors.
        ((1, 0), tensor(b"a", [1], offset=2**63) + bytes(99), "a tensor ends beyond the end of the file"),
        ((1, 0), tensor(b"a", [2**60, 2**60]) + bytes(99), "a tensor ends beyond the end of the file"),
        ((1, 0), tensor(b"a", [0, 2**60]) + bytes(99), r"tensor 'a' of shape \[1152921504606846976, 0\] is empty"),
        ((1, 0), tensor(b"a", [33], Q4_0) + bytes(99), r"tensor 'a' of shape \[33\] .* blocks of 32 values"),
        ((1, 0), tensor(b"a", []) + bytes(99), "tensor 'a' has 0 axes"),
        ((1, 0), tensor(b"a", [1] * 5) + bytes(99), "tensor 'a' has 5 axes"),
        ((1, 0), tensor(b"a", [1], kind=99) + bytes(99), "99 is not a valid GGMLQuantizationType"),
        ((2, 0), tensor(b"a", [8]) + tensor(b"b", [8], offset=28) + bytes(99), "tensors lie over one another"),
        ((2, 0), tensor(b"a", [8]) + tensor(b"a", [8], offset=32) + bytes(99), "duplicated tensor with name a"),
    ],
)
def test_headers_that_lie(tmp_path, counts, header, message):
    (tmp_path / "lie.gguf").write_bytes(b"GGUF" + u32(3) + u64(*counts) + header)
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        GGUFFile(tmp_path / "lie.gguf")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("version", [0, 1, 4, 3 << 24])
def test_other_versions(tmp_path, version):
    (tmp_path / "new.gguf").write_bytes(b"GGUF" + u32(version) + u64(0, 0))
    refuses(tmp_path / "new.gguf", f"version {version} or big-endian")


def test_header_with_a_flipped_byte_is_read_or_refused(golden, tensors, tmp_path):
    path = write(tmp_path / "tiny.gguf", tensors)
    content = path.read_bytes()
    for place in range(0, 2000, 37):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            files = GGUFFile(path)
            read_params(files, read_config(files))
        except InputError as error:
            assert "\n" not in str(error)
