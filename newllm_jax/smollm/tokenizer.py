"""SmolLM2's tokenizer: byte-level BPE that first splits digits one by one; and the chat template that comes with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from newllm_jax.errors import InputError
from newllm_jax.smollm.gguf_file import GGUFFile

_CONTROL_TOKEN, _USER_TOKEN = 3, 4  # types of GGUF tokens that are found in the text before it is split


class Tokenizer:
    """Text to ids and back. No special token is added; one that stands in the text (`<|im_end|>`) is recognised.

    Attributes:
      vocab_size: how many ids there are, added tokens included.
      eos_id: the id that ends a text or a turn; None where the files name none.
      chat_template: a Jinja template; "" where the files have none.
    """

    def __init__(self, backend: Any, specials: Mapping[str, str] | None = None, chat_template: str = "") -> None:
        """`backend`: a `tokenizers.Tokenizer`; `specials`: the texts of `bos_token` and `eos_token`, where known."""
        self._backend = backend
        self._specials = dict(specials or {})
        self.chat_template = chat_template
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_id: int | None = backend.token_to_id(self._specials.get("eos_token", ""))

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out; bytes that are no character yet come out as U+FFFD."""
        return self._backend.decode([int(token) for token in ids], skip_special_tokens=True)

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns of a conversation (`role`, `content`) as the text that an instructed model expects.

        The template comes with the weights, so it is rendered in a sandbox: it sees the messages, and no attribute or
        method of Python that could change or reach anything.

        Raises:
          InputError: there is no template, or it is not valid, refuses these messages or leaves the sandbox.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        if not self.chat_template:
            raise InputError("chat: this model has no chat template; give the prompt as plain text")

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        # Block trimming and the two names below are what templates of the Hub are written for.
        sandbox = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        sandbox.globals["raise_exception"] = refuse
        sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
        try:
            return sandbox.from_string(self.chat_template).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._specials,
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            raise InputError(f"chat: the model's chat template cannot be rendered ({error})") from error

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` and `tokenizer_config.json`, which `read_tokenizer` and transformers read."""
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **self._specials}
        if self.chat_template:
            settings["chat_template"] = self.chat_template
        folder.mkdir(parents=True, exist_ok=True)
        self._backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


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
    for token, kind in zip(tokens, types, strict=True):
        if kind == _CONTROL_TOKEN:
            backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif kind == _USER_TOKEN:
            backend.add_tokens([AddedToken(token, special=False, normalized=False)])
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
    try:
        backend = byte_level_bpe(tokens, merges, types)
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise InputError(f"{file.path}: the tokenizer's merges do not fit its tokens ({error})") from error
    return Tokenizer(backend, specials, file.metadata("tokenizer.chat_template", str, ""))


def _from_folder(folder: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"{folder}: no tokenizer.json")
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise InputError(f"{file}: not a tokenizer ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    settings: Any = {}
    file = folder / "tokenizer_config.json"
    try:
        if file.is_file():
            settings = json.loads(file.read_text(encoding="utf-8"))
        template = settings.get("chat_template") or ""
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default", "")
        file = folder / "chat_template.jinja"  # where newer transformers put it
        template = file.read_text(encoding="utf-8") if file.is_file() else str(template)
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise InputError(f"{file}: cannot be read ({error})") from error
    specials = {}
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            specials[name] = token
    return Tokenizer(backend, specials, template)
