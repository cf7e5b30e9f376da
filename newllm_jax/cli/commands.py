"""The commands: each reads its arguments and calls the library. What they need is imported where it is used."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from newllm_jax.config import (
    CascadeConfig,
    Config,
    FinetuneConfig,
    NewLLMConfig,
    RunConfig,
    load_config,
    nearest,
    parse,
)
from newllm_jax.errors import InputError


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are InputErrors, and whose unknown options name the nearest known one."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def parse_all(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parses all of argv. Raises InputError."""
        valued = {option for action in self._actions if action.nargs is None for option in action.option_strings}
        known = {option for action in self._actions for option in action.option_strings}
        joined: list[str] = []
        for token in argv:  # argparse itself takes -1e-4, or a prompt that starts with a dash, for an option
            if joined and joined[-1] in valued and token.split("=")[0] not in known:
                joined[-1] += f"={token}"
            else:
                joined.append(token)
        arguments, unknown = self.parse_known_args(joined)
        if unknown:
            name, names = unknown[0].split("=")[0], [option[2:] for option in known if option.startswith("--")]
            raise InputError(f"{name}: no such option{nearest(name.lstrip('-'), names)}" if name.startswith("-")
                             else f"{name}: unexpected argument")  # fmt: skip
        return arguments


def train(argv: Sequence[str]) -> None:
    """`newllm train`: trains New-LLM, or goes on with a run."""

    def plan(config: NewLLMConfig) -> dict[str, Any]:
        from newllm_jax.newllm.plan import plan_newllm

        return plan_newllm(config)

    def run(*arguments: Any, **options: Any) -> object:
        from newllm_jax.newllm.experiment import train_newllm

        return train_newllm(*arguments, **options)

    parser = Parser(prog="train.py", description="Train New-LLM.", allow_abbrev=False)
    _experiment(parser, argv, NewLLMConfig, "baseline", "", run, plan)


def cascade(argv: Sequence[str]) -> None:
    """`newllm cascade`: trains the stages of CASCADE and evaluates the ensemble, or goes on with a run."""

    def plan(config: CascadeConfig) -> dict[str, Any]:
        from newllm_jax.cascade.plan import plan_cascade

        return plan_cascade(config)

    def run(*arguments: Any, **options: Any) -> object:
        from newllm_jax.cascade.experiment import train_cascade

        return train_cascade(*arguments, **options)

    parser = Parser(prog="cascade.py", description="Train CASCADE on a frozen SmolLM2.", allow_abbrev=False)
    _experiment(parser, argv, CascadeConfig, "published", "cascade-", run, plan)


def finetune(argv: Sequence[str]) -> None:
    """`newllm finetune`: fine-tunes a whole SmolLM2 on the chunks of CASCADE, or goes on with a run."""

    def run(*arguments: Any, **options: Any) -> object:
        from newllm_jax.finetuning.experiment import finetune

        return finetune(*arguments, **options)

    parser = Parser(prog="newllm finetune", description="Fine-tune a whole SmolLM2.", allow_abbrev=False)
    _experiment(parser, argv, FinetuneConfig, "published", "finetune-", run, None)


def generate(argv: Sequence[str]) -> None:
    """`newllm generate`: streams text from a run."""
    parser = Parser(prog="newllm generate", description="Stream text from a trained model.", allow_abbrev=False)
    parser.add_argument("run_dir")
    parser.add_argument("--prompt", default="", help="the text to go on with, or for a SmolLM2 the user's turn")
    parser.add_argument("--max_words", type=int, default=100, help="words (SmolLM2: tokens) at most")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable word")
    parser.add_argument("--top_k", type=int, default=0, help="only the k most probable words; 0: all")
    parser.add_argument("--top_p", type=float, default=0.95, help="only words up to this total probability; 1: all")
    parser.add_argument("--unknown", action="store_true", help="New-LLM: let <UNK> be chosen too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_all(argv)
    from newllm_jax.cascade.generate import Exits
    from newllm_jax.decoding.sampling import Sampling
    from newllm_jax.newllm.run import NewLLMRun
    from newllm_jax.systems import generate, restore

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.unknown)
    run, exits = restore(arguments.run_dir), Exits()
    prompt = arguments.prompt or ""  # argparse makes an empty list of `--`
    words = generate(
        run, prompt, max_words=arguments.max_words, seed=arguments.seed, sampling=sampling, exits=exits
    )  # fmt: skip
    word_by_word = isinstance(run, NewLLMRun)
    if word_by_word:
        print(prompt, end=" " if prompt else "", flush=True)
    for word in words:
        print(word, end=" " if word_by_word else "", flush=True)
    print()
    if len(exits.counts) > 1:
        print(f"\ntokens by exit: {exits}")


def evaluate(argv: Sequence[str]) -> None:
    """`newllm evaluate`: measures the model of a run anew; for CASCADE prints the ensemble over all tokens."""
    parser = Parser(prog="newllm evaluate", description="Measure the model of a run anew.", allow_abbrev=False)
    parser.add_argument("run_dir")
    arguments = parser.parse_all(argv)
    from newllm_jax.systems import evaluate

    results = evaluate(arguments.run_dir)
    if results["system"] != "cascade":
        print(json.dumps(results, indent=2))
        return
    from newllm_jax.report.cascade_tables import ensemble_table, exit_group_table, verdict

    print(ensemble_table(results), exit_group_table(results["ensemble"][-1]), verdict(results), sep="\n\n")


