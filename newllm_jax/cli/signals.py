"""SIGINT and SIGTERM end a command within seconds, with one line and the exit code of the signal.

They are blocked in every thread but one, which waits for them: nothing is interrupted by them where it cannot be, in an
import, a compilation or a callback of JAX. This file is imported before all others and imports next to nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

SECONDS = 5.0  # left to a run to end by itself
WORDS = {signal.SIGINT: "stopped", signal.SIGTERM: "terminated"}
SHOW_CURSOR = "\r\x1b[2K\x1b[?25h"  # a progress bar hides it

_came: signal.Signals | None = None
_looked_for = False
_ends = threading.Lock()


def listen() -> None:
    """Listens for signals from now on, where this process is a command's own: its only thread calls this.

    A notebook has threads already; there Ctrl-C stays a KeyboardInterrupt. A signal that is ignored, as in the
    background of a script, stays ignored.
    """
    wanted = {each for each in WORDS if signal.getsignal(each) is not signal.SIG_IGN}
    if threading.active_count() == 1:
        signal.pthread_sigmask(signal.SIG_BLOCK, wanted)  # threads that start later inherit it
        threading.Thread(target=_wait, args=(wanted,), daemon=True).start()


def came() -> bool:
    """Whether a signal came. From the first call on a signal leaves the caller 5 seconds to end; before, none."""
    global _looked_for
    _looked_for = True
    return _came is not None


def end(advice: str = "") -> None:
    """Ends the process with the line and code of the signal, wherever its other threads are; returns if none came.

    Args:
      advice: what the line says after its first word.
    """
    if _came is None:
        return
    _ends.acquire()  # never released: there is one line
    start = SHOW_CURSOR if sys.stderr.isatty() else ""
    line = f"{start}error: {WORDS[_came]}{advice and f'; {advice}'}\n"
    try:
        os.write(2, line.encode(errors="replace"))  # past the buffer, which another thread may hold
    finally:
        os._exit(128 + _came)


def _wait(wanted: set[signal.Signals]) -> None:
    global _came
    _came = signal.Signals(signal.sigwait(wanted))
    deadline = time.monotonic() + (SECONDS if _looked_for else 0.0)
    while time.monotonic() < deadline and not wanted & signal.sigpending():
        time.sleep(0.02)
    end("--resume RUN_DIR continues after the last checkpoint" if _looked_for else "")
