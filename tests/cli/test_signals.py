"""Signals end a process with one line and their code: at once, or by itself where it looks for them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("ctrl_c")]

CODES = [(signal.SIGINT, 130, "stopped"), (signal.SIGTERM, 143, "terminated")]
BUSY = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # minutes in C
NOBODY_LOOKS = f"signals.listen(); print('ready', flush=True); {BUSY}"
LOOKS_AND_IS_BUSY = f"signals.listen(); signals.came(); print('ready', flush=True); {BUSY}"
LOOKS = """
signals.listen(); signals.came(); print('ready', flush=True)
while not signals.came(): time.sleep(0.01)
print('tidied up', flush=True); signals.end('more'); print('not reached')
"""


@pytest.fixture
def started():
    """Starts a Python process that listens for signals, and returns when it does."""
    processes = []

    def start(code, seconds=0.5, ignored=()):
        code = f"import time; from newllm_jax.cli import signals; signals.SECONDS = {seconds}; {code}"
        before = {each: signal.signal(each, signal.SIG_IGN) for each in ignored}
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for each, handler in before.items():
            signal.signal(each, handler)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ended(process):
    """Exit code, stdout, stderr and the seconds until then."""
    since = time.monotonic()
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err, time.monotonic() - since


@pytest.mark.parametrize(("sent", "code", "word"), CODES)
def test_where_nobody_looks_a_signal_ends_the_process_at_once(started, sent, code, word):
    process = started(NOBODY_LOOKS, seconds=60)
    process.send_signal(sent)
    *end, seconds = ended(process)
    assert end == [code, "", f"error: {word}\n"]
    assert seconds < 5


@pytest.mark.parametrize(("sent", "code", "word"), CODES)
def test_who_looks_ends_by_himself_and_says_what_he_wants(started, sent, code, word):
    process = started(LOOKS, seconds=60)
    process.send_signal(sent)
    *end, seconds = ended(process)
    assert end == [code, "tidied up\n", f"error: {word}; more\n"]
    assert seconds < 5


@pytest.mark.parametrize(("sent", "code", "word"), CODES)
def test_who_does_not_come_to_look_is_ended_after_a_while(started, sent, code, word):
    process = started(LOOKS_AND_IS_BUSY, seconds=1)
    process.send_signal(sent)
    *end, seconds = ended(process)
    assert end == [code, "", f"error: {word}; --resume RUN_DIR continues after the last checkpoint\n"]
    assert seconds > 0.9


@pytest.mark.parametrize(("sent", "code", "word"), CODES)
def test_a_second_signal_ends_it_at_once(started, sent, code, word):
    process = started(LOOKS_AND_IS_BUSY, seconds=60)
    process.send_signal(sent)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(sent)
    *end, seconds = ended(process)
    assert end == [code, "", f"error: {word}; --resume RUN_DIR continues after the last checkpoint\n"]
    assert seconds < 5


def test_a_signal_that_the_process_was_started_with_ignored_stays_ignored(started):
    process = started(NOBODY_LOOKS, ignored=[signal.SIGINT])
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[:3] == (143, "", "error: terminated\n")


def test_a_process_with_threads_of_its_own_keeps_its_signals(started):
    """A notebook, where Ctrl-C is a KeyboardInterrupt."""
    thread = "import signal, threading; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    blocked = "print(signal.pthread_sigmask(signal.SIG_BLOCK, ()), flush=True)"
    process = started(f"{thread}; signals.listen(); print('ready', flush=True); {blocked}; time.sleep(60)")
    assert process.stdout.readline() == "set()\n"
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in ended(process)[2]
