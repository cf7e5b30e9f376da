"""The architecture of a Llama, from and to the `config.json` of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from newllm_jax.errors import InputError

# What a config.json may say in one way only here; any other value would change the numbers, so it is refused.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "rope_interleaved": (False,),
    "partial_rotary_factor": (1, None),
    "quantization_config": (None,),
}
_SIZES = {  # field -> key of config.json
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_position": "max_position_embeddings",
}
_LARGEST, _MOST_LAYERS = 100_000_000, 10_000  # far above any model; a corrupt file can say more


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults are those of SmolLM2-135M.

    `max_position` is the longest text the model was trained on, and the longest that is generated.
    """

    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536
    num_layers: int = 30
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    rope_theta: float = 100000.0
    rms_norm_eps: float = 1e-5
    max_position: int = 8192
    tie_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in (*_SIZES, "head_dim", "rope_theta", "rms_norm_eps"):
            largest = _MOST_LAYERS if name == "num_layers" else _LARGEST
            if not 0 < getattr(self, name) <= largest:
                raise InputError(f"{name}: must be above 0 and at most {largest}, not {getattr(self, name)}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(f"num_heads: {self.num_heads} is no multiple of num_kv_heads, {self.num_kv_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim: must be even for rotary positions, not {self.head_dim}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], source: str = "config.json") -> Self:
        """The configuration that a `config.json` holds, in the form of any transformers version.

        Keys that do not change the forward pass are ignored; one that would must have the value implemented here.

        Args:
          settings: the parsed file.
          source: the file's name, for errors.

        Raises:
          InputError: another architecture, a missing key, a wrong type, or a variant that is not implemented (scaled
            rotary positions, another activation, biases, quantised weights).
        """
        try:
            return cls(**_fields(settings))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """The `config.json` with which transformers loads the model."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **{key: getattr(self, field) for field, key in _SIZES.items()},
            "head_dim": self.head_dim,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            **{
                key: allowed[0]
                for key, allowed in _FIXED.items()
                if key in ("hidden_act", "attention_bias", "mlp_bias")
            },
            "torch_dtype": "float32",
        }


def _fields(settings: Mapping[str, Any]) -> dict[str, Any]:
    architectures = settings.get("architectures") or ["LlamaForCausalLM"]
    if settings.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        found = settings.get("model_type") or architectures
        raise InputError(f"architecture {found!r} is not supported, only Llama (LlamaForCausalLM) is")
    for key, allowed in _FIXED.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise InputError(f"{key} {settings[key]!r} is not supported, only {allowed[0]!r} is")
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):  # the second since transformers 5, with rope_theta inside
        part = settings.get(key) or {}
        if not isinstance(part, dict):
            raise InputError(f"{key}: {part!r} is not a table")
        rope |= part
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default":
        raise InputError(f"rotary scaling {scaling!r} is not supported")
    flat = {"tie_word_embeddings": False, **settings}  # transformers' own default
    flat["rope_theta"] = rope.get("rope_theta", settings.get("rope_theta"))
    flat["num_key_value_heads"] = settings.get("num_key_value_heads") or settings.get("num_attention_heads")
    fields: dict[str, Any] = {field: _typed(flat, key, int) for field, key in _SIZES.items()}
    if flat.get("head_dim") is None:
        if fields["num_heads"] < 1 or fields["hidden_size"] % fields["num_heads"]:
            raise InputError(f"hidden_size {fields['hidden_size']} is no multiple of {fields['num_heads']} heads")
        flat["head_dim"] = fields["hidden_size"] // fields["num_heads"]
    return {
        **fields,
        "head_dim": _typed(flat, "head_dim", int),
        "rope_theta": _typed(flat, "rope_theta", float),
        "rms_norm_eps": _typed(flat, "rms_norm_eps", float),
        "tie_embeddings": _typed(flat, "tie_word_embeddings", bool),
    }


def _typed(settings: Mapping[str, Any], key: str, kind: type) -> Any:
    value = settings.get(key)
    if value is None:
        raise InputError(f"{key} is missing")
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number if kind is float else type(value) is kind):
        raise InputError(f"{key}: {value!r} is not {'a number' if kind is float else kind.__name__}")
    return kind(value)
