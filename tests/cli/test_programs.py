"""The folder of compiled programs: whose it must be, how large it grows, and that nothing in it can stop a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from newllm_jax.cli import process as cli
from newllm_jax.cli import programs
from newllm_jax.cli.programs import forget_programs, program_folder
from newllm_jax.errors import InputError

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of our own, and no setting of JAX's."""
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("JAX_")]:
        monkeypatch.delenv(name)
    return tmp_path


def test_it_is_for_its_owner_and_one_kind_of_processor(cache, monkeypatch):
    folder = program_folder()
    assert folder.parent == cache
    assert folder.stat().st_mode & 0o777 == 0o700
    assert program_folder() == folder
    monkeypatch.setattr(programs.platform, "machine", lambda: "another")
    assert program_folder() != folder


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(mode):
    program_folder().chmod(mode)
    with pytest.raises(InputError, match="another user's or others can write to it: compiled programs are not stored"):
        program_folder()


def test_a_folder_of_another_user_is_not_used(tmp_path, monkeypatch):
    folder = program_folder()
    with monkeypatch.context() as patch, pytest.raises(InputError, match="another user's"):
        patch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        program_folder()
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="another user's"):
        program_folder()


def test_the_programs_that_were_unused_for_longest_make_room(monkeypatch):
    monkeypatch.setattr(programs, "LARGEST", 250)
    folder = program_folder()
    for name, read, written in (("a", 1000, 1000), ("b", 998, 998), ("c", 999, 0), ("d", 0, 997)):
        (folder / f"{name}-cache").write_bytes(bytes(100))
        os.utime(folder / f"{name}-cache", (read, written))
    (folder / "other").write_bytes(bytes(1000))
    program_folder()
    assert {entry.name for entry in folder.iterdir()} == {"a-cache", "c-cache", "other"}
    forget_programs(folder)
    assert {entry.name for entry in folder.iterdir()} == {"other"}


def test_a_program_that_another_process_has_just_deleted_is_no_fault():
    folder = program_folder()
    (folder / "a-cache").symlink_to("nowhere")
    assert program_folder() == folder


@pytest.fixture
def told(monkeypatch, capsys):
    """What a command that begins tells JAX, and the user."""
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)
    monkeypatch.delitem(sys.modules, "jax", raising=False)

    def tell():
        before = set(os.environ)
        cli._keep_programs()
        new = {name: os.environ[name] for name in set(os.environ) - before}
        for name in new:
            monkeypatch.delenv(name)
        return new, capsys.readouterr().err

    return tell


def test_what_jax_is_told(told, monkeypatch):
    wanted = {"JAX_COMPILATION_CACHE_DIR": str(program_folder()), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    assert told() == (wanted, "")
    monkeypatch.setitem(sys.modules, "jax", pytest)
    assert told() == ({}, "")  # a process that has it set up already


@pytest.mark.parametrize("name", cli.CACHE_SETTINGS)
def test_the_user_knows_better(told, cache, monkeypatch, name):
    monkeypatch.setenv(name, "")
    assert told() == ({}, "")
    assert list(cache.iterdir()) == []


def test_what_cannot_be_used_costs_a_line_at_most(told, cache, monkeypatch):
    folder = program_folder()
    folder.chmod(0o777)
    reason = f"{folder} is another user's or others can write to it: compiled programs are not stored there"
    assert told() == ({}, f"note: {reason}\n")
    monkeypatch.setenv("NEWLLM_CACHE", str(cache / "file"))
    (cache / "file").write_text("")
    assert told() == ({}, "")


COMMAND = """
import shutil, sys
from pathlib import Path
from newllm_jax.cli import process as cli
assert cli.main(["doctor"]) == 0
import jax

def compiled():
    jax.clear_caches()
    jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
    return {entry.name: entry.stat().st_mtime_ns for entry in folder.glob("*-cache")}

(folder,) = Path(sys.argv[1]).iterdir()
first = compiled()
assert first
assert compiled() == first
for name in first:
    (folder / name).write_bytes((folder / name).read_bytes()[:40])
mended = compiled()
assert mended.keys() == first.keys()
assert all(len((folder / name).read_bytes()) > 40 for name in mended)
assert compiled() == mended
shutil.rmtree(folder)
folder.write_text("a folder that takes no more")
assert compiled() == {}
"""


def test_a_command_keeps_its_programs_and_damage_costs_nothing_else(cache):
    ran = subprocess.run([sys.executable, "-c", COMMAND, cache], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
