"""Settings: typed, checked, and every mistake named."""

from __future__ import annotations

import dataclasses
import json
import math
import typing

import numpy as np
import pytest

from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, config_names, load_config, parse
from newllm_jax.config.parsing import field_types
from newllm_jax.errors import InputError
from newllm_jax.newllm.model import DROPOUTS


def test_published_configurations():
    baseline, advanced, ctx1024 = (load_config(name) for name in ("baseline", "advanced", "ctx1024"))
    assert (baseline.context_dim, baseline.num_layers, baseline.batch_size) == (256, 6, 32)
    assert (advanced.context_dim, advanced.num_layers, advanced.batch_size) == (512, 12, 512)
    assert (ctx1024.context_dim, ctx1024.num_layers, ctx1024.batch_size) == (1024, 12, 512)
    for config in (baseline, advanced, ctx1024):
        assert (config.embed_dim, config.hidden_dim, config.vocabulary_size) == (256, 512, 1000)
        assert (config.learning_rate, config.dropout, config.patience, config.minimum_gain) == (1e-4, 0.1, 15, 0.001)
        assert (config.clip_norms, config.clip_epochs) == ((0.5, 1.0, 2.0), (10, 30))


def test_every_configuration_file_loads():
    assert {"quickstart", "baseline", "advanced", "ctx1024"} <= set(config_names("newllm"))
    assert {"lora", "last8", "pruned"} <= set(config_names("finetune"))
    for config_class in CONFIGS:
        for name in config_names(config_class.configurations):
            assert isinstance(load_config(name, config_class=config_class), config_class)


def test_recipes_have_the_sizes_that_they_promise():
    from newllm_jax.newllm.plan import parameter_count

    for name, words, most in (("baseline_plus", 1000, 2_750_000), ("advanced_plus", 1000, 5_000_000),
                              ("wikitext2", 33_280, 33_000_000)):  # fmt: skip
        config = load_config(name)
        assert most / 2 < parameter_count(config, words) <= most
        assert config.vocabulary_size == (1000 if words == 1000 else None)


