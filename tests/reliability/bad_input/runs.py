"""Run directories in disrepair, and results that are none."""

from __future__ import annotations

import json
from typing import Any

from newllm_jax.content import sealed
from tests.reliability.bad_input.case import FOLDER, GONE, PIPE, Case, Link
from tests.reliability.bad_input.files import change, cut

COMMAND = {"train": "train", "cascade": "cascade", "finetune": "finetune"}


def _run(says: str, kind: Any, files: dict[str, Any], *typed: str) -> Case:
    """`typed` on a damaged run; by default what reads or continues it."""
    return Case(says, typed, files={f"run/{name}": content for name, content in files.items()}, run=kind)


def entry(value: Any, *path: Any) -> Any:
    """A results.json with one entry replaced, and sealed again."""

    def changed(before: bytes) -> bytes:
        results = json.loads(before)
        del results["sha256"]
        inner = results
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        return json.dumps(sealed(results)).encode()

    changed.__doc__ = f"{'.'.join(map(str, path))} = {value!r}"
    return changed


def without(*path: Any) -> Any:
    """A results.json without one entry, and sealed again."""

    def changed(before: bytes) -> bytes:
        results = json.loads(before)
        del results["sha256"]
        inner = results
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return json.dumps(sealed(results)).encode()

    changed.__doc__ = f"without {'.'.join(map(str, path))}"
    return changed


def _results(says: str, kind: Any, content: Any) -> list[Case]:
    """Both commands that read results."""
    return [_run(says, kind, {"results.json": content}, command, "run") for command in ("report", "compare")]


RESUME = {kind: (kind, "--resume", "run") for kind in COMMAND}

OTHER_DATA = "dataset: corpus.txt is not what the run was trained on (fingerprint"
OTHER_CORPUS = {"../corpus.txt": "".join(f"other words than those of the run, line {line}\n" for line in range(99))}

BOTH = ("config.json", "checkpoints/config.json")

