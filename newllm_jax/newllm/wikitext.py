"""Texts -> words -> a vocabulary of 1,000 -> sequences of 64 ids (report of New-LLM, "data")."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from newllm_jax.config import NewLLMConfig, check, checked
from newllm_jax.content import json_sha256, note_damage, read_arrays, write_arrays
from newllm_jax.errors import InputError
from newllm_jax.files import cache_folder, parse_json
from newllm_jax.records.results import Fingerprint
from newllm_jax.sources.text import open_source
from newllm_jax.training.memory import check_memory

PAD, UNK, BOS, EOS = range(4)
SPECIAL_WORDS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")
SPLITS = ("train", "validation", "test")
HUB_CONFIGURATIONS = {"Salesforce/wikitext": "wikitext-2-raw-v1"}  # what the published experiments read
PREPARATION = 1  # raised whenever the same texts would give other sequences


@dataclass(frozen=True)
class WordTokenizer:
    """Lower-cased, white-space separated words and their ids.

    Attributes:
      words: the word of each id; the first four are special.

    Raises:
      InputError: `words` is no list of different texts that begins with the special ones.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        words = self.words
        check("words", words, "a list of texts", isinstance(words, list | tuple)
              and all(isinstance(word, str) for word in words))  # fmt: skip
        check("words", words, f"{', '.join(SPECIAL_WORDS)} and then other words, each of them once",
              tuple(words[: len(SPECIAL_WORDS)]) == SPECIAL_WORDS and len(set(words)) == len(words))  # fmt: skip
        object.__setattr__(self, "words", tuple(words))

    @classmethod
    def from_texts(cls, texts: Iterable[str], vocabulary_size: int) -> WordTokenizer:
        """The most frequent words, ties in order of first appearance. `<unk>` is the unknown word, not a word."""
        texts = checked("texts", texts, tuple[str, ...])
        vocabulary_size = checked("vocabulary_size", vocabulary_size, int, least=5, most=2**16)
        counts = Counter(word for text in texts for word in text.lower().split())
        del counts["<unk>"]
        frequent = [word for word, _ in counts.most_common(vocabulary_size - len(SPECIAL_WORDS))]
        return cls((*SPECIAL_WORDS, *frequent))

    @classmethod
    def from_json(cls, content: Any, file: Path) -> WordTokenizer:
        """The tokenizer of a `vocabulary.json`. Raises InputError, naming the file, where it holds no such words."""
        try:
            return cls(content)
        except InputError as error:
            raise InputError(f"{file}: damaged ({error})") from error

    def __len__(self) -> int:
        return len(self.words)

    @property
    def ids(self) -> dict[str, int]:
        """The id of every word that a text can contain."""
        return {word: index for index, word in enumerate(self.words) if index >= len(SPECIAL_WORDS)}

    def encode(self, text: str) -> list[int]:
        """`[words + 2]`: BOS, the text's words, EOS."""
        check("text", text, "a text", isinstance(text, str))
        ids = self.ids
        return [BOS, *(ids.get(word, UNK) for word in text.lower().split()), EOS]

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the words of a text as people type it: punctuation is a word of its own, as in the data."""
        check("text", text, "a text", isinstance(text, str))
        ids, encoded = self.ids, [BOS]
        for word in text.lower().split():
            pieces = [word] if word in ids else re.findall(r"'?\w+|[^\w\s]", word)
            encoded.extend(ids.get(piece, UNK) for piece in pieces)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The words of the ids, separated by blanks."""
        ids = checked("ids", ids, tuple[int, ...], least=0, most=len(self) - 1)
        return " ".join(self.words[index] for index in ids)


