"""The folder of compiled programs: whose it must be, how large it grows, and that nothing in it can stop a command."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from newllm_jax.cli import process as cli
from newllm_jax.cli import programs
from newllm_jax.cli.programs import forget_programs, program_folder, seal_programs
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
    seal_programs(folder)
    for _ in range(2):  # looking at the programs is no use of them
        program_folder()
        kept = {"a-cache", "a-cache.sha256", "c-cache", "c-cache.sha256", "other"}
        assert {entry.name for entry in folder.iterdir()} == kept
    assert (folder / "a-cache").stat().st_atime == 1000
    forget_programs(folder)
    assert {entry.name for entry in folder.iterdir()} == {"other"}


def test_a_program_that_another_process_has_just_deleted_is_no_fault():
    folder = program_folder()
    (folder / "a-cache").symlink_to("nowhere")
    assert program_folder() == folder


@pytest.fixture
def sealed():
    """The folder with two sealed programs, and what checks it: the names of those that are left."""
    folder = program_folder()
    for name in "ab":
        (folder / f"{name}-cache").write_bytes(name.encode() * 1000)
    seal_programs(folder)

    def left():
        assert program_folder() == folder
        names = {entry.name for entry in folder.iterdir()}
        assert {f"{name}.sha256" for name in names if name.endswith("-cache")} <= names
        return {name.removesuffix("-cache") for name in names if name.endswith("-cache")}

    return folder, left


def test_only_programs_that_are_what_was_sealed_are_left(sealed):
    folder, left = sealed
    assert left() == {"a", "b"}
    (folder / "c-cache").write_bytes(b"of a process that was killed")
    assert left() == {"a", "b"}
    (folder / "a-cache").write_bytes(b"a" * 999 + b"b")
    assert left() == {"b"}
    (folder / "b-cache.sha256").write_bytes(b"")
    assert left() == set()


def test_programs_that_are_swapped_are_not_run(sealed):
    folder, left = sealed
    for ending in ("-cache", "-cache.sha256"):
        (folder / f"a{ending}").rename(folder / "aside")
        (folder / f"b{ending}").rename(folder / f"a{ending}")
        (folder / "aside").rename(folder / f"b{ending}")
    assert left() == set()


def test_what_is_no_file_is_no_program(sealed):
    folder, left = sealed
    (folder / "a-cache").unlink()
    os.mkfifo(folder / "a-cache")
    (folder / "b-cache.sha256").unlink()
    os.mkfifo(folder / "b-cache.sha256")
    assert left() == set()


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

programs = cli._keep_programs()
import jax

def compiled():
    jax.clear_caches()
    jax.jit(lambda x: x * 3 + 1)(2.0).block_until_ready()
    return {entry.name: entry.stat().st_mtime_ns for entry in folder.glob("*-cache")}

(folder,) = Path(sys.argv[1]).iterdir()
assert programs == folder
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


TWO_PROGRAMS = """
import sys
from newllm_jax.cli import commands, process as cli

def compute(argv):
    import jax
    for function in (lambda x: x * 3 + 1, lambda x: x * 5 + 2):
        print(jax.jit(function)(2.0))

commands.COMMANDS["doctor"] = compute
sys.exit(cli.main(["doctor"]))
"""


def test_a_command_computes_what_it_says_whatever_lies_in_the_folder(cache):
    def run(at_once):
        command = [sys.executable, "-c", TWO_PROGRAMS]
        started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for _ in range(at_once)]
        assert [process.communicate(timeout=120)[0] for process in started] == [b"7.0\n12.0\n"] * at_once
        assert not any(process.returncode for process in started)
        return {entry.name: entry.stat().st_mtime_ns for entry in folder.iterdir()}

    folder = program_folder()
    first = run(at_once=2)
    assert len(first) == 4  # two programs, two seals
    one, other = sorted(folder.glob("*-cache"))
    one_content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(one_content)
    second = run(at_once=1)
    assert second.keys() == first.keys() and not set(second.items()) & set(first.items())
