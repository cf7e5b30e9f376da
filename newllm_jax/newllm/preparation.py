"""Texts to ids in two passes over them, neither of which holds them: one counts words, the other gives the ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from newllm_jax.config import NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.sequences import packed_count, packed_windows, window_starts, windows
from newllm_jax.newllm.tokenizer import BOS, EOS, SPECIAL_WORDS, UNK, WordTokenizer, split_words

SPLITS = ("train", "validation", "test")
Texts = Mapping[str, Iterable[str]]  # of each split, which can be iterated more than once


@dataclass(frozen=True)
class Census:
    """What the first pass finds, from which the sizes of all arrays follow.

    Attributes:
      tokenizer: the words of the train split.
      texts: per split, the number of texts that are not empty.
      words: per split, the number of their words.
      shapes: per split, of its ids: `[sequences, sequence_length]`, or of a stream `[ids]`.
    """

    tokenizer: WordTokenizer
    texts: dict[str, int]
    words: dict[str, int]
    shapes: dict[str, tuple[int, ...]]


def take_census(splits: Texts, config: NewLLMConfig, source: str) -> Census:
    """The first pass. Of the texts it keeps how often the train split has each of its words.

    Args:
      source: its name, for errors.

    Raises:
      InputError: no words in the train split, more of them than ids have room for, or a split that gives no sequence.
    """
    counts, tokenizer = Counter[str](), None
    texts, words, shapes = dict[str, int](), dict[str, int](), dict[str, tuple[int, ...]]()
    for split in SPLITS:
        texts[split], words[split], sequences, ids = 0, 0, 0, 1
        for text in splits[split]:
            found = split_words(text, config.lower_case)
            texts[split] += bool(found)
            words[split] += len(found)
            ids += len(found) + 1
            if len(found) >= config.minimum_words:
                sequences += len(window_starts(len(found) + 2, config.sequence_length, config.stride))
            if split == "train":
                counts.update(found)
        if tokenizer is None:
            tokenizer = WordTokenizer.from_counts(counts, config.vocabulary_size, config.lower_case)
            if len(tokenizer) <= len(SPECIAL_WORDS):
                raise InputError(f"dataset: {source} has no words in its train split")
        if not (sequences if config.text == "windows" else words[split]):
            shortest = f"{config.minimum_words} words or more" if config.text == "windows" else "one word or more"
            raise InputError(f"dataset: the {split} split of {source} gives no sequence (no text of {shortest})")
        if config.text == "packed":
            sequences = packed_count(ids, config.sequence_length)
        shapes[split] = (ids,) if config.text == "stream" else (sequences, config.sequence_length)
    assert tokenizer is not None
    return Census(tokenizer, texts, words, shapes)


def encode(texts: Iterable[str], tokenizer: WordTokenizer, config: NewLLMConfig) -> Iterator[np.ndarray]:
    """The second pass over a split: its ids (uint16), of which each array is the next part, `[..., sequence_length]`.

    Texts to windows; or to one stream of ids with EOS after every text, an empty one too, and before the first, which
    is given as it is, `[...]`, or packed.
    """
    ids = tokenizer.ids

    def encoded() -> Iterator[list[int]]:
        return ([ids.get(word, UNK) for word in split_words(text, config.lower_case)] for text in texts)

    def stream() -> Iterator[np.ndarray]:
        yield np.array([EOS], np.uint16)
        yield from (np.array([*text, EOS], np.uint16) for text in encoded())

    if config.text == "stream":
        yield from stream()
    elif config.text == "packed":
        yield from packed_windows(stream(), config.sequence_length)
    else:
        for text in encoded():
            if len(text) >= config.minimum_words:
                yield from windows(np.array([BOS, *text, EOS], np.uint16), config.sequence_length, config.stride)
