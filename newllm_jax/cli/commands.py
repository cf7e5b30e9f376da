"""The commands: each reads its arguments and calls the library, parts of which are imported where they are used."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from newllm_jax import processes, systems
from newllm_jax.cli import signals
from newllm_jax.cli.options import Parser, add_deterministic, add_settings, new_file, set_up, typed_settings
from newllm_jax.config import check, checked_path, load_config
from newllm_jax.decoding.exits import Exits
from newllm_jax.errors import InputError
from newllm_jax.systems import SYSTEMS, System, call

HARDNESS = (  # the settings of a measurement of criteria
    "base_model", "dataset", "dataset_config", "fallback", "train_chunks", "validation_chunks", "whole_rows",
    "hard_ratio", "seed",
)  # fmt: skip

MODEL = "run directory, exported folder, or one on the Hub: owner/name, owner/name@revision"


def train(argv: Sequence[str]) -> None:
    """`newllm train`: trains New-LLM, or continues a run."""
    _train(Parser(prog="train.py", description="Train New-LLM.", allow_abbrev=False), argv, SYSTEMS["new-llm"])


def cascade(argv: Sequence[str]) -> None:
    """`newllm cascade`: trains the stages of CASCADE and evaluates the ensemble, or continues a run."""
    description = "Train CASCADE on a frozen SmolLM2."
    _train(Parser(prog="cascade.py", description=description, allow_abbrev=False), argv, SYSTEMS["cascade"])


def finetune(argv: Sequence[str]) -> None:
    """`newllm finetune`: fine-tunes a SmolLM2, whole or in part, on the chunks of CASCADE, or continues a run."""
    parser = Parser(prog="newllm finetune", description="Fine-tune a SmolLM2, whole or in part.", allow_abbrev=False)
    _train(parser, argv, SYSTEMS["finetune"])


def sweep(argv: Sequence[str]) -> None:
    """`newllm sweep`: trains New-LLM with every combination of some values, or continues a sweep."""
    parser = Parser(
        prog="newllm sweep", allow_abbrev=False, description="Train New-LLM with every combination of some values: "
        "--learning_rate 1e-3,2e-3 --seed 0,1,2 (between values that are lists themselves stands a semicolon).",
    )  # fmt: skip
    if processes.place_in(os.environ):
        raise InputError("sweep: its members share the devices of one process; start it in one")
    system = SYSTEMS["new-llm"]
    parser.add_argument("--config", help="configuration that is common to all: a name, or a TOML or JSON file "
                        f"(default {system.default})")  # fmt: skip
    parser.add_argument("--resume", metavar="SWEEP_DIR", help="continue a sweep instead of starting one")
    parser.add_argument("--run_root", metavar="DIR", default="runs", help="parent of its directory (default runs)")
    parser.add_argument("--at_once", type=int, metavar="N", help="most members that are trained side by side (default: "
                        "as many as fit into memory)")  # fmt: skip
    parser.add_argument("--dry_run", action="store_true", help="print what the sweep would be, as JSON, and stop")
    add_deterministic(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, system, "values of settings (without: that of the configuration)")
    arguments = parser.parse_all(argv)
    set_up(arguments)
    from newllm_jax.newllm.grid import parse_values
    from newllm_jax.newllm.sweep import plan_sweep, sweep_newllm

    texts = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(system.config)}
    values = {name: parse_values(name, text or "") for name, text in texts.items() if text is not None}
    at_once = arguments.at_once
    if arguments.resume is not None:
        for option in ("dry_run", "config", *values):
            if getattr(arguments, option):
                raise InputError(f"{option}: does not go with --resume: a sweep goes on as it was started")
        sweep_newllm(resume=arguments.resume, at_once=at_once, stop=signals.came)
        return
    name = system.default if arguments.config is None else arguments.config
    config, run_root = load_config(name), checked_path("run_root", arguments.run_root)
    if arguments.dry_run:
        print(json.dumps(plan_sweep(config, values, at_once), indent=2))
        return
    sweep_newllm(config, values, name=f"sweep-{Path(name).stem}", run_root=run_root, at_once=at_once, stop=signals.came)


def generate(argv: Sequence[str]) -> None:
    """`newllm generate`: streams text from a run."""
    parser = Parser(prog="newllm generate", description="Stream text from a trained model.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help=MODEL)
    parser.add_argument("--prompt", default="", help="text to continue; for a SmolLM2 the user's turn")
    parser.add_argument("--max_words", type=int, default=100, help="largest number of words (SmolLM2: tokens)")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature; 0: most probable word")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k most probable words only; 0: from all")
    parser.add_argument(
        "--top_p",
        type=float,
        default=0.95,
        help="sample from the most probable words up to this probability",
    )
    parser.add_argument("--unknown", action="store_true", help="New-LLM: also allow <UNK>")
    parser.add_argument("--seed", type=int, default=0, help="random seed for sampling")
    add_deterministic(parser)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    from newllm_jax.decoding.sampling import Sampling

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.unknown)
    run, exits = systems.restore(arguments.run_dir), Exits()
    prompt = arguments.prompt or ""  # argparse makes an empty list of `--`
    pieces = systems.generate(
        run, prompt, max_words=arguments.max_words, seed=arguments.seed, sampling=sampling, exits=exits
    )  # fmt: skip
    separator = SYSTEMS[run.config.system].separator
    if separator and prompt:  # the text continues the prompt
        print(prompt, end=separator, flush=True)
    for piece in pieces:
        print(piece, end=separator, flush=True)
    print()
    if len(exits.counts) > 1:
        print(f"\ntokens by exit: {exits}")


def evaluate(argv: Sequence[str]) -> None:
    """`newllm evaluate`: measures the model of a run again; for CASCADE prints the ensemble over all tokens."""
    parser = Parser(prog="newllm evaluate", description="Measure the model of a run again.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help=MODEL)
    parser.add_argument(
        "--dynamic", action="store_true", help="also measure a New-LLM that goes on learning from the text (stream)"
    )
    add_deterministic(parser)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    results = systems.evaluate(arguments.run_dir, dynamic=arguments.dynamic)
    print(call(SYSTEMS[results["system"]].show, results))


def export(argv: Sequence[str]) -> None:
    """`newllm export`: writes the model of a finished run as a folder to publish, with a model card."""
    parser = Parser(prog="newllm export", description="Write a trained model to publish.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    parser.add_argument("--to", metavar="FOLDER", required=True, help="a new or empty folder")
    parser.add_argument("--merge", action="store_true", help="LoRA: one whole model instead of the adapters")
    arguments = parser.parse_all(argv)
    print(f"exported to {systems.export(arguments.run_dir, arguments.to, merge=arguments.merge)}")


def frontier(argv: Sequence[str]) -> None:
    """`newllm frontier`: writes and prints the quality of several runs against what a token costs."""
    parser = Parser(prog="newllm frontier", description="Measure quality against compute.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="runs of CASCADE and of fine-tuning, same data")
    parser.add_argument("--elsewhere", default="", metavar="SOURCE", help="also measure on texts of another kind")
    parser.add_argument("--speed", action="store_true", help="also time generation, one text and 32 at a time")
    parser.add_argument("--output", default="frontier", metavar="DIR", help="folder of the results (default frontier)")
    arguments = parser.parse_all(argv)
    from newllm_jax.content import finite
    from newllm_jax.files import whole_file
    from newllm_jax.report.frontier import frontier_page, save_frontier

    output = checked_path("output", arguments.output)
    check("output", arguments.output, "a folder or a new name", output.is_dir() or not output.exists())
    content = systems.frontier(arguments.runs, arguments.elsewhere, arguments.speed)
    output.mkdir(parents=True, exist_ok=True)
    page = frontier_page(content)
    for name, text in (("frontier.json", json.dumps(finite(content), indent=1)), ("frontier.md", page)):
        with whole_file(output / name) as partial:
            partial.write_text(text, encoding="utf-8")
    save_frontier(output / "frontier.png", content)
    print(f"{page}\nwritten to {output}")


def compare(argv: Sequence[str]) -> None:
    """`newllm compare`: writes and prints the table of several runs."""
    parser = Parser(prog="newllm compare", description="Put several runs into one table.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or results.json files")
    parser.add_argument("--published", action="store_true", help="add the published CASCADE runs to the table")
    parser.add_argument(
        "--output", default="comparison.md", metavar="FILE", help="for the table (default comparison.md)"
    )
    arguments = parser.parse_all(argv)
    from newllm_jax.files import whole_file
    from newllm_jax.report.compare import comparison, read_results
    from newllm_jax.report.published import PUBLISHED_RUNS

    output = new_file("output", arguments.output)
    results = [read_results(run) for run in arguments.runs]
    if arguments.published and all(run["system"] == "new-llm" for run in results):
        raise InputError("published: only CASCADE has published runs here, and these are runs of New-LLM")
    text = comparison([*(PUBLISHED_RUNS if arguments.published else []), *results])
    with whole_file(output) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {output}")


def hardness(argv: Sequence[str]) -> None:
    """`newllm hardness`: measures how well each criterion tells hard tokens, on any base and data or a run's."""
    parser = Parser(
        prog="newllm hardness", allow_abbrev=False, description="Measure how well each criterion tells hard tokens, by "
        "the loss of a base and, where a run is given, by what its hard path gains.",
    )  # fmt: skip
    system = SYSTEMS["cascade"]
    parser.add_argument("run_dir", metavar="RUN", nargs="?", help="cascade run of a design, whose base, data and gains "
                        "are measured")  # fmt: skip
    parser.add_argument("--output", metavar="FILE", help="JSON file for the results (default: none is written)")
    add_deterministic(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, system, "settings (the defaults are those of the published run, or of RUN)", HARDNESS)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    output = None if arguments.output is None else new_file("output", arguments.output)
    settings = typed_settings(arguments, system.config, HARDNESS)
    from newllm_jax.cascade.criteria import measure_hardness
    from newllm_jax.content import finite
    from newllm_jax.files import whole_file
    from newllm_jax.report.criteria import criteria_text

    results = finite(measure_hardness(settings, arguments.run_dir))
    print(f"\n{criteria_text(results)}")
    if output is not None:
        with whole_file(output) as partial:
            partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {output}")


