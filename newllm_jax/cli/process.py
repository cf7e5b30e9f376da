"""The process: signals, quiet libraries, and every error as one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import absl.logging

from newllm_jax.cli import signals
from newllm_jax.cli.commands import COMMANDS
from newllm_jax.cli.programs import forget_programs, program_folder, seal_programs
from newllm_jax.config import nearest
from newllm_jax.errors import InputError, Note, NumericalError, causes, disk_fault, memory_fault, named
from newllm_jax.systems import SYSTEMS

PATH_ERRORS = {
    errno.EACCES,
    errno.ENOENT,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}

NO_DEVICE = "Unable to initialize backend"  # JAX, of a kind of device that it does not have or know
CACHE_SETTINGS = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code; ends the process where a signal came.

    It is 0, 1 (`doctor`: something fails), 2 (bad input) or 3 (failed by its numbers).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if not debug:
        _quiet()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A prompt may be no text in the terminal's encoding; a signal leaves no time to write what is buffered.
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        return _run(argv, debug)
    finally:
        signals.end()


def _run(argv: Sequence[str], debug: bool) -> int:
    try:
        return _dispatch(argv)
    except (InputError, NumericalError) as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing more to say
        return 0
    except Exception as error:
        reason = _environment_fault(error, argv[0] if argv else "")
        if debug or reason is None:
            raise
        return _fail(reason, 2)


def _dispatch(argv: Sequence[str]) -> int:
    if not argv:
        raise InputError(f"usage: newllm COMMAND ..., one of {', '.join(COMMANDS)}; --help describes them")
    if argv[0] in ("-h", "--help"):
        print("usage: newllm COMMAND ...   (--help after a command lists its options)\n")
        print("\n".join(command.__doc__ or "" for command in COMMANDS.values()))
        return 0
    if argv[0] not in COMMANDS:
        raise InputError(f"{named(argv[0])}: no such command{nearest(argv[0], COMMANDS)}")
    helped = not {"-h", "--help"}.isdisjoint(argv)  # checking many programs takes longer than the help
    programs = None if helped else _keep_programs()
    try:
        code = COMMANDS[argv[0]](argv[1:])
    finally:
        if programs:
            with contextlib.suppress(OSError):
                seal_programs(programs)
    return code or 0


def _keep_programs() -> Path | None:
    """Tells JAX, which is not imported yet, where compiled programs are kept, unless the user told it; returns where.

    A program that cannot be written or read is compiled again, without a message.
    """
    if "jax" in sys.modules or not os.environ.keys().isdisjoint(CACHE_SETTINGS):
        return None
    try:
        folder = program_folder()
    except OSError:
        return None
    except InputError as error:
        print(f"note: {error}", file=sys.stderr)
        return None
    os.environ[CACHE_SETTINGS[0]] = str(folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    show = warnings.showwarning

    def show_others(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if str(message).startswith("Error reading persistent compilation cache entry"):
            with contextlib.suppress(OSError):
                forget_programs(folder)
        elif not str(message).startswith("Error writing persistent compilation cache entry"):
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_others
    return folder


def _quiet() -> None:
    """Silences what the threads of a checkpoint say of an error beside raising it: `main` says it once, in a line."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    sys.unraisablehook = _main_thread_only
    show = warnings.showwarning

    def show_notes_in_a_line(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if issubclass(category, Note):
            print(f"note: {' '.join(str(message).split())}", file=sys.stderr)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_notes_in_a_line


def _main_thread_only(unraisable: sys.UnraisableHookArgs) -> None:
    if threading.current_thread() is threading.main_thread():
        sys.__unraisablehook__(unraisable)


def _fail(message: str, code: int) -> int:
    signals.end()
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _environment_fault(error: BaseException, command: str) -> str | None:
    """A line for what is the machine's fault, not the library's: paths, a full disk or memory, no such device."""
    fault = disk_fault(error)
    with_name = next((link for link in causes(error) if isinstance(link, OSError) and link.filename is not None), None)
    if fault:
        where = with_name.filename if with_name else "disk"
        return f"{where}: {fault}; make room or choose another place (what was written before is whole)"
    if with_name and with_name.errno in PATH_ERRORS:
        return f"{with_name.filename}: {with_name.strerror}"
    no_device = next((str(link) for link in causes(error) if str(link).startswith(NO_DEVICE)), None)
    if no_device:
        return f"JAX_PLATFORMS: {no_device}"
    asked = memory_fault(error)
    return None if asked is None else _out_of_memory(error, asked, command)


def _out_of_memory(error: BaseException, asked: str, command: str) -> str:
    """A line that tells what was asked for, what is free, and what to lower."""
    from newllm_jax.training.memory import device_memory, host_memory

    on_host = any(isinstance(cause, MemoryError) for cause in causes(error))
    _, free = host_memory() if on_host else device_memory()
    trained = [system.less_memory for system in SYSTEMS.values() if system.command == command]
    if command == "sweep":
        trained = ["lower at_once (--resume goes on with it), or micro_batch and batch_size"]
    remedy = trained[0] if trained else "close what else needs memory, or use a CPU (JAX_PLATFORMS=cpu)"
    known = "" if free is None else f", {free / 2**30:.2f} GiB are free"
    return f"out of memory{' of the host' if on_host else ''}: {asked} asked for{known}; {remedy}"
