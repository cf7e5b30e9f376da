"""What is fuzzed: readers of files that nobody vouches for, as functions of bytes, with small valid files to begin.

Each reads what a command reads of such a file and raises InputError or nothing; all else is a fault.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from newllm_jax.config import load_config
from newllm_jax.files import read_json
from newllm_jax.newllm.tokenizer import SPECIAL_WORDS, WordTokenizer
from newllm_jax.report.compare import comparison, read_results
from newllm_jax.smollm import weights
from newllm_jax.smollm.gguf_header import _Scan
from newllm_jax.smollm.llama_config import LlamaConfig
from newllm_jax.smollm.pretrained import open_files, read_description
from newllm_jax.smollm.tokenizer import Tokenizer, byte_level_bpe, read_tokenizer
from newllm_jax.smollm.tokenizer_file import PATTERNS
from newllm_jax.smollm.weights import GGUF, TENSOR_NAMES, read_config, read_params, save_model
from tests.reliability.tiny import CHECKOUT

TOKENS, TYPES, MERGES = ["a", "b", "ab", "<|im_end|>"], [1, 1, 1, 3], ["a b"]
TEXT = "ab a1 é<|im_end|>"
WORDS = [
    b"NaN", b"-Infinity", b"1e999", b"9" * 400, rb"\ud800", b"\xef\xbb\xbf", b"[" * 99, b'{"a":' * 99, b"null", b"true",
    b"general.alignment", b"llama.", b"F16", b"BF16", b"data_offsets", b"Sequence", b"TemplateProcessing", b"Regex",
    *(struct.pack("<Q", number) for number in (0, 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1)),
]  # fmt: skip
VALUES = [
    None, True, False, 0, 1, -1, 2**31, 2**63, 10**300, 0.5, 1e308, "", "a", "a" * 99, [], {}, [[]], [1, 2], {"a": 1},
]  # fmt: skip
SPACE, UNDERLINE = {"String": " "}, "\u2581"
PARTS = {  # of other tokenizers of Llamas
    "normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Prepend", "prepend": UNDERLINE}, {"type": "Replace", "pattern": SPACE, "content": UNDERLINE},
    ]},
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": next(iter(PATTERNS))}, "behavior": "Isolated", "invert": False},
        {"type": "Metaspace", "replacement": UNDERLINE, "prepend_scheme": "first", "split": False},
    ]},
    "post_processor": {
        "type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
        "special_tokens": {},
    },
    "decoder": {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": UNDERLINE}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]},
}  # fmt: skip


@dataclass(frozen=True)
class Reader:
    """A reader of untrusted bytes.

    Attributes:
      seeds: contents that it can read.
      read: raises InputError where it refuses a content.
      change: of a content, by a random generator.
    """

    seeds: list[bytes]
    read: Callable[[bytes], object]
    change: Callable[[bytes, random.Random], bytes]


def readers(folder: Path) -> dict[str, Reader]:
    """The readers, by name, with their files in a folder. Shapes of parameters are not traced, which takes 0.1 s."""
    weights.parameter_shapes = parameter_shapes
    return {"gguf": gguf_reader(folder), "safetensors": safetensors_reader(folder), "json": json_reader(folder)}


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder, in memory where the system has one there."""
    return tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A content with one to three changes: a bit, a word, a piece left out or repeated."""
    for _ in range(draw.randrange(1, 4)):
        place, end = sorted(draw.randrange(len(content) + 1) for _ in range(2))
        before, piece, after = content[:place], content[place : min(end, place + 64)], content[min(end, place + 64) :]
        word = draw.choice(WORDS)
        flipped = bytes([piece[0] ^ 1 << draw.randrange(8)]) + piece[1:] if piece else b""
        over = word + content[place + len(word) :]
        content = before + draw.choice([flipped + after, over, word + piece + after, after, piece + piece + after])
    return content


def mutated_json(content: bytes, draw: random.Random) -> bytes:
    """Changed as `mutated` does, or a value of it replaced by another, so that it stays JSON."""
    try:
        parsed = json.loads(content) if draw.randrange(4) else None
    except (ValueError, RecursionError):
        parsed = None
    if not parsed:
        return mutated(content, draw)
    parsed = [parsed]  # so that all of it is a value too
    places = list(containers(parsed))
    for _ in range(draw.randrange(1, 3)):
        place = draw.choice(places)
        key = draw.choice(list(place) if isinstance(place, dict) else range(len(place)))
        place[key] = draw.choice(VALUES)
    return json.dumps(parsed[0]).encode()


def containers(content: Any) -> Iterator[Any]:
    """The lists and objects of JSON content that are not empty."""
    if isinstance(content, dict | list) and content:
        yield content
        for value in content.values() if isinstance(content, dict) else content:
            yield from containers(value)


class Numbers(_Scan):
    """A scan that remembers where the numbers of a header are, and their bytes."""

    def __init__(self, content: Any) -> None:
        super().__init__(content)
        self.found: list[tuple[int, int]] = []

    def number(self, kind: struct.Struct) -> int:
        self.found.append((self.place, kind.size))
        return super().number(kind)

    def skip(self, count: int) -> None:
        if count in (1, 2, 4, 8):
            self.found.append((self.place, count))
        super().skip(count)


def mutated_numbers(content: bytes, draw: random.Random) -> bytes:
    """GGUF, changed anywhere or in one number of its header: a count, length, type, offset or value."""
    scan = Numbers(content)
    with contextlib.suppress(ValueError, KeyError, struct.error):
        scan.header()
    if not draw.randrange(4) or not scan.found:
        return mutated(content, draw)
    place, size = draw.choice(scan.found)
    old = int.from_bytes(content[place : place + size], "little")
    new = draw.choice([old + 1, old - 1, 2 * old, draw.randrange(14), 1 << draw.randrange(8 * size)]) % 256**size
    return content[:place] + new.to_bytes(size, "little") + content[place + size :]


def mutated_header(content: bytes, draw: random.Random) -> bytes:
    """Safetensors, changed anywhere or in its header, whose length then fits."""
    length = int.from_bytes(content[:8], "little")
    if not draw.randrange(4) or length > len(content):
        return mutated(content, draw)
    header = mutated_json(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def parameter_shapes(config: LlamaConfig) -> Any:
    """The shapes of `smollm.model.parameter_shapes`, by multiplication."""
    layers, hidden, inner = config.num_layers, config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {
        "attention_norm/scale": (hidden,), "attention/q_proj/kernel": (hidden, heads),
        "attention/k_proj/kernel": (hidden, kv_heads), "attention/v_proj/kernel": (hidden, kv_heads),
        "attention/o_proj/kernel": (heads, hidden), "mlp_norm/scale": (hidden,),
        "mlp/gate_proj/kernel": (hidden, inner), "mlp/up_proj/kernel": (hidden, inner),
        "mlp/down_proj/kernel": (inner, hidden),
    }  # fmt: skip
    shapes = {f"backbone/blocks/{name}": (layers, *size) for name, size in sizes.items()}
    shapes |= {"embed/embedding": (config.vocab_size, hidden), "backbone/norm/scale": (hidden,)}
    if not config.tie_embeddings:
        shapes["lm_head/kernel"] = (hidden, config.vocab_size)
    return unflatten_dict({name: SimpleNamespace(shape=shape) for name, shape in shapes.items()}, sep="/")


def tiny_config(width: int) -> LlamaConfig:
    """A layer of 2 heads, 4 tokens."""
    return LlamaConfig(
        vocab_size=len(TOKENS), hidden_size=width, intermediate_size=width, num_layers=1, num_heads=2, num_kv_heads=1,
        head_dim=width // 2,
    )  # fmt: skip


def gguf_reader(folder: Path) -> Reader:
    """A model in a GGUF file, read as `load_smollm2` reads it."""
    file = folder / "model.gguf"
    kinds = {8: gguf.GGMLQuantizationType.F32, 32: gguf.GGMLQuantizationType.Q4_0}
    seeds = [write_gguf(file, tiny_config(width), kind) for width, kind in kinds.items()]

    def read(content: bytes) -> None:
        file.write_bytes(content)
        files = open_files(file)
        config, tokenizer = read_description(files)
        use(tokenizer)
        read_params(files, config)

    return Reader(seeds, read, mutated_numbers)


def use(tokenizer: Tokenizer) -> None:
    """Text to ids and back."""
    tokenizer.encode(TEXT)
    tokenizer.decode(range(8))


def write_gguf(file: Path, config: LlamaConfig, kind: gguf.GGMLQuantizationType) -> bytes:
    """The content of a GGUF file whose matrices are of one type."""
    writer = gguf.GGUFWriter(file, "llama")
    numbers = {
        "context_length": 64, "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": 1, "attention.head_count": 2, "attention.head_count_kv": 1,
        "rope.dimension_count": config.head_dim,
    }  # fmt: skip
    for key, number in numbers.items():
        writer.add_uint32(f"llama.{key}", number)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", "smollm")
    for key, values in {"tokens": TOKENS, "token_type": TYPES, "merges": MERGES}.items():
        writer.add_array(f"tokenizer.ggml.{key}", values)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 3)
    shapes: dict[str, Any] = flatten_dict(parameter_shapes(config), sep="/")
    for name, tensor in shapes.items():
        stored, shape = TENSOR_NAMES[name][GGUF].format(layer=0), tensor.shape
        shape = shape[1:] if "blocks" in name else shape  # one layer
        values = np.ones(shape[::-1] if name.endswith("kernel") else shape, np.float32)
        its = kind if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(stored, gguf.quants.quantize(values, its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def write_folder(folder: Path) -> LlamaConfig:
    """A model folder."""
    config = tiny_config(8)
    shapes: dict[str, Any] = flatten_dict(parameter_shapes(config), sep="/")
    params = {name: np.ones(tensor.shape, np.float32) for name, tensor in shapes.items()}
    save_model(folder, config, unflatten_dict(params, sep="/"))
    backend = byte_level_bpe(TOKENS, [("a", "b")], TYPES)
    Tokenizer(backend, {"eos_token": TOKENS[-1]}, "{{ messages[0].content }}").save(folder)
    return config


def safetensors_reader(folder: Path) -> Reader:
    """The weights of a model folder."""
    folder = folder / "safetensors"
    config, file = write_folder(folder), folder / "model.safetensors"

    def read(content: bytes) -> None:
        file.write_bytes(content)
        read_params(folder, config)

    return Reader([file.read_bytes()], read, mutated_header)


def json_reader(folder: Path) -> Reader:
    """All files of JSON or TOML that a command can be pointed at; the first byte of an input says which it is."""
    folder = folder / "json"
    config = write_folder(folder)
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    tensors = [name.format(layer=0) for parameter, (name, _) in TENSOR_NAMES.items() if parameter != "lm_head/kernel"]
    contents = {name: (folder / name).read_bytes() for name in ("config.json", "tokenizer.json")}
    contents |= {"tokenizer_config.json": (folder / "tokenizer_config.json").read_bytes()}
    contents["model.safetensors.index.json"] = json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")})
    contents["settings.json"] = json.dumps({"batch_size": 3, "clip_norms": [0.5], "clip_epochs": []})
    contents["settings.toml"] = "batch_size = 3\nclip_norms = [0.5, 1]\nclip_epochs = [2]\n"
    contents["vocabulary.json"] = json.dumps([*SPECIAL_WORDS, "word"])
    for system in ("newllm", "cascade"):
        results = json.loads((CHECKOUT / "docs" / "results" / "quickstart" / f"{system}.json").read_text())
        results.pop("sha256", None)  # without a hash, as version 0.1.0 wrote it, damage reaches what reads the content
        contents[f"{system}.json"] = json.dumps(shortened(results | {"schema_version": 1}))
    uses: dict[str, Callable[[Path], object]] = {
        "config.json": lambda file: read_config(file.parent),
        "tokenizer.json": lambda file: use(read_tokenizer(file.parent)),
        "tokenizer_config.json": lambda file: read_tokenizer(file.parent),
        "model.safetensors.index.json": lambda file: read_params(file.parent, config),
        "settings.json": lambda file: load_config(str(file)),
        "settings.toml": lambda file: load_config(str(file)),
        "vocabulary.json": lambda file: WordTokenizer.from_json(read_json(file), file),
        "newllm.json": lambda file: comparison([read_results(file)]),
        "cascade.json": lambda file: comparison([read_results(file)]),
    }
    names = sorted(uses)
    valid = {name: text if isinstance(text, bytes) else text.encode() for name, text in contents.items()}
    for name, text in valid.items():
        (folder / name).write_bytes(text)

    def read(content: bytes) -> None:
        name = names[content[0] % len(names)] if content else names[0]
        (folder / name).write_bytes(content[1:])
        try:
            uses[name](folder / name)
        finally:
            (folder / name).write_bytes(valid[name])

    seeds = [bytes([number]) + valid[name] for number, name in enumerate(names)]
    parts = json.dumps({**json.loads(valid["tokenizer.json"]), **PARTS}).encode()
    return Reader(
        [*seeds, bytes([names.index("tokenizer.json")]) + parts],
        read,
        lambda content, draw: content[:1] + mutated_json(content[1:], draw),
    )


def shortened(content: Any) -> Any:
    """Results with one epoch in each list of them."""
    if isinstance(content, dict):
        return {key: shortened(value[:1] if key == "epochs" else value) for key, value in content.items()}
    return [shortened(value) for value in content] if isinstance(content, list) else content


def traced_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes that the model itself has."""
    from newllm_jax.smollm.model import parameter_shapes as traced

    return {name: tensor.shape for name, tensor in flatten_dict(jax.device_get(traced(config)), sep="/").items()}
