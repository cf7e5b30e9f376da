"""The command line: the only room that sees argv, sets up the process and turns errors into a line and an exit code."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

<<<<<<< HEAD
import absl.logging
=======
from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig, RunConfig, load_config, nearest, parse
from newllm_jax.errors import InputError, NumericalError
>>>>>>> cascade-wing

from newllm_jax.config import NewLLMConfig, RunConfig, load_config, nearest, parse
from newllm_jax.errors import InputError, NumericalError, causes, disk_fault

PATH_ERRORS = {errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP}


class Terminated(BaseException):
    """SIGTERM: unwinds like Ctrl-C, so that a checkpoint being written is finished."""


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns 0, 2 (bad input), 3 (failed by its numbers), 130 or 143 (stopped by a signal)."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    if not debug:
        _quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a prompt may be no text in the terminal's encoding
    try:
        return _dispatch(argv)
    except (InputError, NumericalError) as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped; --resume RUN_DIR goes on after the last whole epoch", 130)
    except Terminated:
        return _fail("terminated; --resume RUN_DIR goes on after the last whole epoch", 143)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 0
    except Exception as error:
        reason = _environment_fault(error)
        if debug or reason is None:
            raise
        return _fail(reason, 2)


def train(argv: Sequence[str]) -> int:
    """`newllm train`: trains New-LLM, or goes on with a run."""
    parser = Parser(prog="train.py", description="Train New-LLM.", allow_abbrev=False)
    _add_run_options(parser, NewLLMConfig, "baseline")
    arguments = parser.parse_all(argv)
    overrides = _overrides(arguments, NewLLMConfig)
    if arguments.resume is not None:
        if arguments.dry_run:
            raise InputError("dry_run: does not go with --resume")
        if arguments.config is not None:
            overrides = {**load_config(arguments.config).to_dict(), **overrides}
        from newllm_jax.newllm.experiment import train_newllm

        train_newllm(resume=arguments.resume, overrides=overrides)
        return 0
    name = arguments.config or "baseline"
    config = load_config(name, overrides)
    if arguments.dry_run:
        from newllm_jax.newllm.plan import plan_newllm

        print(json.dumps(plan_newllm(config), indent=2))
        return 0
    from newllm_jax.newllm.experiment import train_newllm

    train_newllm(config, name=Path(name).stem, run_root=arguments.run_root)
    return 0


def cascade(argv: Sequence[str]) -> int:
    """`newllm cascade`: trains the stages of CASCADE and evaluates the ensemble, or goes on with a run."""
    parser = Parser(prog="cascade.py", description="Train CASCADE on a frozen SmolLM2.", allow_abbrev=False)
    _add_run_options(parser, CascadeConfig, "published")
    arguments = parser.parse_all(argv)
    overrides = _overrides(arguments, CascadeConfig)
    if arguments.resume is not None:
        if arguments.dry_run:
            raise InputError("dry_run: does not go with --resume")
        if arguments.config is not None:
            overrides = {**load_config(arguments.config, config_class=CascadeConfig).to_dict(), **overrides}
        from newllm_jax.cascade.experiment import train_cascade

        train_cascade(resume=arguments.resume, overrides=overrides)
        return 0
    name = arguments.config or "published"
    config = load_config(name, overrides, config_class=CascadeConfig)
    if arguments.dry_run:
        from newllm_jax.cascade.plan import plan_cascade

        print(json.dumps(plan_cascade(config), indent=2))
        return 0
    from newllm_jax.cascade.experiment import train_cascade

    train_cascade(config, name=f"cascade-{Path(name).stem}", run_root=arguments.run_root)
    return 0


def finetune(argv: Sequence[str]) -> int:
    """`newllm finetune`: fine-tunes a whole SmolLM2 on the chunks of CASCADE, or goes on with a run."""
    parser = Parser(prog="newllm finetune", description="Fine-tune a whole SmolLM2.", allow_abbrev=False)
    _add_run_options(parser, FinetuneConfig, "published", dry_run=False)
    arguments = parser.parse_all(argv)
    overrides = _overrides(arguments, FinetuneConfig)
    from newllm_jax.cascade.finetune import finetune

    if arguments.resume is not None:
        if arguments.config is not None:
            overrides = {**load_config(arguments.config, config_class=FinetuneConfig).to_dict(), **overrides}
        finetune(resume=arguments.resume, overrides=overrides)
        return 0
    name = arguments.config or "published"
    config = load_config(name, overrides, config_class=FinetuneConfig)
    finetune(config, name=f"finetune-{Path(name).stem}", run_root=arguments.run_root)
    return 0


def generate(argv: Sequence[str]) -> int:
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
    from newllm_jax.newllm.run import NewLLMRun
    from newllm_jax.runs import generate, restore
    from newllm_jax.sampling import Sampling

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.unknown)
<<<<<<< HEAD
    run = restore(arguments.run_dir)
    prompt = arguments.prompt or ""  # argparse makes an empty list of `--`
    words = generate(run, prompt, max_words=arguments.max_words, seed=arguments.seed, sampling=sampling)
    print(prompt, end=" " if prompt else "", flush=True)
    for word in words:
        print(word, end=" ", flush=True)
=======
    run, exits = restore(arguments.run_dir), Exits()
    spoken = generate(
        run, arguments.prompt, max_words=arguments.max_words, seed=arguments.seed, sampling=sampling, exits=exits
    )
    word_by_word = isinstance(run, NewLLMRun)
    if word_by_word:
        print(arguments.prompt, end="" if not arguments.prompt else " ", flush=True)
    for word in spoken:
        print(word, end=" " if word_by_word else "", flush=True)
>>>>>>> cascade-wing
    print()
    if len(exits.counts) > 1:
        print(f"\ntokens by exit: {exits}")
    return 0


def evaluate(argv: Sequence[str]) -> int:
    """`newllm evaluate`: measures the model of a run anew; for CASCADE prints the ensemble over all tokens."""
    parser = Parser(prog="newllm evaluate", description="Measure the model of a run anew.", allow_abbrev=False)
    parser.add_argument("run_dir")
    arguments = parser.parse_all(argv)
    from newllm_jax.runs import evaluate

    results = evaluate(arguments.run_dir)
    if results["system"] != "cascade":
        print(json.dumps(results, indent=2))
        return 0
    from newllm_jax.report.cascade_tables import ensemble_table, exit_group_table, verdict

    print(ensemble_table(results), exit_group_table(results["ensemble"][-1]), verdict(results), sep="\n\n")
    return 0


def compare(argv: Sequence[str]) -> int:
    """`newllm compare`: writes and prints the table of several runs."""
    parser = Parser(prog="newllm compare", description="Put several runs into one table.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directories, or results.json files")
    parser.add_argument("--published", action="store_true", help="put the published CASCADE runs beside them")
    parser.add_argument("--output", default="comparison.md", metavar="FILE", help="default comparison.md")
    arguments = parser.parse_all(argv)
    from newllm_jax.report.compare import comparison, read_results
    from newllm_jax.report.published import PUBLISHED_RUNS
    from newllm_jax.sources.cache import whole_file

    results = [read_results(run) for run in arguments.runs]
    text = comparison([*(PUBLISHED_RUNS if arguments.published else []), *results])
    with whole_file(Path(arguments.output)) as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"{text}\nwritten to {arguments.output}")
    return 0


def report(argv: Sequence[str]) -> int:
    """`newllm report`: writes a run's report and curves anew from its results.json, and prints the report."""
    parser = Parser(prog="newllm report", description="Print the report of a finished run.", allow_abbrev=False)
    parser.add_argument("run_dir")
    arguments = parser.parse_all(argv)
    from newllm_jax.report.plots import save_curves, save_stage_curves
    from newllm_jax.report.run_dir import RunDir
    from newllm_jax.report.tables import newllm_report

    run = RunDir.open(arguments.run_dir)
    results = run.read_json("results.json")
