"""A short part of the fuzzing, not guided: what random changes leave of valid files is read, or refused in a line."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("gguf")

from tests.reliability import fuzz_readers
from tests.reliability.fuzz import outcome


@pytest.fixture
def readers(monkeypatch):
    monkeypatch.setattr(fuzz_readers.weights, "parameter_shapes", None)  # and back, after `readers` has replaced it
    with fuzz_readers.scratch() as folder:
        yield fuzz_readers.readers(Path(folder))


@pytest.mark.parametrize(("name", "inputs"), [("gguf", 800), ("safetensors", 1200), ("json", 2000)])
def test_random_inputs_are_read_or_refused(readers, name, inputs):
    reader, draw, outcomes = readers[name], random.Random(0), Counter[str]()
    for seed in reader.seeds:
        reader.read(seed)
    for _ in range(inputs):
        content = reader.change(draw.choice(reader.seeds), draw)
        found = outcome(reader.read, content)
        assert found in ("read", "refused"), f"{found}\n{content!r}"
        outcomes[found] += 1
    assert min(outcomes["read"], outcomes["refused"]) > inputs / 100, outcomes


def test_other_errors_are_failures():
    def error(content):
        raise ValueError(content)

    assert "ValueError: b'a'" in outcome(error, b"a")


@pytest.mark.parametrize("width", [8, 32])
def test_shapes_are_those_of_the_model(width):
    config = fuzz_readers.tiny_config(width)
    shapes = fuzz_readers.flatten_dict(fuzz_readers.parameter_shapes(config), sep="/")
    assert {name: tensor.shape for name, tensor in shapes.items()} == fuzz_readers.traced_shapes(config)
