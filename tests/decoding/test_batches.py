"""Texts of many prompts: put together by length, each as it would be by itself, in the order of the prompts."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from newllm_jax.decoding.batches import Batches, same_lengths, texts_of_prompts
from newllm_jax.decoding.sampling import Sampling

pytestmark = pytest.mark.quick
END = 9


def asked(seed, batch):
    return Batches(3, seed, Sampling(), batch)


def test_prompts_of_one_length_are_together_and_none_is_lost():
    prompts = [[0] * length for length in (3, 1, 3, 2, 3, 1, 3, 3)]
    assert [*same_lengths(prompts, 4)] == [[1, 5], [3], [0, 2, 4, 6], [7]]
    assert [*same_lengths(prompts, 1)] == [[1], [5], [3], [0], [2], [4], [6], [7]]
    assert [*same_lengths([], 4)] == []


def test_each_text_is_that_of_its_prompt_and_its_seed_up_to_its_end():
    shapes = []

    def make(ids, keys):
        """Three tokens: the first and the last of the prompt, then what the key says; in two pieces."""
        shapes.append(ids.shape)
        drawn = [int(jax.random.randint(key, (), 10, 10**6)) for key in keys]
        yield ids[:, [0, -1]], None
        yield np.asarray(drawn)[:, None], None

    prompts = [[1, 2], [3], [1, 5], [4, END], [6, 7], [8]]
    texts = texts_of_prompts(prompts, make, END, asked(40, 3))
    drawn = [int(jax.random.randint(jax.random.key(40 + number), (), 10, 10**6)) for number in range(6)]
    whole = [[prompt[0], prompt[-1], drawn[number]] for number, prompt in enumerate(prompts)]
    whole[3] = [4]
    assert texts == whole and len({*drawn}) == 6
    assert shapes == [(2, 1), (3, 2), (1, 2)]  # a power of two, but never more than asked for
    assert texts_of_prompts(prompts, make, END, asked(40, 5)) == whole and shapes[3:] == [(2, 1), (4, 2)]
    assert texts_of_prompts([[4, END]], make, None, asked(43, 3)) == [[4, END, drawn[3]]]


def test_no_tokens_at_all():
    assert texts_of_prompts([[1], [2]], lambda ids, keys: iter(()), END, asked(0, 8)) == [[], []]