<<<<<<< HEAD
    try:
        text = newllm_report(results)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run.path / 'results.json'}: damaged ({error!r})") from error
=======
>>>>>>> cascade-wing
    with run:
        if results["system"] == "cascade":
            from newllm_jax.report.cascade_tables import cascade_report

            text = cascade_report(results)
            save_stage_curves(run.path / "curves.png", results["stages"], results["ensemble"], results["name"])
        else:
            from newllm_jax.report.cascade_tables import finetune_report

            text = finetune_report(results) if results["system"] == "finetune" else newllm_report(results)
            save_curves(run.path / "curves.png", results["epochs"], results["name"])
        run.write_text("report.md", text)
    print(text)
    return 0


def doctor(argv: Sequence[str]) -> int:
    """`newllm doctor`: prints what this machine and installation are, as JSON."""
    Parser(prog="newllm doctor", description="Print versions and devices.", allow_abbrev=False).parse_all(argv)
    import jax

    from newllm_jax.report.run_dir import environment
    from newllm_jax.sources.cache import cache_folder
    from newllm_jax.sources.hub import hub_answers, hub_is_offline
    from newllm_jax.training.precision import resolve_precision

    found = environment(resolve_precision("auto"))
    found |= {"devices": len(jax.devices()), "cores": os.cpu_count(), "cache": str(cache_folder())}
    print(json.dumps({**found, "hub": not hub_is_offline() and hub_answers()}, indent=2))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "cascade": cascade,
    "finetune": finetune,
    "generate": generate,
    "evaluate": evaluate,
    "compare": compare,
    "report": report,
    "doctor": doctor,
}


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: newllm COMMAND ...   (--help after a command tells its options)\n")
        print("\n".join(command.__doc__ or "" for command in COMMANDS.values()))
        return 0
    if argv[0] not in COMMANDS:
        raise InputError(f"{argv[0]}: no such command{nearest(argv[0], COMMANDS)}")
    return COMMANDS[argv[0]](argv[1:])


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


def _quiet() -> None:
    """Silences what the threads of a checkpoint say of an error beside raising it: `main` says it once, in a line."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _main_thread_only


def _main_thread_only(unraisable: sys.UnraisableHookArgs) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(unraisable)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    raise Terminated


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


<<<<<<< HEAD
def _environment_fault(error: BaseException) -> str | None:
    """A line for what is the machine's fault, not the library's: paths, a disk that takes no more, full memory."""
    fault = disk_fault(error)
    named = next((link for link in causes(error) if isinstance(link, OSError) and link.filename is not None), None)
    if fault:
        where = named.filename if named else "disk"
        return f"{where}: {fault}; make room or choose another place (what was written before is whole)"
    if named and named.errno in PATH_ERRORS:
        return f"{named.filename}: {named.strerror}"
    if any("RESOURCE_EXHAUSTED" in str(cause) or isinstance(cause, MemoryError) for cause in causes(error)):
        return "out of memory; lower batch_size"
=======
def _environment_fault(error: BaseException | None) -> str | None:
    """A line for what is the machine's fault, not the library's: a disk that takes no more, memory that is full."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            return f"{error.filename or 'disk'}: cannot be written ({error.strerror}); what was written before is whole"
        if "No space left on device" in str(error) or "Read-only file system" in str(error):
            return "the disk takes no more; what was written before is whole, make room and use --resume RUN_DIR"
        if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
            return "out of memory; lower batch_size (CASCADE: stage_layers or train_chunks, where batch_size is small)"
        error = error.__cause__ or error.__context__
>>>>>>> cascade-wing
    return None
