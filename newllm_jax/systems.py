"""The three systems, a row each, and what can be done with a run of any of them.

A row names functions as `module:name`, which are imported when they are called: no system pays for another's imports.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from newllm_jax.config import (
    CascadeConfig,
    FinetuneConfig,
    NewLLMConfig,
    RunConfig,
    check,
    checked_path,
)
from newllm_jax.errors import InputError
from newllm_jax.files import whole_file, whole_folder
from newllm_jax.records.directory import EXPORTED, RunDir
from newllm_jax.records.exported import CARD, open_trained
from newllm_jax.records.shape import check_results

if TYPE_CHECKING:
    from newllm_jax.cascade.run import CascadeRun, DesignRun
    from newllm_jax.finetuning.run import FinetuneRun
    from newllm_jax.newllm.run import NewLLMRun

Function: TypeAlias = str  # `module:name`
EXPORTED_FILES = EXPORTED, "*.json", "*.safetensors"  # that a Hub repository must have


@dataclass(frozen=True, kw_only=True)
class System:
    """What the commands and the functions below need to know of a system.

    Attributes:
      command: that trains it.
      config: its settings.
      default: the configuration that its command trains unless told otherwise.
      prefix: what the name of a run begins with, before that of the configuration.
      precision: (config) -> the resolved precision of training.
      warning: (config) -> why this device's fast path, of training or of generation, cannot be used, or "".
      train: (config, name, run_root, resume, overrides, narrate, stop) -> RunResult.
      plan: (config) -> what a run would be.
      restore: (run directory or exported folder) -> the trained model.
      evaluate: (the same) -> measurements of it.
      show: (those) -> text.
      export: (restored run, its directory, empty folder) -> fills the folder with what `restore` reads.
      in_precision: (restored run, precision) -> the run with a model that computes in it.
      generate: (restored run, prompt, max_words, seed, sampling, exits) -> pieces of text.
      generate_all: (restored run, prompts, `Batches`) -> a text for each.
      report: (run directory, results) -> writes the report and the curves, returns the report's path.
      frontier: (run directory, chunks of other texts by name, whether to time generation) -> its entries of a
        frontier; None: it has none.
      separator: what stands between the pieces of a generated text.
      next_steps: (run directory, results) -> commands that make sense next.
      less_memory: what to do where memory runs out in training.
    """

    command: str
    config: type[RunConfig]
    default: str
    prefix: str
    precision: Function
    warning: Function
    train: Function
    plan: Function
    restore: Function
    evaluate: Function
    show: Function
    export: Function
    in_precision: Function
    generate: Function
    generate_all: Function
    report: Function
    frontier: Function | None
    separator: str
    next_steps: Function
    less_memory: str


SYSTEMS = {
    "new-llm": System(
        command="train",
        config=NewLLMConfig,
        default="baseline",
        prefix="",
        precision="newllm_jax.newllm.updates:training_precision",
        warning="newllm_jax.newllm.updates:slow_loop_warning",
        train="newllm_jax.newllm.experiment:train_newllm",
        plan="newllm_jax.newllm.plan:plan_newllm",
        restore="newllm_jax.newllm.run:restore_newllm",
        evaluate="newllm_jax.newllm.run:evaluate_run",
        show="newllm_jax.report.tables:json_text",
        export="newllm_jax.newllm.run:export_newllm",
        in_precision="newllm_jax.newllm.generate:in_precision",
        generate="newllm_jax.newllm.generate:generate",
        generate_all="newllm_jax.newllm.generate:generate_all",
        report="newllm_jax.report.newllm:write_report",
        frontier=None,
        separator=" ",
        next_steps="newllm_jax.report.next_steps:after_newllm",
        less_memory="lower micro_batch (a new run finds it with --auto_batch), then batch_size or sequence_length",
    ),
    "cascade": System(
        command="cascade",
        config=CascadeConfig,
        default="published",
        prefix="cascade-",
        precision="newllm_jax.training.precision:configured_precision",
        warning="newllm_jax.cascade.stage.updates:slow_update_warning",
        train="newllm_jax.cascade.experiment:train_cascade",
        plan="newllm_jax.cascade.plan:plan_cascade",
        restore="newllm_jax.cascade.run:restore_cascade",
        evaluate="newllm_jax.cascade.experiment:evaluate_run",
        show="newllm_jax.report.cascade_tables:evaluation_text",
        export="newllm_jax.cascade.run:export_cascade",
        in_precision="newllm_jax.cascade.generate:in_precision",
        generate="newllm_jax.cascade.generate:generate",
        generate_all="newllm_jax.cascade.generate:generate_all",
        report="newllm_jax.report.cascade:write_report",
        frontier="newllm_jax.cascade.frontier:frontier_entries",
        separator="",
        next_steps="newllm_jax.report.next_steps:after_cascade",
        less_memory="lower stage_layers or train_chunks, and micro_batch where batch_size is large",
    ),
    "finetune": System(
        command="finetune",
        config=FinetuneConfig,
        default="published",
        prefix="finetune-",
        precision="newllm_jax.training.precision:configured_precision",
        warning="newllm_jax.finetuning.run:slow_generation_warning",
        train="newllm_jax.finetuning.experiment:finetune",
        plan="newllm_jax.finetuning.plan:plan_finetune",
        restore="newllm_jax.finetuning.run:restore_finetune",
        evaluate="newllm_jax.finetuning.run:evaluate_run",
        show="newllm_jax.report.tables:json_text",
        export="newllm_jax.finetuning.export:export_finetune",
        in_precision="newllm_jax.finetuning.run:in_precision",
        generate="newllm_jax.finetuning.run:generate",
        generate_all="newllm_jax.finetuning.run:generate_all",
        report="newllm_jax.report.finetune:write_report",
        frontier="newllm_jax.finetuning.frontier:frontier_entries",
        separator="",
        next_steps="newllm_jax.report.next_steps:after_finetune",
        less_memory="lower micro_batch (a new run finds it with --auto_batch), or use a smaller base_model",
    ),
}


def call(function: Function, *arguments: Any, **options: Any) -> Any:
    """Calls a function of a row."""
    return pkgutil.resolve_name(function)(*arguments, **options)


def system_of(run_dir: str | Path) -> System:
    """The row of the system of a run directory or an exported folder.

    Raises:
      InputError: neither of them, or of a system that is not known.
    """
    run = open_trained(run_dir)
    name = run.description.get("system")
    if not isinstance(name, str) or name not in SYSTEMS:
        raise InputError(f"{run.path / 'config.json'}: names no system that is known ({name!r})")
    return SYSTEMS[name]


def restore(run_dir: str | Path) -> NewLLMRun | CascadeRun | DesignRun | FinetuneRun:
    """A trained model, ready to call, on the default device (a CPU will do).

    Args:
      run_dir: a run directory, an exported folder, or the name of one on the Hugging Face Hub: `owner/name`, or
        `owner/name@revision`.

    Raises:
      InputError: none of them, one without a checkpoint or that is damaged, or a Hub that is out of reach.

    >>> import jax.numpy as jnp
    >>> import newllm_jax
    >>> run = newllm_jax.restore("runs/quickstart")
    >>> words = run.tokenizer.encode_prompt("w1 w2")
    >>> logits, context = run.model.apply({"params": run.params}, jnp.array([words]))
    >>> logits.shape == (1, len(words), len(run.tokenizer))
    True
    """
    folder = model_folder(run_dir)
    return call(system_of(folder).restore, folder)


def model_folder(place: str | Path) -> Path:
    """The local folder of what `restore` takes. Raises InputError where a name of the Hub cannot be had.

    A local path wins: a name is one of the Hub where neither it nor the folder that it would lie in is here.
    """
    from newllm_jax.sources.hub import hub_folder

    path = checked_path("run_dir", place)
    name, _, revision = str(place).partition("@")
    is_name = isinstance(place, str) and re.fullmatch(r"[\w.-]*\w/\w[\w.-]*", name)
    if not is_name or path.exists() or path.parent.is_dir():
        return path
    try:
        return hub_folder(name, "model", EXPORTED_FILES, revision or None)
    except InputError as error:
        raise InputError(f"{place}: no such run directory or exported folder; {error}") from error


def export(run_dir: str | Path, to: str | Path, *, merge: bool = False) -> Path:
    """Writes the trained model of a finished run as a folder that can be published, and read by `restore`.

    A fine-tuned SmolLM2 is one that `transformers` loads; its LoRA adapters are one that `peft` does.

    Args:
      to: the folder; a new name, or an empty folder. It is there when all of it is written.
      merge: a fine-tuned model with its adapters in its weights, instead of the adapters.

    Returns:
      The folder.

    Raises:
      InputError: not a finished run, a folder that is not empty, or nothing to merge.
      OSError: a disk that takes no more.

    >>> folder = export("runs/quickstart", "to_publish")
    >>> sorted(path.name for path in folder.iterdir())
    ['README.md', 'model.safetensors', 'newllm.json', 'vocabulary.json']
    >>> restore(folder).epoch == restore("runs/quickstart").epoch
    True
    """
    from newllm_jax.report.model_card import model_card

    run, system, folder = RunDir.open(run_dir), system_of(run_dir), checked_path("to", to)
    check("to", str(to), "a new name or an empty folder",
          not folder.exists() or (folder.is_dir() and not any(folder.iterdir())))  # fmt: skip
    if merge and system.config.system != "finetune":
        raise InputError(f"merge: is for runs of finetune, and {run_dir} is one of {system.config.system}")
    results = run.read_json("results.json")
    check_results(results, run.path / "results.json")
    trained, options = call(system.restore, run_dir), {"merge": True} if merge else {}
    with whole_folder(folder) as partial:
        call(system.export, trained, run, partial, **options)
        with whole_file(partial / CARD) as file:
            file.write_text(model_card(results, folder.name, open_trained(partial)), encoding="utf-8")
    return folder


def evaluate(run_dir: str | Path, dynamic: bool = False) -> dict[str, Any]:
    """Measures the model of a run again, on the data it was validated on; writes nothing.

    Args:
      run_dir: as `restore` takes it.
      dynamic: also measures a New-LLM that goes on learning from the text.

    Returns:
      `system`, and for CASCADE `ensemble`, for the others loss, perplexity and accuracy by split.
    """
    folder = model_folder(run_dir)
    system = system_of(folder)
    if dynamic and system.config.system != "new-llm":
        raise InputError(f"dynamic: is for runs of new-llm, and {run_dir} is one of {system.config.system}")
    options = {"dynamic": True} if dynamic else {}
    return {"system": system.config.system, **call(system.evaluate, folder, **options)}


def frontier(run_dirs: Sequence[str | Path], elsewhere: str = "", speed: bool = False) -> dict[str, Any]:
    """Quality against compute of finished runs on the same base and test chunks, the base alone first.

    Args:
      elsewhere: a source of texts of another kind, on which all are measured too; "": none.
      speed: whether generation is timed too, one text and 32 at a time.

    Returns:
      `{"command", "environment", "seconds", "entries"}`; an entry has the points of a model: loss, interval, FLOPs.

    Raises:
      InputError: a run without test chunks or of New-LLM, or runs on other data than the first.
    """
    from newllm_jax.bars import progress_bar
    from newllm_jax.records.results import results_of_command
    from newllm_jax.records.stored_config import stored_config
    from newllm_jax.training.clock import Clock

    check("runs", [*map(str, run_dirs)], "at least one run directory", len(run_dirs) > 0)
    clock, found = Clock(), [system_of(run_dir) for run_dir in run_dirs]
    for run_dir, system in zip(run_dirs, found, strict=True):
        if system.frontier is None:
            raise InputError(f"runs: {run_dir} is a run of {system.config.system}, which has no frontier")
    runs = [RunDir.open(run_dir) for run_dir in run_dirs]
    for run in runs[1:]:
        if run.description.get("fingerprints") != runs[0].description.get("fingerprints"):
            raise InputError(f"runs: {run.path} has another base or other chunks than {runs[0].path}")
    config: Any = stored_config(runs[0], found[0].config)
    check("test_chunks", config.test_chunks, f"above 0 in {runs[0].path}, for a frontier", config.test_chunks > 0)
    with progress_bar("frontier", 1 + len(runs)) as advance:
        entries, others = call("newllm_jax.cascade.frontier_base:base_entries", config, elsewhere, speed)
        advance(1)
        for run_dir, system in zip(run_dirs, found, strict=True):
            entries += call(str(system.frontier), run_dir, others, speed)
            advance(1)
    for entry in entries[1:]:  # without the time of the run
        entry["name"] = f"{re.sub(r'-[0-9]{8}-[0-9]{6}.*', '', entry['name'])}, seed {entry['config']['seed']}"
    return {**results_of_command(clock.seconds()), "entries": entries}


def report(run_dir: str | Path) -> str:
    """Writes the report and the curves of a finished run again, from its `results.json`; returns the report.

    Raises:
      InputError: not a finished run, or damaged results.
    """
    run, system = RunDir.open(run_dir), system_of(run_dir)
    results = run.read_json("results.json")
    check_results(results, run.path / "results.json")
    with run:
        path: Path = call(system.report, run, results)
    return path.read_text(encoding="utf-8")