RUNS = [
    # What is exported
    _run("an exported model, not a run directory", "exported", {}, *RESUME["train"]),
    _run("an exported model, not a run directory", "exported", {}, "report", "run"),
    *(_run("model.safetensors: damaged, or changed after it was exported", kind, {"model.safetensors": cut}, *typed)
      for kind in ("exported", "exported_finetune") for typed in (("generate", "run"), ("evaluate", "run"))),
    _run("vocabulary.json: damaged, or changed", "exported", {"vocabulary.json": "[]"}, "generate", "run"),
    *(_run(f"{name}: cannot be read (No such file", kind, {name: GONE}, "generate", "run") for kind, name in (
        ("exported", "vocabulary.json"), ("exported", "model.safetensors"), ("exported_finetune", "config.json"),
        ("exported_finetune", "tokenizer.json"))),
    _run("vocabulary.json: not a regular file", "exported", {"vocabulary.json": PIPE}, "generate", "run"),
    _run("config.json: damaged, or changed", "exported_finetune", {"config.json": "{}"}, "generate", "run"),
    _run("newllm.json: not valid JSON", "exported", {"newllm.json": cut}, "generate", "run"),
    _run("newllm.json: not the description of an exported model", "exported", {"newllm.json": "{}"}, "generate", "run"),
    _run("newllm.json: damaged (its content does not fit", "exported", {"newllm.json": change(system="cascade")},
         "generate", "run"),
    *(_run(f"newllm.json: damaged ({says}", "exported", {"newllm.json": entry(value, *path)}, "generate", "run")
      for says, value, *path in (
        ("epoch: None is not", None, "export", "epoch"),
        ("files are names", {"../x": ""}, "export", "files"),
        ("files are names", 5, "export", "files"),
      )),
    _run("newllm.json: not the description", "exported", {"newllm.json": entry(5, "export")}, "generate", "run"),
    _run("model.safetensors: tensor ... expected F32", "exported", {"newllm.json": entry(9, "config", "hidden_dim")},
         "generate", "run"),
    # Run directories
    *(_run("not a run directory (it has no config.json)", "train", dict.fromkeys(BOTH, GONE), *typed)
      for typed in (RESUME["train"], ("generate", "run"), ("evaluate", "run"), ("report", "run"), ("compare", "run"))),
    *(_run("not a run directory (it has no config.json)", "train", dict.fromkeys(BOTH, content), "generate", "run")
      for content in (FOLDER, PIPE)),
    *(_run(f"not a {name} run", kind, {}, command, "--resume", "run") for kind, command, name in (
        ("train", "cascade", "cascade"), ("cascade", "finetune", "finetune"), ("finetune", "train", "new-llm"))),
    *(_run("learning_rate: run was trained with", kind, {}, *RESUME[kind], "--learning_rate=0.77") for kind in COMMAND),
    _run(OTHER_DATA, "train", OTHER_CORPUS, *RESUME["train"]),
    _run(OTHER_DATA, "train", OTHER_CORPUS, "evaluate", "run"),
    _run("num_epochs: ... has 3 epochs already, not 1", "train", {}, *RESUME["train"], "--num_epochs=1"),
    *(_run("no checkpoint", "train", {"checkpoints": content}, command, "run")
      for content in (GONE, FOLDER, PIPE, "file") for command in ("generate", "evaluate")),
    _run("has no trained stage yet", "cascade", {"checkpoints": GONE}, "generate", "run"),
    _run("has no checkpoint", "finetune", {"checkpoints": GONE}, "generate", "run"),
    *(_run("checkpoints: is a link", kind, {"checkpoints": Link("../elsewhere"), "../elsewhere": FOLDER}, *RESUME[kind])
      for kind in COMMAND),
    _run("metrics.jsonl: is a link", "train", {"metrics.jsonl": Link("../corpus.txt")}, *RESUME["train"]),
    _run("curves.png: is a link", "train", {"curves.png": Link("../corpus.txt")}, "report", "run"),
    _run(".lock: is a link", "train", {".lock": Link("../corpus.txt")}, *RESUME["train"]),
    _run("extraction: is a link", "cascade", {"extraction": Link("..")}, *RESUME["cascade"]),
    _run("run/.lock: Is a directory", "train", {".lock": FOLDER}, *RESUME["train"]),
    *(_run(f"run/{name}: Is a directory", "train", {name: FOLDER}, "report", "run")
      for name in ("report.md", "report.html")),
    *(_run("run ... vocabulary.json", "train", {"vocabulary.json": content}, "generate", "run")
      for content in ("5", "[]", '["a", "b"]', "{", "", "null", b"\xff", FOLDER, PIPE, GONE, cut)),
    *(case for content in ("5", "[]", "null", '"x"', "", "{", b"\xff\xfe", "[" * 100_000, FOLDER, PIPE)
      for case in _results("run/results.json: ", "train", content)),
    *_results("has no results.json", "train", GONE),
    *_results("run/results.json: ", "train", cut),
    *_results("no results of a run", "train", json.dumps(sealed({}))),
    *_results("no results of a run", "train", json.dumps(sealed({"system": "chess"}))),
    *_results("best.val_ppl: 'x' is not a number or none", "train", entry("x", "best", "val_ppl")),
    *_results("best.epoch: 1.5 is not an integer", "train", entry(1.5, "best", "epoch")),
    *_results("epochs: is missing", "train", without("epochs")),
    *_results("epochs: must be a list that is not empty, not []", "train", entry([], "epochs")),
    *_results("epochs[1]: must be an object, not 5", "train", entry(5, "epochs", 1)),
    *_results("epochs[0].train_loss: None is not a number", "train", entry(None, "epochs", 0, "train_loss")),
    *_results("epochs[0].seconds: True is not a number", "train", entry(True, "epochs", 0, "seconds")),
    *_results("parameters: '7' is not an integer", "train", entry("7", "parameters")),
    *_results("test: must be an object, not None", "train", entry(None, "test")),
    *_results("environment.device: 5 is not a text", "train", entry(5, "environment", "device")),
    *_results("samples[0].epoch: 1.5 is not an integer", "train", entry([{"epoch": 1.5}], "samples")),
    *_results("samples[0].text: must be a text, not 5", "train",
              entry([{"epoch": 1, "prompt": "", "text": 5}], "samples")),
    *_results("example.tokens: must be a list that is not empty, not []", "cascade",
              entry({"tokens": [], "exits": []}, "example")),
    *_results("example.exits: must be one for each of the 2 tokens, not 1", "cascade",
              entry({"tokens": ["a", "b"], "exits": [0]}, "example")),
    *_results("example.exits: must be 0 or more, not -1", "cascade",
              entry({"tokens": ["a"], "exits": [-1]}, "example")),
    *_results("ensemble[].flops: 'x' is not a number", "cascade", entry("x", "ensemble", 0, "flops")),
    *_results("epochs[0].grad_norm: is missing", "train", without("epochs", 0, "grad_norm")),
    *_results("name: must be a text without control characters", "train", entry("a\nb", "name")),
    *_results("config: must be an object, not []", "finetune", entry([], "config")),
    *_results("base.layers: is missing", "finetune", without("base", "layers")),
    *_results("stages: must be a list that is not empty, not None", "cascade", entry(None, "stages")),
    *_results("stages[0].threshold: '0.1' is not a number", "cascade", entry("0.1", "stages", 0, "threshold")),
    *_results("stages: must be numbered from 1", "cascade", entry(7, "stages", 0, "stage")),
    *_results("ensemble: must be a list that is not empty, not {}", "cascade", entry({}, "ensemble")),
    *_results("ensemble[0].exit_rates: must be a list", "cascade", entry("all", "ensemble", 0, "exit_rates")),
    *_results("ensemble[0].exit_groups[0].tokens: None is not", "cascade",
              entry(None, "ensemble", 0, "exit_groups", 0, "tokens")),
    Case("some.json: no results of a run", ("compare", "some.json"), files={"some.json": "5"}),
    Case("some.json: no results of a run", ("compare", "some.json"), files={"some.json": "{}"}),
    Case("some.json", ("compare", "some.json"), files={"some.json": b"\x80"}),
    Case("pipe.json: not a run directory", ("compare", "pipe.json"), files={"pipe.json": PIPE}),
]  # fmt: skip