def compare(argv: Sequence[str]) -> None:
    """`newllm compare`: writes and prints the table of several runs."""
    parser = Parser(prog="newllm compare", description="Put several runs into one table.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or results.json files")
    parser.add_argument("--published", action="store_true", help="put the published CASCADE runs beside them")
    parser.add_argument("--output", default="comparison.md", metavar="FILE", help="default comparison.md")
    arguments = parser.parse_all(argv)
    from newllm_jax.files import whole_file
    from newllm_jax.report.compare import comparison, read_results
    from newllm_jax.report.published import PUBLISHED_RUNS

    results = [read_results(run) for run in arguments.runs]
    if arguments.published and all(run["system"] == "new-llm" for run in results):
        raise InputError("published: only CASCADE has published runs here, and these are runs of New-LLM")
    text = comparison([*(PUBLISHED_RUNS if arguments.published else []), *results])
    with whole_file(Path(arguments.output)) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {arguments.output}")


def report(argv: Sequence[str]) -> None:
    """`newllm report`: writes a run's report and curves anew from its results.json, and prints the report."""
    parser = Parser(prog="newllm report", description="Print the report of a finished run.", allow_abbrev=False)
    parser.add_argument("run_dir")
    arguments = parser.parse_all(argv)
    from newllm_jax.records.directory import RunDir
    from newllm_jax.report.plots import save_curves, save_stage_curves

    run = RunDir.open(arguments.run_dir)
    results = run.read_json("results.json")
    with run:
        try:
            text = report_of(results)
            if results["system"] == "cascade":
                save_stage_curves(run.path / "curves.png", results["stages"], results["ensemble"], results["name"])
            else:
                words = results["system"] == "new-llm"
                unit = "word" if words else "token"
                save_curves(run.path / "curves.png", results["epochs"], results["name"], unit, dropout=words)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{run.path / 'results.json'}: damaged ({error!r})") from error
        run.write_text("report.md", text)
    print(text)


def report_of(results: dict[str, Any]) -> str:
    """`report.md` of any system."""
    from newllm_jax.report.cascade_tables import cascade_report, finetune_report
    from newllm_jax.report.tables import newllm_report

    return {"new-llm": newllm_report, "cascade": cascade_report, "finetune": finetune_report}[results["system"]](
        results
    )


def doctor(argv: Sequence[str]) -> None:
    """`newllm doctor`: prints what this machine and installation are, as JSON."""
    Parser(prog="newllm doctor", description="Print versions and devices.", allow_abbrev=False).parse_all(argv)
    import jax

    from newllm_jax.files import cache_folder
    from newllm_jax.newllm.updates import training_precision
    from newllm_jax.records.machine import environment
    from newllm_jax.sources.hub import hub_answers, hub_is_offline
    from newllm_jax.training.precision import resolve_precision, supported_precisions

    found: dict[str, Any] = environment("auto")
    found["precision"] = {"train": training_precision(NewLLMConfig()), "cascade": resolve_precision("auto")}
    found |= {"precisions": supported_precisions(), "devices": len(jax.devices())}
    found |= {"cores": os.cpu_count(), "cache": str(cache_folder())}
    print(json.dumps({**found, "hub": not hub_is_offline() and hub_answers()}, indent=2))


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "cascade": cascade,
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "doctor": doctor,
}


def _experiment(
    parser: Parser,
    argv: Sequence[str],
    config_class: type[Config],
    default: str,
    prefix: str,
    run: Callable[..., object],
    plan: Callable[[Config], dict[str, Any]] | None,
) -> None:
    """What the training commands share: a configuration, or a run to go on with; or only its plan."""
    _add_run_options(parser, config_class, default, plan is not None)
    arguments = parser.parse_all(argv)
    overrides = _overrides(arguments, config_class)
    planned = plan is not None and arguments.dry_run
    if arguments.resume is not None:
        if planned:
            raise InputError("dry_run: does not go with --resume")
        if arguments.config is not None:
            overrides = {**load_config(arguments.config, config_class=config_class).to_dict(), **overrides}
        run(resume=arguments.resume, overrides=overrides)
        return
    name = default if arguments.config is None else arguments.config
    config = load_config(name, overrides, config_class=config_class)
    if plan is not None and planned:
        print(json.dumps(plan(config), indent=2))
        return
    run(config, name=f"{prefix}{Path(name).stem}", run_root=arguments.run_root)


def _add_run_options(parser: Parser, config_class: type[RunConfig], default: str, dry_run: bool = True) -> None:
    parser.add_argument("--config", help=f"a configuration by name, or a TOML or JSON file (default {default})")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run instead of starting one")
    parser.add_argument("--run_root", metavar="DIR", default="runs", help="where run directories go (default runs)")
    if dry_run:
        parser.add_argument("--dry_run", action="store_true", help="print what a run would be, as JSON, and stop")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    fields = parser.add_argument_group("settings (the defaults are those of the configuration)")
    for field in dataclasses.fields(config_class):
        fields.add_argument(f"--{field.name}", metavar="VALUE", help=field.metadata["help"])


def _overrides(arguments: argparse.Namespace, config_class: type[RunConfig]) -> dict[str, Any]:
    given = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(config_class)}
    return {name: parse(config_class, name, text) for name, text in given.items() if text is not None}
