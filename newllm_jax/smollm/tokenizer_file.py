"""The tokenizer of a `tokenizer.json`, if all its parts are known to take time and memory in proportion to the text.

The `tokenizers` package can be told to search by any regular expression, and to replace a letter by a megabyte, again
and again. The tokenizers of Llamas need none of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from newllm_jax.errors import InputError, shown
from newllm_jax.files import parse_json, read_text

LARGEST_TOKENIZER = 32 * 2**20  # bytes; 300,000 tokens and their merges
SECTIONS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
SEQUENCES = ("normalizers", "pretokenizers", "processors", "decoders")
PARTS = {
    "ByteFallback", "ByteLevel", "Digits", "Fuse", "Metaspace", "NFC", "NFKC", "Prepend", "Replace", "Sequence",
    "Split", "Strip", "TemplateProcessing",
}  # fmt: skip
MOST_PARTS, MOST_PREPENDED = 32, 4
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
PATTERNS = {
    rf"{_WORD}|\p{{N}}{{1,3}}|{_TAIL}": "Llama 3",
    rf"{_WORD}|\p{{N}}|{_TAIL}": "Qwen 2",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "GPT-2",
}


def read_backend(file: Path) -> Any:
    """A `tokenizers.Tokenizer`. Raises InputError: not a tokenizer, or one with a part that is not supported."""
    from tokenizers import Tokenizer

    text = read_text(file, LARGEST_TOKENIZER)
    _check_parts(parse_json(text, str(file)), file)
    with refusals(f"{file}: not a tokenizer"):
        backend = Tokenizer.from_str(text)
        backend.no_truncation()
        backend.no_padding()
    return backend


@contextmanager
def refusals(message: str) -> Iterator[None]:
    """InputError for all that the `tokenizers` package raises: it has no error of its own, and panics are none."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"{message} ({' '.join(str(error).split())})") from error
        raise


def _check_parts(content: Any, file: Path) -> None:
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise InputError(f"{file}: not a tokenizer (it has no model)")
    if content["model"].get("type") != "BPE":
        raise InputError(f"{file}: tokenizer {shown(content['model'].get('type'))} is not supported, only BPE is")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):  # the first two can end in panics
        if content["model"].get(key):
            raise InputError(f"{file}: {key} of a tokenizer is not supported")
    parts = [part for section in SECTIONS for part in _parts(content.get(section), file)]
    if len(parts) > MOST_PARTS:
        raise InputError(f"{file}: a tokenizer of {len(parts)} parts is not supported, only of up to {MOST_PARTS}")
    for part in parts:
        if not _is_bounded(part):
            known = ", ".join(PATTERNS.values())
            raise InputError(
                f"{file}: its {part['type']} may take any time or memory; supported are the patterns of {known}, and "
                "replacements that are not longer than what they replace"
            )


def _parts(part: Any, file: Path) -> Iterator[dict[str, Any]]:
    """The parts of a section, those in sequences too; None is no part."""
    if part is None:
        return
    kind = part.get("type") if isinstance(part, dict) else part
    if not (isinstance(part, dict) and isinstance(kind, str) and kind in PARTS):
        raise InputError(f"{file}: a tokenizer with {shown(kind)} is not supported")
    yield part
    for key in SEQUENCES:
        inner = part.get(key, [])
        for each in inner if isinstance(inner, list) else [inner]:
            yield from _parts(each, file)


def _is_bounded(part: dict[str, Any]) -> bool:
    pattern = part.get("pattern")
    text = pattern.get("String") if isinstance(pattern, dict) else None
    if part["type"] == "Split":
        return bool(text) or (isinstance(pattern, dict) and str(pattern.get("Regex")) in PATTERNS)
    if part["type"] == "Replace":
        return isinstance(text, str) and 0 < len(text) >= len(str(part.get("content")))
    if part["type"] == "TemplateProcessing":  # the text once, between special tokens
        return str(part.get("single")).count("'Sequence'") <= 1
    return len(str(part.get("prepend", ""))) <= MOST_PREPENDED
