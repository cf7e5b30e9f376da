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

import absl.logging

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


def generate(argv: Sequence[str]) -> int:
    """`newllm generate`: streams text from a run."""
    parser = Parser(prog="newllm generate", description="Stream text from a trained model.", allow_abbrev=False)
    parser.add_argument("run_dir")
    parser.add_argument("--prompt", default="", help="the text to go on with; any will do")
    parser.add_argument("--max_words", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most probable word")
    parser.add_argument("--top_k", type=int, default=0, help="only the k most probable words; 0: all")
    parser.add_argument("--top_p", type=float, default=0.95, help="only words up to this total probability; 1: all")
    parser.add_argument("--unknown", action="store_true", help="let <UNK> be chosen too")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_all(argv)
    from newllm_jax.newllm.generate import Sampling, generate
    from newllm_jax.runs import restore

    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.unknown)
    run = restore(arguments.run_dir)
    prompt = arguments.prompt or ""  # argparse makes an empty list of `--`
    words = generate(run, prompt, max_words=arguments.max_words, seed=arguments.seed, sampling=sampling)
    print(prompt, end=" " if prompt else "", flush=True)
    for word in words:
        print(word, end=" ", flush=True)
    print()
    return 0


def report(argv: Sequence[str]) -> int:
    """`newllm report`: writes a run's report and curves anew from its results.json, and prints the report."""
    parser = Parser(prog="newllm report", description="Print the report of a finished run.", allow_abbrev=False)
    parser.add_argument("run_dir")
    arguments = parser.parse_all(argv)
    from newllm_jax.report.plots import save_curves
    from newllm_jax.report.run_dir import RunDir
    from newllm_jax.report.tables import newllm_report

    run = RunDir.open(arguments.run_dir)
    results = run.read_json("results.json")
    try:
        text = newllm_report(results)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{run.path / 'results.json'}: damaged ({error!r})") from error
    with run:
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
    "generate": generate,
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


def _add_run_options(parser: Parser, config_class: type[RunConfig], default: str) -> None:
    parser.add_argument("--config", help=f"a configuration by name, or a TOML or JSON file (default {default})")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on with a run instead of starting one")
    parser.add_argument("--run_root", metavar="DIR", default="runs", help="where run directories go (default runs)")
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
    return None
