"""Texts -> words -> a vocabulary of 1,000 -> sequences of 64 ids (report of New-LLM, "data"), or one stream of ids.

The ids are written to a file of the cache, text by text, and read from there; a large file is mapped into memory.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import Any

import jax
import numpy as np

from newllm_jax.bars import Counted, progress_bar
from newllm_jax.config import LARGEST_VOCABULARY, NewLLMConfig, check
from newllm_jax.content import arrays_written, json_sha256, map_arrays, note_damage, read_arrays
from newllm_jax.files import cache_folder, parse_json
from newllm_jax.newllm.loss import initial_carry
from newllm_jax.newllm.preparation import SPLITS, Census, Texts, encode, take_census
from newllm_jax.newllm.sequences import cut_stream, stream_pieces
from newllm_jax.newllm.tokenizer import PAD, SPECIAL_WORDS, WordTokenizer
from newllm_jax.records.results import Fingerprint
from newllm_jax.sources.text import open_source
from newllm_jax.training.feed import Held, held, make_split
from newllm_jax.training.memory import check_memory
from newllm_jax.training.split import Split

HUB_CONFIGURATIONS = {"Salesforce/wikitext": "wikitext-2-raw-v1"}  # what the published experiments read
PREPARATION = 1  # raised whenever the same texts would give other sequences
PREPARED_BY = ("text", "lower_case", "vocabulary_size", "sequence_length", "stride", "minimum_words")
MAPPED_FROM = 2**26  # bytes of a file; a smaller one is read into memory, where nothing happens to it
EVALUATED_ROWS = 16  # of a stream, for speed: the first words of 15 of them are predicted without what is before them


@dataclass(frozen=True)
class Wikitext:
    """A prepared data set.

    Attributes:
      tokenizer: the words of the train split.
      sequences: ids (uint16) per split: windows `[sequences, 64]`, padded with 0; of a stream all ids, `[ids]`. Where
        they are mapped from a file, they cannot be changed.
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
        targets = {f"{split}_targets": self.targets(split, config) for split in SPLITS}
        return {
            **self.provenance, **counts, **{f"{split}_sequences": self.count(split, config) for split in SPLITS},
            **({} if config.text == "windows" else targets),
            "vocabulary_size": len(self.tokenizer), "steps_per_epoch": self.steps(config),
        }  # fmt: skip

    def targets(self, split: str, config: NewLLMConfig) -> int:
        """How many ids of a stream are predicted."""
        ids = self.sequences[split]
        if config.text == "stream":
            return len(ids) - 1
        return (len(ids) - 1) * (config.sequence_length - 1) + int(np.count_nonzero(ids[-1, 1:] != PAD))

    def count(self, split: str, config: NewLLMConfig) -> int:
        """How many sequences a split has: windows, or pieces of the rows of a stream."""
        ids = len(self.sequences[split])
        if config.text != "stream":
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
        """A split on the device, or in its file."""
        if config.text != "stream":
            return make_split(self.sequences[name], config.examples)
        rows = stream_rows(name, config)
        return Split.from_arrays(self.examples(name, config), rows, initial_carry(config, rows))

    def held(self, name: str, config: NewLLMConfig) -> Held:
        """What the device would hold of `split`, which is read in batches as in training or in evaluation."""
        batch_size = config.batch_size if name == "train" else config.examples_at_once
        where, count = "device" if config.text == "stream" else config.examples, self.count(name, config)
        return held(jax.ShapeDtypeStruct((count, config.sequence_length), np.uint16), where, batch_size)


def stream_rows(split: str, config: NewLLMConfig) -> int:
    """In how many rows a stream is read side by side."""
    return config.batch_size if split == "train" else EVALUATED_ROWS


def prepare(splits: Texts, config: NewLLMConfig, provenance: dict[str, Any]) -> Wikitext:
    """Texts to sequences, or to one stream of ids with EOS after every text, an empty one too, and before the first.

    They are in memory, the texts of `splits` need not be.

    Raises:
      InputError: no words in the train split, a split that gives no sequence, or more sequences than fit into memory.
    """
    return _prepared(splits, take_census(splits, config, provenance["source"]), config, provenance)


def _prepared(splits: Texts, census: Census, config: NewLLMConfig, provenance: dict[str, Any]) -> Wikitext:
    """The second pass of `prepare`."""
    sequences = dict[str, np.ndarray]()
    for split, shape in census.shapes.items():
        if config.text != "stream":
            check_memory({"sequence_length": math.prod(shape) * np.dtype(np.uint16).itemsize}, host=True)
        sequences[split], place = np.empty(shape, np.uint16), 0
        for part in encode(splits[split], census.tokenizer, config):
            sequences[split][place : place + len(part)] = part
            place += len(part)
    return Wikitext(census.tokenizer, sequences, census.texts, census.words, provenance)


def load_wikitext(config: NewLLMConfig | None = None) -> Wikitext:
    """The data set of a configuration, from the cache of prepared arrays where the same content was seen before.

    Neither the texts nor the sequences need to fit into memory, where the cache can be written.

    Raises:
      InputError: a source that is missing, empty, ambiguous, not UTF-8, without a `text` column or without words.

    >>> data = load_wikitext(NewLLMConfig(dataset="corpus.txt", vocabulary_size=64, sequence_length=16, stride=8))
    >>> len(data.tokenizer), data.provenance["source"]
    (64, 'corpus.txt')
    """
    check("config", config, "a NewLLMConfig", config is None or isinstance(config, NewLLMConfig))
    config = config or NewLLMConfig()
    published = HUB_CONFIGURATIONS.get(config.dataset, "")
    with progress_bar("data", 0):
        source = open_source(config.dataset, config.dataset_config, config.fallback, published)
    key = [PREPARATION, source.fingerprint, *(getattr(config, name) for name in PREPARED_BY)]
    cached = cache_folder() / "newllm" / f"{json_sha256(key)[:32]}.arrays"
    provenance = source.provenance()
    if prepared := _read_cache(cached, key, config, provenance):
        return prepared
    with ExitStack() as stack:
        with progress_bar("data: files", 0):
            found = stack.enter_context(source.open_splits(SPLITS))
        twice = 2 * sum(length_hint(found[split]) for split in SPLITS)
        advance = stack.enter_context(progress_bar("data: texts", twice))
        splits = {split: Counted(found[split], advance) for split in SPLITS}
        census = take_census(splits, config, provenance["source"])
        written = _write_cache(cached, key, splits, census, config) and _read_cache(cached, key, config, provenance)
        return written or _prepared(splits, census, config, provenance)


def _read_cache(file: Path, key: list[Any], config: NewLLMConfig, provenance: dict[str, Any]) -> Wikitext | None:
    """The prepared data of a file; None where it is absent or, with a `Note`, something else than this key's data."""
    large = file.is_file() and file.stat().st_size > MAPPED_FROM
    arrays = map_arrays(file, key) if large else read_arrays(file, key)
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


def _write_cache(file: Path, key: list[Any], splits: Texts, census: Census, config: NewLLMConfig) -> bool:
    """Whether the file is there then: a cache that cannot be written costs memory, and the next run some seconds."""
    head = json.dumps({"vocabulary": census.tokenizer.words, "texts": census.texts, "words": census.words}).encode()
    shapes = {split: (np.uint16, shape) for split, shape in census.shapes.items()}
    try:
        with arrays_written(file, key, {**shapes, "head": (np.uint8, (len(head),))}) as writer:
            for split in SPLITS:
                for part in encode(splits[split], census.tokenizer, config):
                    writer.write(part)
            writer.write(head)
    except OSError:
        return False
    return True
