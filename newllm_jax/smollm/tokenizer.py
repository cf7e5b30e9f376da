"""SmolLM2's tokenizer: byte-level BPE that first splits digits one by one; and the chat template that comes with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from newllm_jax.errors import InputError, shown
from newllm_jax.files import read_json, read_text, whole_file
from newllm_jax.smollm.chat_template import render
from newllm_jax.smollm.gguf_file import GGUFFile
from newllm_jax.smollm.tokenizer_file import read_backend, refusals

LARGEST_TEMPLATE = 2**20  # bytes
_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # types of GGUF tokens that are found in the text before it is split


class Tokenizer:
    """Text to ids and back. No special token is added; one that stands in the text (`<|im_end|>`) is recognised.

    Attributes:
      vocab_size: all ids are below it, those of added tokens too.
      eos_id: the id that ends a text or a turn; None where the files name none.
      chat_template: a Jinja template; "" where the files have none.
    """

    def __init__(self, backend: Any, specials: Mapping[str, str] | None = None, chat_template: str = "") -> None:
        """`backend`: a `tokenizers.Tokenizer`; `specials`: the texts of `bos_token` and `eos_token`, where known."""
        self._backend = backend
        self._specials = dict(specials or {})
        self.chat_template = chat_template
        self.vocab_size: int = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        end = self._specials.get("eos_token")
        self.eos_id: int | None = None if end is None else backend.token_to_id(end)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Raises InputError: it is no Unicode (half a surrogate pair), or the tokenizer fails."""
        with refusals(f"text {shown(text)} cannot be tokenised"):
            return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; bytes that are no character yet come out as U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns of a conversation (`role`, `content`) as the text that an instructed model expects.

        Raises:
          InputError: there is no template, or it cannot be rendered, see `chat_template.render`.
        """
        if not self.chat_template:
            raise InputError("chat: this model has no chat template; give the prompt as plain text")
        return render(self.chat_template, messages, self._specials, add_generation_prompt)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `read_tokenizer` and transformers read."""
        settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self._specials}
        settings["clean_up_tokenization_spaces"] = False  # which would change decoded text
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        texts = {"tokenizer.json": self._backend.to_str(pretty=True), "tokenizer_config.json": json.dumps(settings)}
        for name, text in texts.items():
            with whole_file(folder / name) as partial:
                partial.write_text(text + "\n", encoding="utf-8")

    @property
    def special_ids(self) -> dict[str, int | None]:
        """`bos_token_id` and `eos_token_id`, None where the files name none."""
        return {
            f"{name}_id": self._backend.token_to_id(self._specials[name]) if name in self._specials else None
            for name in ("bos_token", "eos_token")
        }


def read_tokenizer(files: Path | GGUFFile) -> Tokenizer:
    """The tokenizer of a model folder (`tokenizer.json`) or of a GGUF file (its tokens and merges).

    Raises:
      InputError: a file that is missing or not valid, or a GGUF tokenizer of another kind.
    """
    return _from_gguf(files) if isinstance(files, GGUFFile) else _from_folder(files)


def byte_level_bpe(tokens: Sequence[str], merges: Sequence[tuple[str, str]], types: Sequence[int]) -> Any:
    """A `tokenizers.Tokenizer` as SmolLM2 was trained with: digits one by one, then byte-level BPE.

    Args:
      tokens: the text of each id.
      merges: pairs of tokens, the earliest learned first.
      types: each token's GGUF type.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    for kind, add in ((_CONTROL_TOKEN, backend.add_special_tokens), (_USER_TOKEN, backend.add_tokens)):
        found = [token for token, its in zip(tokens, types, strict=True) if its == kind]
        add([AddedToken(token, special=kind == _CONTROL_TOKEN, normalized=False) for token in found])
    return backend


def _from_gguf(file: GGUFFile) -> Tokenizer:
    kinds = [file.metadata(f"tokenizer.ggml.{key}") for key in ("model", "pre")]
    if kinds != ["gpt2", "smollm"]:
        raise InputError(f"{file.path}: tokenizer {'/'.join(map(str, kinds))} is not supported, only gpt2/smollm is")
    tokens, types, merges = (file.metadata(f"tokenizer.ggml.{key}", list) for key in ("tokens", "token_type", "merges"))
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise InputError(f"{file.path}: the tokenizer's tokens or merges are not texts")
    merges = [tuple(merge.split(" ")) for merge in merges]
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens) or any(len(merge) != 2 for merge in merges):
        raise InputError(f"{file.path}: the tokenizer's tokens, token types and merges do not fit together")
    specials = {}
    for name in ("bos", "eos"):
        number = file.metadata(f"tokenizer.ggml.{name}_token_id", int, -1)
        if 0 <= number < len(tokens):
            specials[f"{name}_token"] = tokens[number]
    with refusals(f"{file.path}: the tokenizer's merges do not fit its tokens"):
        backend = byte_level_bpe(tokens, merges, types)
    return Tokenizer(backend, specials, file.metadata("tokenizer.chat_template", str, ""))


def _from_folder(folder: Path) -> Tokenizer:
    backend = read_backend(folder / "tokenizer.json")
    settings = _settings(folder / "tokenizer_config.json")
    template = settings.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        named = [entry for entry in template if isinstance(entry, dict) and entry.get("name") == "default"]
        template = named[0].get("template") if named else ""
    if not isinstance(template, str):
        raise InputError(f"{folder / 'tokenizer_config.json'}: chat_template is not a text")
    file = folder / "chat_template.jinja"  # where newer transformers put it
    if file.exists():
        template = read_text(file, LARGEST_TEMPLATE)
    specials = {}
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            specials[name] = token
    return Tokenizer(backend, specials, template)


def _settings(file: Path) -> dict[str, Any]:
    settings = read_json(file) if file.exists() else {}
    if not isinstance(settings, dict):
        raise InputError(f"{file}: not a JSON object")
    return settings
