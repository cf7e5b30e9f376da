"""Adapters as a folder for `peft`: its own names, settings and numbers, from a golden file and from the package."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from newllm_jax.smollm.adapter_file import CONFIG, TENSORS, save_adapter
from newllm_jax.smollm.lora import adapter_shapes, init_adapters, merge_adapters
from newllm_jax.smollm.model import SmolLM2, take_layers
from newllm_jax.smollm.weights import save_model

pytestmark = pytest.mark.quick
LAYERS = {"all": [0, 1, 2], "last": [1, 2]}  # of the golden Llama's three


@pytest.fixture(scope="module")
def peft_golden():
    with np.load(Path(__file__).with_name("golden_adapter.npz")) as file:
        return dict(file)


def tensors_of(golden, name):
    start = f"{name}/tensors/"
    return {key.removeprefix(start): values for key, values in golden.items() if key.startswith(start)}


def adapters_of(tensors, config, layers):
    """The tensors of `peft` as ours."""
    return {
        part: {
            kernel: {
                letter.lower(): jnp.stack([
                    tensors[f"base_model.model.model.layers.{layer}.{module}.{kernel}.lora_{letter}.weight"].T
                    for layer in layers
                ])
                for letter in "AB"
            }
            for kernel in kernels
        }
        for (part, kernels), module in zip(adapter_shapes(config).items(), ("self_attn", "mlp"), strict=True)
    }  # fmt: skip


def adapted_logits(golden, adapters, layers):
    """The logits of the golden Llama with adapters on its last layers."""
    first = layers[0]
    upper, params = take_layers(golden.config, golden.params, first, golden.config.num_layers)
    states = golden.model.apply({"params": golden.params}, golden["ids"], depths=(first,), method="hidden")
    params, model = {"params": merge_adapters(params, adapters)}, SmolLM2(upper)
    last = model.apply(params, states.at_depths[0], method="from_hidden").last
    return model.apply(params, last, method="logits")


@pytest.mark.parametrize("name", LAYERS)
def test_logits_are_those_of_peft(golden, peft_golden, name):
    adapters = adapters_of(tensors_of(peft_golden, name), golden.config, LAYERS[name])
    logits = adapted_logits(golden, adapters, LAYERS[name])
    np.testing.assert_allclose(logits, peft_golden[f"{name}/logits"], rtol=2e-4, atol=2e-4)
    without = adapted_logits(golden, jax.tree.map(jnp.zeros_like, adapters), LAYERS[name])
    assert np.abs(without - logits).max() > 1


@pytest.mark.parametrize("name", LAYERS)
def test_the_folder_is_what_peft_saves(golden, peft_golden, tmp_path, name):
    expected = tensors_of(peft_golden, name)
    save_adapter(tmp_path, adapters_of(expected, golden.config, LAYERS[name]), None, 3)
    tensors = load_file(tmp_path / TENSORS)
    assert tensors.keys() == expected.keys()
    for tensor, values in tensors.items():
        np.testing.assert_array_equal(values, expected[tensor])
        assert values.dtype == np.float32
    settings, saved = json.loads(peft_golden[f"{name}/config"].item()), json.loads((tmp_path / CONFIG).read_text())
    assert saved == {key: settings[key] for key in saved}
    assert {"peft_type", "task_type", "r", "lora_alpha", "target_modules", "layers_to_transform"} <= saved.keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, TENSORS]


def test_the_base_is_named(golden, tmp_path):
    save_adapter(tmp_path, init_adapters(golden.config, 2, jax.random.key(0)), "some/base", 3)
    assert json.loads((tmp_path / CONFIG).read_text())["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize("name", LAYERS)
def test_peft_loads_the_folder(golden, tmp_path, name):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    layers = LAYERS[name]
    adapters = init_adapters(replace(golden.config, num_layers=len(layers)), 5, jax.random.key(0))
    adapters = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(1), leaf.shape), adapters)
    save_model(tmp_path / "base", golden.config, golden.params)
    save_adapter(tmp_path / "adapter", adapters, str(tmp_path / "base"), 3)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    with torch.no_grad():
        logits = model(torch.from_numpy(golden["ids"])).logits.numpy()
    np.testing.assert_allclose(adapted_logits(golden, adapters, layers), logits, rtol=2e-4, atol=2e-4)
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))  # finds its base by itself
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.from_numpy(golden["ids"])).logits.numpy(), logits, atol=1e-5)