def report(argv: Sequence[str]) -> None:
    """`newllm report`: writes the report and curves of a run again from its results.json, and prints the report."""
    parser = Parser(prog="newllm report", description="Print the report of a finished run.", allow_abbrev=False)
    parser.add_argument("run_dir", metavar="RUN_DIR", help="run directory")
    print(systems.report(parser.parse_all(argv).run_dir))


def doctor(argv: Sequence[str]) -> None:
    """`newllm doctor`: prints what this machine and installation are, as JSON."""
    Parser(prog="newllm doctor", description="Print versions and devices.", allow_abbrev=False).parse_all(argv)
    import jax

    from newllm_jax.files import cache_folder
    from newllm_jax.records.machine import environment
    from newllm_jax.sources.hub import hub_answers, hub_is_offline
    from newllm_jax.training.precision import supported_precisions

    found: dict[str, Any] = environment("auto")
    defaults = {system.command: load_config(system.default, config_class=system.config) for system in SYSTEMS.values()}
    found["precision"] = {name: call(SYSTEMS[config.system].precision, config) for name, config in defaults.items()}
    warnings = [system.warning and call(system.warning, defaults[system.command]) for system in SYSTEMS.values()]
    found["warnings"] = list(filter(None, warnings))
    found |= {"precisions": supported_precisions(), "devices": len(jax.devices())}
    found |= {"cores": os.cpu_count(), "cache": str(cache_folder())}
    print(json.dumps({**found, "hub": not hub_is_offline() and hub_answers()}, indent=2))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "cascade": cascade,
    "finetune": finetune,
    "sweep": sweep,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "frontier": frontier,
    "compare": compare,
    "hardness": hardness,
    "report": report,
    "doctor": doctor,
}


