"""Texts -> words -> a vocabulary of 1,000 -> sequences of 64 ids (report of New-LLM, "data"), or one stream of ids."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from newllm_jax.config import LARGEST_VOCABULARY, NewLLMConfig, check
from newllm_jax.content import json_sha256, note_damage, read_arrays, write_arrays
from newllm_jax.errors import InputError
from newllm_jax.files import cache_folder, parse_json
from newllm_jax.newllm.loss import initial_carry
from newllm_jax.newllm.sequences import cut, cut_stream, stream_pieces
from newllm_jax.newllm.tokenizer import BOS, EOS, SPECIAL_WORDS, UNK, WordTokenizer, split_words
from newllm_jax.records.results import Fingerprint
from newllm_jax.sources.text import open_source
from newllm_jax.training.split import Split

SPLITS = ("train", "validation", "test")
HUB_CONFIGURATIONS = {"Salesforce/wikitext": "wikitext-2-raw-v1"}  # what the published experiments read
PREPARATION = 1  # raised whenever the same texts would give other sequences
PREPARED_BY = ("text", "lower_case", "vocabulary_size", "sequence_length", "stride", "minimum_words")
EVALUATED_ROWS = 16  # of a stream, for speed: the first words of 15 of them are predicted without what is before them


@dataclass(frozen=True)
class Wikitext:
    """A prepared data set.

    Attributes:
      tokenizer: the words of the train split.
      sequences: ids (uint16) per split: windows `[sequences, 64]`, padded with 0; of a stream all ids, `[ids]`.
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

    def summary(self, config: NewLLMConfig) -> dict[str, Any]:
        """The `data` of `results.json`."""
        counts = {f"{split}_{what}": getattr(self, what)[split] for what in ("texts", "words") for split in SPLITS}
        targets = {f"{split}_targets": len(ids) - 1 for split, ids in self.sequences.items()}
        return {
            **self.provenance, **counts, **{f"{split}_sequences": self.count(split, config) for split in SPLITS},
            **(targets if config.text == "stream" else {}),
            "vocabulary_size": len(self.tokenizer), "steps_per_epoch": self.steps(config),
        }  # fmt: skip

    def count(self, split: str, config: NewLLMConfig) -> int:
        """How many sequences a split has: windows, or pieces of the rows of a stream."""
        ids = len(self.sequences[split])
        if config.text == "windows":
            return ids
        rows = stream_rows(split, config)
        return rows * stream_pieces(ids, rows, config.sequence_length)

    def steps(self, config: NewLLMConfig) -> int:
        """The updates of an epoch."""
        return -(-self.count("train", config) // config.batch_size)

    def examples(self, split: str, config: NewLLMConfig) -> np.ndarray:
        """The ids of a split as a training reads them: `[examples, sequence_length]`."""
        if config.text == "stream":
            return cut_stream(self.sequences[split], stream_rows(split, config), config.sequence_length)
        return self.sequences[split]

    def split(self, name: str, config: NewLLMConfig) -> Split:
        """A split on the device."""
        if config.text == "windows":
            return Split.from_arrays(self.examples(name, config))
        rows = stream_rows(name, config)
        return Split.from_arrays(self.examples(name, config), rows, initial_carry(config, rows))


def stream_rows(split: str, config: NewLLMConfig) -> int:
    """In how many rows a stream is read side by side."""
    return config.batch_size if split == "train" else EVALUATED_ROWS


def prepare(splits: dict[str, list[str]], config: NewLLMConfig, provenance: dict[str, Any]) -> Wikitext:
    """Texts to sequences, or to one stream of ids with EOS after every text, an empty one too, and before the first.

    Raises:
      InputError: no words in the train split, a split that gives no sequence, or more sequences than fit into memory.
    """
    texts = {split: [text for text in splits[split] if text.strip()] for split in SPLITS}
    tokenizer = WordTokenizer.from_texts(texts["train"], config.vocabulary_size, config.lower_case)
    if len(tokenizer) <= len(SPECIAL_WORDS):
        raise InputError(f"dataset: {provenance['source']} has no words in its train split")
    ids, least = tokenizer.ids, config.minimum_words
    sequences: dict[str, np.ndarray] = {}
    words: dict[str, int] = {}
    for split in SPLITS:
        split_texts = [split_words(text, config.lower_case) for text in splits[split]]
        words[split] = sum(map(len, split_texts))
        encoded = ([ids.get(word, UNK) for word in text] for text in split_texts)
        if config.text == "stream":
            found = chain([EOS], *([*text, EOS] for text in encoded)) if words[split] else ()
            sequences[split] = np.fromiter(found, np.uint16)
        else:
            found = [[BOS, *text, EOS] for text in encoded if len(text) >= least]
            sequences[split] = cut(found, config.sequence_length, config.stride) if found else np.empty(0)
        if not len(sequences[split]):
            shortest = f"{least} words or more" if config.text == "windows" else "one word or more"
            raise InputError(
                f"dataset: the {split} split of {provenance['source']} gives no sequence (no text of {shortest})"
            )
    counts = {split: len(texts[split]) for split in SPLITS}
    return Wikitext(tokenizer, sequences, counts, words, provenance)


def load_wikitext(config: NewLLMConfig | None = None) -> Wikitext:
    """The data set of a configuration, from the cache of prepared arrays where the same content was seen before.

    Raises:
      InputError: a source that is missing, empty, ambiguous, not UTF-8, without a `text` column or without words.
    """
    check("config", config, "a NewLLMConfig", config is None or isinstance(config, NewLLMConfig))
    config = config or NewLLMConfig()
    published = HUB_CONFIGURATIONS.get(config.dataset, "")
    source = open_source(config.dataset, config.dataset_config, config.fallback, published)
    key = [PREPARATION, source.fingerprint, *(getattr(config, name) for name in PREPARED_BY)]
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
        tokenizer = WordTokenizer(tuple(head["vocabulary"]), config.lower_case)
        data = Wikitext(tokenizer, sequences, texts, words, provenance)
        _check(data, config)
        return data
    except (ValueError, KeyError, TypeError):  # the hash is right: it is not damaged, but another's work
        note_damage(file)
        return None


def _check(data: Wikitext, config: NewLLMConfig) -> None:
    """Raises ValueError or TypeError where something is not as `prepare` gives it."""
    if not len(SPECIAL_WORDS) < len(data.tokenizer) <= (config.vocabulary_size or LARGEST_VOCABULARY):
        raise ValueError("too few words or too many")
    if not all(type(count) is int and count >= 0 for counts in (data.texts, data.words) for count in counts.values()):
        raise ValueError("counts that are none")
    shape = () if config.text == "stream" else (config.sequence_length,)
    for rows in data.sequences.values():
        if rows.dtype != np.uint16 or rows.ndim != len(shape) + 1 or rows.shape[1:] != shape:
            raise ValueError("sequences of another type or shape")
        if rows.max() >= len(data.tokenizer):  # which raises ValueError where there are none
            raise ValueError("an id without a word")


def _write_cache(file: Path, key: list[Any], data: Wikitext) -> None:
    head = json.dumps({"vocabulary": data.tokenizer.words, "texts": data.texts, "words": data.words})
    with suppress(OSError):  # a cache that cannot be written costs the next run some seconds and this one nothing
        write_arrays(file, key, {"head": np.frombuffer(head.encode(), np.uint8), **data.sequences})
