"""The example of a report: which tokens it has, their exits, and the text of characters of several tokens."""

from __future__ import annotations

import numpy as np

from newllm_jax.cascade.example import exit_example, token_texts
from newllm_jax.smollm.alpaca import STRIDE


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", errors="replace")


def test_tokens_are_read_on_from_chunk_to_chunk_each_with_its_exit():
    chunks = np.full((2, STRIDE + 1), ord("a"))
    chunks[0, -1] = ord("x")  # the target of the first chunk's last token: predicted, not read
    chunks[1, :3] = [ord(letter) for letter in "bcd"]
    exits = np.arange(2 * STRIDE).reshape(2, STRIDE) % 3
    found = exit_example(Bytes(), chunks, exits, STRIDE + 2)["example"]
    assert found["tokens"] == ["a"] * STRIDE + ["b", "c"]
    assert found["exits"] == [number % 3 for number in range(STRIDE + 2)]
    assert len(exit_example(Bytes(), chunks, exits.ravel(), 10**6)["example"]["tokens"]) == 2 * STRIDE
    assert exit_example(Bytes(), chunks, exits, 0) == {}


def test_a_character_of_several_tokens_stands_at_the_last_of_them():
    assert token_texts(Bytes(), list("aéb€".encode())) == ["a", "", "é", "b", "", "", "€"]