def _train(parser: Parser, argv: Sequence[str], system: System) -> None:
    """What the training commands share: start a run, continue one, or print only its plan."""
    _add_run_options(parser, system)
    arguments = parser.parse_all(argv)
    set_up(arguments)
    overrides, run_root = typed_settings(arguments, system.config), checked_path("run_root", arguments.run_root)
    processes.connect()
    running = {"stop": signals.came, "narrate": print if processes.is_first() else _nothing}
    if arguments.resume is not None:
        for option in ("dry_run", "auto_batch"):
            if getattr(arguments, option):
                raise InputError(f"{option}: does not go with --resume")
        if arguments.config is not None:
            overrides = {**load_config(arguments.config, config_class=system.config).to_dict(), **overrides}
        call(system.train, resume=arguments.resume, overrides=overrides, **running)
        return
    name = system.default if arguments.config is None else arguments.config
    config = load_config(name, overrides, config_class=system.config)
    if arguments.auto_batch and config.micro_batch is not None:
        raise InputError("auto_batch: does not go with micro_batch, which it chooses")
    if arguments.auto_batch and getattr(config, "text", "") == "stream":
        raise InputError("auto_batch: does not go with text stream, which has no micro_batch; lower batch_size")
    told = ""
    if arguments.auto_batch:
        config, told = systems.largest_micro_batch(config)
    if arguments.dry_run:
        print(json.dumps(call(system.plan, config), indent=2))
        return
    if told:
        print(f"micro batch {told}")
    call(system.train, config, name=f"{system.prefix}{Path(name).stem}", run_root=run_root, **running)


def _nothing(line: str) -> None:
    """What a process tells that is not the first of several."""


def _add_run_options(parser: Parser, system: System) -> None:
    parser.add_argument("--config", help=f"configuration: a name, or a TOML or JSON file (default {system.default})")
    parser.add_argument("--resume", metavar="RUN_DIR", help="continue a run instead of starting one")
    parser.add_argument("--run_root", metavar="DIR", default="runs", help="parent of run directories (default runs)")
    parser.add_argument("--dry_run", action="store_true", help="print what a run would be, as JSON, and stop")
    parser.add_argument("--auto_batch", action="store_true", help="largest micro_batch that fits into free memory")
    add_deterministic(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_settings(parser, system, "settings (the defaults are those of the configuration)")