def test_none_in_a_toml_file_is_no_value_where_a_setting_can_have_none(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('micro_batch = "none"\ntracker = "none"\n')
    config = load_config(file)
    assert (config.micro_batch, config.tracker) == (None, "none")
    file.write_text('batch_size = "none"\n')
    with pytest.raises(InputError, match="batch_size: 'none' is not an integer"):
        load_config(file)


def test_round_trip_through_json():
    config = load_config("advanced", {"decay_epochs": 100, "clip_norms": [1.0], "clip_epochs": []})
    assert NewLLMConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_overrides_replace_the_file_and_nothing_else():
    changed = load_config("advanced", {"batch_size": 256})
    assert changed == dataclasses.replace(load_config("advanced"), batch_size=256)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bach_size": 3}, "bach_size: no such field; did you mean batch_size?"),
        ({"batch_size": "3"}, "batch_size: '3' is not an integer"),
        ({"batch_size": 3.5}, "batch_size: 3.5 is not an integer"),
        ({"batch_size": True}, "batch_size: True is not an integer"),
        ({"learning_rate": "fast"}, "learning_rate: 'fast' is not a number"),
        ({"dataset": 3}, "dataset: 3 is not a text"),
        ({"batch_size": 0}, "batch_size: must be from 1 to 1048576, not 0"),
        ({"batch_size": 10**20}, "batch_size: must be from 1 to 1048576, not 100000000000000000000"),
        ({"learning_rate": -1.0}, "learning_rate: must be above 0 and at most 1e+30, not -1.0"),
        ({"learning_rate": float("nan")}, "learning_rate: must be above 0"),
        ({"vocabulary_size": 4}, "vocabulary_size: must be from 5 to 65536, not 4"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and below 1, not 1.0"),
        ({"schedule": "cosin"}, "schedule: must be one of constant, cosine, not 'cosin'"),
        ({"clip_epochs": [30, 10]}, "clip_epochs: must be 2 rising epochs"),
        ({"clip_norms": [0.5]}, "clip_epochs: must be 0 rising epochs"),
        ({"stride": 65}, "stride: must be at most sequence_length (64), not 65"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(InputError) as caught:
        load_config("baseline", settings)
    assert message in str(caught.value)


@pytest.mark.parametrize("layers", [(3,), (4, 4), (20, 14), (1, 2, 3)])
def test_dropped_layers_are_a_range(layers):
    with pytest.raises(InputError, match="dropped_layers: must be empty, or the first layer that is left out and a "):
        FinetuneConfig(dropped_layers=layers)


def test_a_rank_without_adapters_is_no_mistake():
    assert FinetuneConfig(rank=8).adapter == "none"
    with pytest.raises(InputError, match="rank: must be from 1 to 1024, not 0"):
        FinetuneConfig(rank=0)


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("11h", 39600), ("90m", 5400), ("3600s", 3600), ("3600", 3600), ("0.5H", 1800), (None, math.inf)],
)
def test_a_time_limit_has_a_unit(limit, seconds):
    assert NewLLMConfig(time_limit=limit).limit_seconds == seconds


@pytest.mark.parametrize("limit", ["", "h", "0", "0h", "-1h", "nan", "inf", "1e400", "1d", "1h30m"])
def test_what_is_no_time_limit(limit):
    with pytest.raises(InputError, match="^time_limit: must be "):
        NewLLMConfig(time_limit=limit)


CONFIGS = [NewLLMConfig, CascadeConfig, FinetuneConfig]
WRONG = [
    None,
    True,
    "x",
    [],
    {},
    object(),
    1.5,
    -1,
    math.nan,
    math.inf,
    10**400,
    -(10**400),
    10**5000,
    "a\0b",
    "\udcff",
]
ACCEPTED = {str: "x", float: 1.5, bool: True}  # of these values, by the type of a setting
NARROWER = {"hard_ratio", "flops", "time_limit", "ema_decay", *DROPOUTS}  # which refuse some values of their types
SIGNED = {"forget_bias"}  # which may be below 0
EMPTY = {"dropped_layers", "skipped_layers"}  # lists that may be


@pytest.mark.parametrize("config_class", CONFIGS)
@pytest.mark.parametrize("wrong", WRONG, ids=lambda value: str(type(value)))
def test_every_setting_refuses_what_it_cannot_be(config_class, wrong):
    for name, declared in field_types(config_class).items():
        optional = type(None) in typing.get_args(declared)
        declared = typing.get_args(declared)[0] if optional else declared
        narrower = name in NARROWER or (config_class, name) == (CascadeConfig, "recompute")
        accepted = [] if narrower else [ACCEPTED[declared]] if declared in ACCEPTED else []
        accepted += [-1] if name in SIGNED else []
        fits = (wrong is None and optional) or (wrong == [] and name in EMPTY)
        if fits or any(wrong is value for value in accepted):
            config_class(**{name: wrong})
            continue
        with pytest.raises(InputError) as raised:
            config_class(**{name: wrong})
        assert str(raised.value).startswith(f"{name}: ") and len(str(raised.value)) < 400


def test_settings_have_their_declared_types():
    config = NewLLMConfig(seed=np.int64(3), learning_rate=1, clip_norms=[np.float32(0.5), 1], clip_epochs=[np.uint8(7)])
    assert config == NewLLMConfig(seed=3, learning_rate=1.0, clip_norms=(0.5, 1.0), clip_epochs=(7,))
    types = [type(value) for value in (config.seed, config.learning_rate, config.clip_norms[0], config.clip_epochs[0])]
    assert types == [int, float, float, int]
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()


@pytest.mark.parametrize("name", ["system", "resumable", "", "a\nb", 5, None])
def test_what_is_no_setting(name):
    with pytest.raises(InputError, match="no such field"):
        NewLLMConfig.from_dict({name: 1})


@pytest.mark.parametrize("settings", [5, None, "seed", [("seed", 1)]])
def test_what_is_no_table_of_settings(settings):
    with pytest.raises(InputError, match="settings: must be a table of settings by name"):
        NewLLMConfig.from_dict(settings)


def test_bad_configurations_are_named(tmp_path):
    with pytest.raises(InputError, match="no configuration 'advnced'; did you mean advanced"):
        load_config("advnced")
    with pytest.raises(InputError, match=r"missing.toml: cannot be read"):
        load_config(str(tmp_path / "missing.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("batch_size = ")
    with pytest.raises(InputError, match="not valid TOML"):
        load_config(str(broken))
    broken.write_text("batch_size = 0")
    with pytest.raises(InputError, match=r"broken.toml: batch_size"):
        load_config(str(broken))


def test_toml_and_json_files_give_the_same(tmp_path):
    (tmp_path / "mine.toml").write_text("batch_size = 64\nclip_norms = [1, 2]\nclip_epochs = [3]\n")
    (tmp_path / "mine.json").write_text('{"batch_size": 64, "clip_norms": [1, 2], "clip_epochs": [3]}')
    toml, json_ = load_config(str(tmp_path / "mine.toml")), load_config(str(tmp_path / "mine.json"))
    assert toml == json_
    assert toml.clip_norms == (1.0, 2.0)


def test_parse_reads_command_line_texts():
    assert parse(NewLLMConfig, "clip_norms", "0.5,2") == (0.5, 2.0)
    assert (parse(NewLLMConfig, "clip_norms", "1"), parse(NewLLMConfig, "clip_epochs", "")) == ((1.0,), ())
    assert parse(NewLLMConfig, "decay_epochs", "none") is None
    assert parse(NewLLMConfig, "decay_epochs", "7") == 7
    assert parse(NewLLMConfig, "learning_rate", "3e-4") == 3e-4
    assert [parse(NewLLMConfig, "tie_embeddings", text) for text in ("true", "False", "1")] == [True, False, "1"]
    assert parse(FinetuneConfig, "dropped_layers", "14,20") == (14, 20)
    assert parse(FinetuneConfig, "trained_layers", "none") is None
    with pytest.raises(InputError, match=r"num_epochs: '3.5' is not an integer"):
        parse(NewLLMConfig, "num_epochs", "3.5")
