"""`--help`: settings in groups, with the defaults of the configuration that is named."""

import dataclasses
import re
from typing import get_args

import pytest

from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig
from newllm_jax.config.base import Group

CONFIGS = (NewLLMConfig, CascadeConfig, FinetuneConfig)


@pytest.fixture
def help_of(newllm, capsys):
    """The help of a command, its line breaks undone."""

    def printed(*typed: str) -> str:
        with pytest.raises(SystemExit) as left:
            newllm(*typed, "--help")
        assert left.value.code == 0
        return re.sub(r"\s+", " ", capsys.readouterr().out)

    return printed


@pytest.mark.parametrize("config", CONFIGS)
def test_every_setting_has_a_group_and_keeps_that_of_the_class_above(config):
    for field in dataclasses.fields(config):
        assert field.metadata["group"] in get_args(Group), field.name
        for above in config.__mro__[1:]:
            if own := getattr(above, "__dataclass_fields__", {}).get(field.name):
                assert own.metadata["group"] == field.metadata["group"], field.name


def test_defaults_are_those_of_the_configuration(help_of):
    plain, advanced = help_of("train"), help_of("train", "--config", "advanced")
    assert "number of feed-forward layers (default 6)" in plain
    assert "number of feed-forward layers (default 12)" in advanced
    assert "one after another (default 0.5,1.0,2.0)" in plain
    assert "none: the whole batch (default none)" in plain
    assert "lower-cased (default true)" in plain
    own = help_of("finetune", "--config=lora")
    assert "on its frozen kernels (default lora)" in own


def test_groups_stand_in_their_order(help_of):
    page = help_of("cascade")
    titles = ["run:", "data:", "model:", "stages:", "stage design:", "regularisation:", "optimisation:", "training:",
              "memory and devices:", "files:"]  # fmt: skip
    places = [page.index(f" {title} ") for title in titles]
    assert places == sorted(places)
    assert places[2] < page.index("--base_model VALUE") < places[3]
    assert "stages:" not in help_of("train")
