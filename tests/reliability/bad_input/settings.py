"""Settings, as options of the training commands: each one with values of every wrong kind."""

from __future__ import annotations

import dataclasses
import typing

from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig
from newllm_jax.config.parsing import field_types
from tests.reliability.bad_input.case import Case

COMMANDS = {"train": NewLLMConfig, "cascade": CascadeConfig, "finetune": FinetuneConfig}
HUGE = "1" + "0" * 400
WRONG = {  # by type: what is typed, and what the error says of it
    int: [("", "'' is not an integer"), ("many", "'many' is not an integer"), ("2.5", "'2.5' is not an integer"),
          ("-1", "not -1"), (HUGE, "not 10000"), ("9" * 5000, "is not an integer"), ("1e3", "'1e3' is not an integer")],
    float: [("", "'' is not a number"), ("fast", "'fast' is not a number"), ("nan", "not nan"), ("inf", "not inf"),
            ("-1", "not -1.0"), (HUGE, "not inf"), ("1e39", "not 1e+39")],
    bool: [("", "'' is not true or false"), ("maybe", "'maybe' is not true or false"), ("1", "'1' is not true or")],
    str: [("\udcff", "control characters"), ("a\nb", "control characters"), ("x" * 5000, "characters, not 'xxx")],
}  # fmt: skip
RIGHT = {("forget_bias", "-1")}  # which is not wrong
LISTS = [("x", "'x' is not a list"), ("1,x", "'1,x' is not a list"), ("-1", "not (-1"), (HUGE, "must be ")]


def _wrong(config_class: type, name: str) -> list[tuple[str, str]]:
    declared = field_types(config_class)[name]
    if typing.get_origin(declared) is typing.Literal:
        return [("", "must be one of"), ("maybe", "must be one of")]
    if typing.get_origin(declared) is tuple:
        return LISTS
    types = typing.get_args(declared) or (declared,)
    return [wrong for wrong in WRONG[types[0]] if (name, wrong[0]) not in RIGHT]


def _cases() -> list[Case]:
    cases, seen = [], set[str]()
    for command, config_class in COMMANDS.items():
        for field in dataclasses.fields(config_class):
            wrong = _wrong(config_class, field.name)
            # A setting that several systems share is checked by the same line: one value each will do for the others.
            for value, says in wrong[:1] if field.name in seen else wrong:
                if field.name == "time_limit":
                    says = "must be a"
                cases.append(Case(f"error: {field.name}: ... {says}", (command, f"--{field.name}={value}")))
            seen.add(field.name)
    return cases


def _train(says: str, *typed: str) -> Case:
    return Case(says, ("train", *typed))


SETTINGS = [
    *(case for case in _cases() if case.typed[-1] not in ("--dataset_config=", "--mirror=")),  # these may be empty
    _train("dataset: must be a text of 1 to 4096 characters, not ''", "--dataset", ""),
    Case("base_model: must be a text of 1 to 4096 characters, not ''", ("cascade", "--base_model", "")),
    _train("num_layers: must be from 1 to 256, not 100000", "--num_layers", "100000"),
    _train("sequence_length: must be from 3 to 1048576, not 1000000000", "--sequence_length", "1000000000"),
    _train("batch_size: must be from 1 to 1048576, not 10000000", "--batch_size", "10000000"),
    _train("hidden_dim: must be from 1 to 65536, not 100000000000000000000", "--hidden_dim", "1" + "0" * 20),
    _train("warmup_steps: must be from 0 to 2147483647", "--warmup_steps", "1" + "0" * 23),
    _train("decay_epochs: must be from 1 to 30000", "--decay_epochs", "1" + "0" * 23),
    _train("clip_epochs: must be from 1 to 30000", "--clip_epochs", "100000000000000000000,100000000000000000001"),
    _train("clip_norms: must be above 0 and at most 1e+30", "--clip_norms", "1e39,1,1"),
    _train("clip_norms: must be above 0", "--clip_norms", "1,0,1"),
    _train("clip_norms: must be 1 to 100 numbers", "--clip_norms", ",".join(["1"] * 5000)),
    _train("clip_norms: must be 1 to 100 numbers", "--clip_norms", ""),
    _train("clip_epochs: must be 2 rising epochs", "--clip_epochs", "30,10"),
    _train("clip_epochs: must be 2 rising epochs", "--clip_epochs", "10"),
    _train("stride: must be at most sequence_length (16), not 17", "--sequence_length", "16", "--stride", "17"),
    _train("learning_rate: must be above 0 and at most 1e+30, not 1e+39", "--learning_rate", "1e39"),
    _train("dropout: must be at least 0 and below 1, not 1.0", "--dropout", "1"),
    _train("word_dropout: must be at least 0 and below 1, not 1.0", "--word_dropout", "1"),
    _train("forget_bias: must be from -100 to 100, not 101.0", "--forget_bias", "101"),
    _train("micro_batch: must be none where text is a stream", "--text", "stream", "--micro_batch", "2"),
    _train("vocabulary_size: must be from 5 to 65536, not 65537", "--vocabulary_size", "65537"),
    _train("time_limit: must be a time above 0", "--time_limit", "-5h"),
    _train("time_limit: must be a time above 0", "--time_limit", "1e400h"),
    _train("save_minutes: must be above 0", "--save_minutes", "0"),
    _train("micro_batch: must be at most batch_size (32), or none, not 33", "--micro_batch", "33"),
    _train("auto_batch: does not go with micro_batch", "--micro_batch", "3", "--auto_batch"),
    _train("auto_batch: does not go with --resume", "--resume", "x", "--auto_batch"),
    _train("--deterministic: ignored explicit argument '5'", "--deterministic=5"),
    _train("precision: bf16 needs an NVIDIA GPU", "--precision", "bf16", "--dataset", "corpus.txt"),
    Case("hard_ratio: must be above 0 and below 1, not 1.0", ("cascade", "--hard_ratio", "1")),
    Case("train_chunks: must be from 1 to 100000000", ("cascade", "--train_chunks", "1" + "0" * 22)),
    Case("stage_layers: must be from 1 to 1000, not 100000", ("cascade", "--stage_layers", "100000")),
    Case("memory: the run needs at least",
         ("train", "--dataset=corpus.txt", "--batch_size=1048576", "--hidden_dim=2000")),
    Case("lower hidden_dim, context_dim, embed_dim or num_layers (",
         ("train", "--dataset=corpus.txt", "--hidden_dim=65536", "--num_layers=256", "--dry_run")),
    Case("lower micro_batch or batch_size (",
         ("finetune", "--dataset=rows.jsonl", "--base_model=base", "--batch_size=1048576", "--train_chunks=8",
          "--validation_chunks=5")),
    Case("lower micro_batch, batch_size or sequence_length (",
         ("train", "--dataset=corpus.txt", "--sequence_length=100000", "--batch_size=100000")),
    Case("num_stages: no hard tokens are left", ("cascade", "--dataset=rows.jsonl", "--base_model=base",
                                                 "--train_chunks=1", "--validation_chunks=1", "--num_stages=1000")),
]  # fmt: skip
