"""Words and their ids (report of New-LLM, "data")."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.config import LARGEST_VOCABULARY, check, checked
from newllm_jax.errors import InputError

PAD, UNK, BOS, EOS = range(4)
SPECIAL_WORDS = ("<PAD>", "<UNK>", "<BOS>", "<EOS>")


def split_words(text: str, lower_case: bool) -> list[str]:
    """The words of a text."""
    return (text.lower() if lower_case else text).split()


@dataclass(frozen=True)
class WordTokenizer:
    """White-space separated words and their ids.

    Attributes:
      words: the word of each id; the first four are special.
      lower_case: whether texts are lower-cased.

    Raises:
      InputError: `words` is no list of different texts that begins with the special ones.

    >>> tokenizer = WordTokenizer.from_texts(["the city of the east"], vocabulary_size=6)
    >>> tokenizer.words
    ('<PAD>', '<UNK>', '<BOS>', '<EOS>', 'the', 'city')
    >>> tokenizer.encode("The old city")
    [2, 4, 1, 5, 3]
    >>> tokenizer.decode([4, 5])
    'the city'
    """

    words: tuple[str, ...]
    lower_case: bool = True

    def __post_init__(self) -> None:
        words = self.words
        check("words", words, "a list of texts", isinstance(words, list | tuple)
              and all(isinstance(word, str) for word in words))  # fmt: skip
        check("words", words, f"{', '.join(SPECIAL_WORDS)} and then other words, each of them once",
              tuple(words[: len(SPECIAL_WORDS)]) == SPECIAL_WORDS and len(set(words)) == len(words))  # fmt: skip
        object.__setattr__(self, "words", tuple(words))

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], vocabulary_size: int | None, lower_case: bool = True
    ) -> WordTokenizer:  # fmt: skip
        """The most frequent words, ties in order of first appearance. `<unk>` and the special ones are no words.

        Args:
          vocabulary_size: the special words included; None for all words.

        Raises:
          InputError: no texts, or more words than ids have room for.
        """
        texts = checked("texts", texts, tuple[str, ...])
        counts = Counter(word for text in texts for word in split_words(text, lower_case))
        return cls.from_counts(counts, vocabulary_size, lower_case)

    @classmethod
    def from_counts(cls, counts: Counter[str], vocabulary_size: int | None, lower_case: bool = True) -> WordTokenizer:
        """`from_texts`, of how often each word is in the texts, in order of first appearance."""
        size = checked("vocabulary_size", vocabulary_size, int | None, least=5, most=LARGEST_VOCABULARY)
        no_words = {"<unk>", *SPECIAL_WORDS}
        frequent = [word for word, _ in counts.most_common(size and size + 1) if word not in no_words]
        frequent = frequent[: size and size - len(SPECIAL_WORDS)]
        most = f"{len(frequent):,} words and {len(SPECIAL_WORDS)} special ones are more than {LARGEST_VOCABULARY:,}"
        check("vocabulary_size", size, f"a number: {most}",
              len(frequent) + len(SPECIAL_WORDS) <= LARGEST_VOCABULARY)  # fmt: skip
        return cls((*SPECIAL_WORDS, *frequent), lower_case)

    @classmethod
    def from_json(cls, content: Any, file: Path, lower_case: bool = True) -> WordTokenizer:
        """The tokenizer of a `vocabulary.json`. Raises InputError, naming the file, where it holds no such words."""
        try:
            return cls(content, lower_case)
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
        return [BOS, *(ids.get(word, UNK) for word in split_words(text, self.lower_case)), EOS]

    def encode_prompt(self, text: str) -> list[int]:
        """BOS and the words of a text as people type it: punctuation is a word of its own, as in the data."""
        check("text", text, "a text", isinstance(text, str))
        ids, encoded = self.ids, [BOS]
        for word in split_words(text, self.lower_case):
            pieces = [word] if word in ids else re.findall(r"'?\w+|[^\w\s]", word)
            encoded.extend(ids.get(piece, UNK) for piece in pieces)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """The words of the ids, separated by blanks."""
        ids = checked("ids", ids, tuple[int, ...], least=0, most=len(self) - 1)
        return " ".join(self.words[index] for index in ids)
