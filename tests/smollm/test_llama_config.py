"""config.json to a configuration and back."""

import pytest

from newllm_jax.errors import InputError
from newllm_jax.smollm.llama_config import LlamaConfig

SMOLLM2_135M = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_interleaved": False,
    "rope_scaling": None,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 49152,
}


def test_published_config():
    assert LlamaConfig.from_dict(SMOLLM2_135M) == LlamaConfig()


def test_form_of_transformers_5():
    settings = {key: value for key, value in SMOLLM2_135M.items() if not key.startswith("rope")}
    settings["rope_parameters"] = {"rope_theta": 100000.0, "rope_type": "default"}
    assert LlamaConfig.from_dict(settings) == LlamaConfig()


def test_defaults_that_transformers_has():
    settings = {key: value for key, value in SMOLLM2_135M.items() if key != "tie_word_embeddings"}
    settings["num_key_value_heads"] = None
    config = LlamaConfig.from_dict(settings)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (9, 64, False)


def test_round_trip():
    config = LlamaConfig(num_layers=8, head_dim=32, tie_embeddings=False, rope_theta=130000.0)
    assert LlamaConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gemma"}, "architecture 'gemma' is not supported"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architecture .* is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu' is"),
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved True is not supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rotary scaling 'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rotary scaling 'llama3' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rotary scaling 'yarn' is not supported"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is not a table"),
        ({"quantization_config": {"bits": 4}}, "quantization_config .* is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"rope_theta": None}, "rope_theta is missing"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers: '30' is not int"),
        ({"num_hidden_layers": True}, "num_hidden_layers: True is not int"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps: 'small' is not a number"),
        ({"rope_theta": True}, "rope_theta: True is not a number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1 is not bool"),
        ({"num_hidden_layers": 0}, "num_layers: must be above 0 and at most .*, not 0"),
        ({"num_hidden_layers": 10**9}, "num_layers: must be above 0 and at most .*, not 1000000000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: must be above 0"),
        ({"num_key_value_heads": 4}, "num_heads: 9 is no multiple of num_kv_heads, 4"),
        ({"num_attention_heads": 10}, "hidden_size 576 is no multiple of 10 heads"),
        ({"head_dim": 63}, "head_dim: must be even"),
    ],
)
def test_what_is_not_supported(change, message):
    with pytest.raises(InputError, match=f"^folder/config.json: {message}") as raised:
        LlamaConfig.from_dict({**SMOLLM2_135M, **change}, "folder/config.json")
    assert "\n" not in str(raised.value)
