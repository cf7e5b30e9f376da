"""Chunks of other texts."""

from __future__ import annotations

import numpy as np
import pytest

from newllm_jax.cascade.frontier_base import text_chunks
from newllm_jax.errors import InputError


class Characters:
    """A tokenizer whose ids are the code points."""

    def encode(self, text):
        return [ord(character) for character in text]


@pytest.fixture
def source(tmp_path):
    """Lines of text, empty ones between them, and the text that is read of them."""
    lines = [chr(97 + number % 26) * (3 + 5 * number % 40) for number in range(60)]
    file = tmp_path / "texts.txt"
    file.write_text("".join(f"{line}\n{'  ' * (number % 3)}\n" for number, line in enumerate(lines)))
    return str(file), "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("count", [3, 300])
def test_the_texts_are_read_as_one_and_cut_with_an_id_in_common(source, count):
    file, text = source
    chunks = text_chunks(Characters(), file, count)
    ids = [ord(character) for character in text]
    expected = [ids[start : start + 129] for start in range(0, len(ids), 128)]
    expected = [each for each in expected if len(each) == 129][:count]
    assert chunks.dtype == np.int32 and chunks.tolist() == expected
    assert len(chunks) == min(count, (len(ids) - 1) // 128)


@pytest.mark.parametrize(("length", "chunks"), [(128, 1), (127, 0)])  # and a line break
def test_a_text_that_is_just_long_enough(tmp_path, length, chunks):
    (tmp_path / "short.txt").write_text("x" * length + "\n")
    if chunks:
        assert text_chunks(Characters(), str(tmp_path / "short.txt")).shape == (1, 129)
        return
    with pytest.raises(InputError, match=r"elsewhere: .*short.txt gives no chunk of 129 tokens"):
        text_chunks(Characters(), str(tmp_path / "short.txt"))