@dataclass(frozen=True)
class Wikitext:
    """A prepared data set.

    Attributes:
      tokenizer: the words of the train split.
      sequences: per split, `[sequences, 64]` ids (uint16), padded with 0.
      texts: per split, the number of texts that are not empty.
      words: per split, the number of their words.
      provenance: the source, as `results.json` has it.
    """

    tokenizer: WordTokenizer
    sequences: dict[str, np.ndarray]
    texts: dict[str, int]
    words: dict[str, int]
    provenance: dict[str, Any]

    @property
    def fallback(self) -> str:
        """Why another source replaced the one asked for; "" where none did."""
        return self.provenance["fallback"]

    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """Of the texts, as `config.json` has it."""
        source = f"dataset: {self.provenance['source']}"
        return (Fingerprint("data", source, self.provenance["fingerprint"]),)

    def summary(self, batch_size: int) -> dict[str, Any]:
        """The `data` of `results.json`."""
        counts = {f"{split}_{what}": getattr(self, what)[split] for what in ("texts", "words") for split in SPLITS}
        sequences = {f"{split}_sequences": len(self.sequences[split]) for split in SPLITS}
        steps = -(-len(self.sequences["train"]) // batch_size)
        return {
            **self.provenance, **counts, **sequences,
            "vocabulary_size": len(self.tokenizer), "steps_per_epoch": steps,
        }  # fmt: skip


def window_starts(ids: int, length: int, stride: int) -> range:
    """Where the windows of a text of so many ids begin: whole ones (a tail is dropped), or one of a text that fits."""
    return range(0, max(ids - length, 0) + 1, stride)


def prepare(splits: dict[str, list[str]], config: NewLLMConfig, provenance: dict[str, Any]) -> Wikitext:
    """Texts to sequences.

    Raises:
      InputError: no words in the train split, a split that gives no sequence, or more sequences than fit into memory.
    """
    texts = {split: [text for text in splits[split] if text.strip()] for split in SPLITS}
    tokenizer = WordTokenizer.from_texts(texts["train"], config.vocabulary_size)
    if len(tokenizer) <= len(SPECIAL_WORDS):
        raise InputError(f"dataset: {provenance['source']} has no words in its train split")
    ids = tokenizer.ids
    sequences: dict[str, np.ndarray] = {}
    words: dict[str, int] = {}
    for split in SPLITS:
        encoded: list[list[int]] = []
        words[split] = 0
        for text in texts[split]:
            split_text = text.lower().split()
            words[split] += len(split_text)
            if len(split_text) >= config.minimum_words:
                encoded.append([BOS, *(ids.get(word, UNK) for word in split_text), EOS])
        if not encoded:
            raise InputError(
                f"dataset: the {split} split of {provenance['source']} gives no sequence "
                f"(no text of {config.minimum_words} words or more)"
            )
        sequences[split] = cut(encoded, config.sequence_length, config.stride)
    counts = {split: len(texts[split]) for split in SPLITS}
    return Wikitext(tokenizer, sequences, counts, words, provenance)


def cut(encoded: Sequence[Sequence[int]], length: int, stride: int) -> np.ndarray:
    """The windows of all texts, `[sequences, length]` ids (uint16); a text that fits is padded with 0.

    Raises:
      InputError: there is no memory for them.
    """
    starts = [window_starts(len(ids), length, stride) for ids in encoded]
    shape = sum(map(len, starts)), length
    check_memory({"sequence_length": math.prod(shape) * np.dtype(np.uint16).itemsize}, host=True)
    windows = np.full(shape, PAD, np.uint16)
    pieces = (ids[start : start + length] for ids, of_text in zip(encoded, starts, strict=True) for start in of_text)
    for window, piece in zip(windows, pieces, strict=True):
        window[: len(piece)] = piece
    return windows


def load_wikitext(config: NewLLMConfig | None = None) -> Wikitext:
    """The data set of a configuration, from the cache of prepared arrays where the same content was seen before.

    Raises:
      InputError: a source that is missing, empty, ambiguous, not UTF-8, without a `text` column or without words.
    """
    check("config", config, "a NewLLMConfig", config is None or isinstance(config, NewLLMConfig))
    config = config or NewLLMConfig()
    published = HUB_CONFIGURATIONS.get(config.dataset, "")
    source = open_source(config.dataset, config.dataset_config, config.fallback, published)
    settings = [config.vocabulary_size, config.sequence_length, config.stride, config.minimum_words]
    key = [PREPARATION, source.fingerprint, *settings]
    cached = cache_folder() / "newllm" / f"{json_sha256(key)[:32]}.arrays"
    prepared = _read_cache(cached, key, config, source.provenance())
    if prepared is None:
        prepared = prepare(source.splits(SPLITS), config, source.provenance())
        _write_cache(cached, key, prepared)
    return prepared


def _read_cache(file: Path, key: list[Any], config: NewLLMConfig, provenance: dict[str, Any]) -> Wikitext | None:
    """The prepared data of a file; None where it is absent or, with a `Note`, something else than this key's data."""
    arrays = read_arrays(file, key)
    if arrays is None:
        return None
    try:
        head = parse_json(arrays["head"].tobytes().decode(), str(file))
        texts, words = ({split: head[what][split] for split in SPLITS} for what in ("texts", "words"))
        sequences = {split: arrays[split] for split in SPLITS}
        data = Wikitext(WordTokenizer(tuple(head["vocabulary"])), sequences, texts, words, provenance)
        _check(data, config)
        return data
    except (ValueError, KeyError, TypeError):  # the hash is right: it is not damaged, but another's work
        note_damage(file)
        return None


def _check(data: Wikitext, config: NewLLMConfig) -> None:
    """Raises ValueError or TypeError where something is not as `prepare` gives it."""
    if not len(SPECIAL_WORDS) < len(data.tokenizer) <= config.vocabulary_size:
        raise ValueError("too few words or too many")
    if not all(type(count) is int and count >= 0 for counts in (data.texts, data.words) for count in counts.values()):
        raise ValueError("counts that are none")
    for rows in data.sequences.values():
        if rows.dtype != np.uint16 or rows.ndim != 2 or rows.shape[1] != config.sequence_length:
            raise ValueError("sequences of another type or shape")
        if rows.max() >= len(data.tokenizer):  # which raises ValueError where there are none
            raise ValueError("an id without a word")


def _write_cache(file: Path, key: list[Any], data: Wikitext) -> None:
    head = json.dumps({"vocabulary": data.tokenizer.words, "texts": data.texts, "words": data.words})
    with suppress(OSError):  # a cache that cannot be written costs the next run some seconds and this one nothing
        write_arrays(file, key, {"head": np.frombuffer(head.encode(), np.uint8), **data.sequences})
