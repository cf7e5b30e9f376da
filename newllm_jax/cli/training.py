"""The commands that train: train, cascade, finetune, sweep."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from newllm_jax import processes
from newllm_jax.cli import signals
from newllm_jax.cli.options import (
    Parser,
    add_deterministic,
    add_log_format,
    add_settings,
    narrator,
    set_up,
    typed_settings,
)
from newllm_jax.config import checked_path, load_config
from newllm_jax.errors import InputError, Stopped
from newllm_jax.records.narration import Narrate, tell
from newllm_jax.records.results import RunResult
from newllm_jax.systems import SYSTEMS, System, call

TOLD = ("seconds", "peak_memory_bytes", "best", "test", "base", "kept_stages")  # of the results, at the end of a run


def train(argv: Sequence[str]) -> None:
    """`newllm train`: trains New-LLM, or continues a run."""
    _train(_parser("train.py", "Train New-LLM."), argv, SYSTEMS["new-llm"])


def cascade(argv: Sequence[str]) -> None:
    """`newllm cascade`: trains the stages of CASCADE and evaluates the ensemble, or continues a run."""
    _train(_parser("cascade.py", "Train CASCADE on a frozen SmolLM2."), argv, SYSTEMS["cascade"])


def finetune(argv: Sequence[str]) -> None:
    """`newllm finetune`: fine-tunes a SmolLM2, whole or in part, on the chunks of CASCADE, or continues a run."""
    _train(_parser("newllm finetune", "Fine-tune a SmolLM2, whole or in part."), argv, SYSTEMS["finetune"])


def sweep(argv: Sequence[str]) -> None:
    """`newllm sweep`: trains New-LLM with every combination of some values, or continues a sweep."""
    parser = _parser(
        "newllm sweep", "Train New-LLM with every combination of some values: --learning_rate 1e-3,2e-3 --seed 0,1,2 "
        "(between values that are lists themselves stands a semicolon).",
    )  # fmt: skip
    if processes.place_in(os.environ):
        raise InputError("sweep: its members share the devices of one process; start it in one")
    system = SYSTEMS["new-llm"]
    run = parser.add_argument_group("run")
    run.add_argument("--config", help="configuration that is common to all: a name, or a TOML or JSON file "
                     f"(default {system.default})")  # fmt: skip
    run.add_argument("--resume", metavar="SWEEP_DIR", help="continue a sweep instead of starting one")
    run.add_argument("--run_root", metavar="DIR", default="runs", help="parent of its directory (default runs)")
    run.add_argument("--at_once", type=int, metavar="N", help="most members that are trained side by side (default: "
                     "as many as fit into memory)")  # fmt: skip
    run.add_argument("--dry_run", action="store_true", help="print what the sweep would be, as JSON, and stop")
    _add_process_options(run)
    add_settings(parser, system, argv)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    from newllm_jax.newllm.grid import parse_values
    from newllm_jax.newllm.sweep import plan_sweep, sweep_newllm

    texts = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(system.config)}
    values = {name: parse_values(name, text or "") for name, text in texts.items() if text is not None}
    narrate, at_once = narrator(arguments), arguments.at_once
    running = {"at_once": at_once, "stop": signals.came, "narrate": narrate}
    with _stop_told(narrate):
        if arguments.resume is not None:
            for option in ("dry_run", "config", *values):
                if getattr(arguments, option):
                    raise InputError(f"{option}: does not go with --resume: a sweep goes on as it was started")
            result = sweep_newllm(resume=arguments.resume, **running)
        else:
            name = system.default if arguments.config is None else arguments.config
            config, run_root = load_config(name), checked_path("run_root", arguments.run_root)
            if arguments.dry_run:
                _tell_plan(narrate, plan_sweep(config, values, at_once))
                return
            result = sweep_newllm(config, values, name=f"sweep-{Path(name).stem}", run_root=run_root, **running)
        _tell_end(narrate, result, "newllm_jax.report.next_steps:after_sweep")


def _parser(prog: str, description: str) -> Parser:
    usage = f"{prog} [--config NAME] [--resume DIR] [--SETTING VALUE ...]"
    return Parser(prog=prog, usage=usage, description=description, allow_abbrev=False)


def _train(parser: Parser, argv: Sequence[str], system: System) -> None:
    """What the training commands share: start a run, continue one, or print only its plan."""
    _add_run_options(parser, system)
    add_settings(parser, system, argv)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    overrides, run_root = typed_settings(arguments, system.config), checked_path("run_root", arguments.run_root)
    processes.connect()
    narrate = narrator(arguments)
    running = {"stop": signals.came, "narrate": narrate}
    with _stop_told(narrate):
        if arguments.resume is not None:
            for option in ("dry_run", "auto_batch"):
                if getattr(arguments, option):
                    raise InputError(f"{option}: does not go with --resume")
            if arguments.config is not None:
                overrides = {**load_config(arguments.config, config_class=system.config).to_dict(), **overrides}
            result = call(system.train, resume=arguments.resume, overrides=overrides, **running)
            _tell_end(narrate, result, system.next_steps)
            return
        name = system.default if arguments.config is None else arguments.config
        config = load_config(name, overrides, config_class=system.config)
        if arguments.auto_batch and config.micro_batch is not None:
            raise InputError("auto_batch: does not go with micro_batch, which it chooses")
        if arguments.auto_batch and getattr(config, "text", "") == "stream":
            raise InputError("auto_batch: does not go with text stream, which has no micro_batch; lower batch_size")
        told = ""
        if arguments.auto_batch:
            from newllm_jax.cli.micro_batch import largest_micro_batch

            config, told = largest_micro_batch(config)
        if arguments.dry_run:
            _tell_plan(narrate, call(system.plan, config))
            return
        if told:
            narrate(f"micro batch {told}")
        result = call(system.train, config, name=f"{system.prefix}{Path(name).stem}", run_root=run_root, **running)
        _tell_end(narrate, result, system.next_steps)


@contextmanager
def _stop_told(narrate: Narrate) -> Iterator[None]:
    """Tells that a run stopped at its time limit. Where it stopped for a signal, the process ends with its line."""
    try:
        yield
    except Stopped as stopped:
        signals.end(str(stopped))
        tell(narrate, "stopped", f"stopped     {stopped}", {"reason": str(stopped)})


def _tell_plan(narrate: Narrate, plan: dict[str, object]) -> None:
    tell(narrate, "plan", json.dumps(plan, indent=2), plan)


def _tell_end(narrate: Narrate, result: RunResult, next_steps: str) -> None:
    """Tells what to do next: commands for this very run."""
    steps = [_within_reach(step) for step in call(next_steps, result.run_dir, result.results)]
    lines = [f"{'' if number else 'next':<11} {step}" for number, step in enumerate(steps)]
    facts = {name: result.results[name] for name in TOLD if name in result.results}
    tell(narrate, "end", lines, {"run": str(result.run_dir), **facts, "next": steps})


def _within_reach(command: str) -> str:
    """A command as it can be typed here: `newllm` by its path where the shell does not find it, as after `make`."""
    installed = Path(sys.executable).with_name("newllm")
    if shutil.which("newllm") or not installed.is_file():
        return command
    return command.replace("newllm", shlex.quote(os.path.relpath(installed)), 1)


def _add_run_options(parser: Parser, system: System) -> None:
    run = parser.add_argument_group("run")
    run.add_argument("--config", help=f"configuration: a name, or a TOML or JSON file (default {system.default})")
    run.add_argument("--resume", metavar="RUN_DIR", help="continue a run instead of starting one")
    run.add_argument("--run_root", metavar="DIR", default="runs", help="parent of run directories (default runs)")
    run.add_argument("--dry_run", action="store_true", help="print what a run would be, as JSON, and stop")
    run.add_argument("--auto_batch", action="store_true", help="largest micro_batch that fits into free memory")
    _add_process_options(run)


def _add_process_options(run: argparse._ArgumentGroup) -> None:
    """The options of every command that trains, whatever it trains."""
    add_log_format(run)
    add_deterministic(run)
    run.add_argument("--debug", action="store_true", help="show tracebacks")
