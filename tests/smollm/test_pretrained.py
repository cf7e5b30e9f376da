"""From a source's name to a model that can be called."""

import json

import jax
import numpy as np
import pytest

from newllm_jax.errors import InputError
from newllm_jax.smollm.pretrained import load_smollm2
from newllm_jax.smollm.tokenizer import Tokenizer, byte_level_bpe
from newllm_jax.smollm.weights import save_model


@pytest.fixture
def folder(golden, tmp_path):
    save_model(tmp_path, golden.config, golden.params)
    Tokenizer(byte_level_bpe([f"t{i}" for i in range(61)], [], [1] * 61)).save(tmp_path)
    return tmp_path


def test_folder(golden, folder):
    base = load_smollm2(str(folder))
    logits, _ = jax.jit(base.model.apply)({"params": base.params}, golden["ids"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=2e-5, atol=2e-5)
    assert base.tokenizer.vocab_size == 61
    assert base.source.used == str(folder) and not base.source.fallback


def test_tokenizer_of_another_model(folder):
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "vocab_size": 60}))
    with pytest.raises(InputError, match="the tokenizer has 61 ids, the model only 60"):
        load_smollm2(str(folder))
