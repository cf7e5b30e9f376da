"""Files that are whole or absent, where the cache lies, and files that nobody vouches for."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from newllm_jax.errors import InputError
from newllm_jax.files import (
    DEEPEST,
    LARGEST_TOML,
    cache_folder,
    naming,
    read_json,
    read_text,
    read_toml,
    whole_file,
    whole_folder,
)


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("NEWLLM_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("NEWLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/the/user")
    assert cache_folder() == Path("/of/the/user/newllm_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/newllm_jax")


@pytest.mark.parametrize("before", ["absent", "empty"])
def test_a_folder_appears_whole(tmp_path, before):
    path = tmp_path / "new" / "folder"
    if before == "empty":
        path.mkdir(parents=True)
    with whole_folder(path) as partial:
        (partial / "file").write_text("whole")
        assert not (path / "file").exists()
    assert (path / "file").read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o755
    with pytest.raises(OSError, match="not empty"), whole_folder(path):
        pass
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "other"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == [path.parent]


def test_a_folder_of_a_process_that_was_killed_vanishes(tmp_path):
    code = KILLED.replace("whole_file", "whole_folder").replace("partial.write", '(partial / "file").write')
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "folder")], stdin=-1, stdout=-1) as process:
        assert process.stdout and process.stdout.readline()
        with whole_folder(tmp_path / "folder") as mine:
            assert len(list(tmp_path.iterdir())) == 2  # it lives: its folder is left alone
            (mine / "mine").touch()
        process.kill()
    assert len(list(tmp_path.iterdir())) == 2
    (tmp_path / ".folder.notes").mkdir()
    (tmp_path / "folder" / "mine").unlink()
    with whole_folder(tmp_path / "folder"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == [".folder.notes", "folder"]


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with whole_file(path) as partial:
        partial.write_text("half")
        assert not path.exists()
        assert partial.suffix == path.suffix  # writers that look at the ending see the same one
        partial.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]
    assert path.stat().st_mode & 0o777 == 0o644  # not the 0600 of temporary files


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_what_fails_leaves_the_file_as_it_was(tmp_path, fault):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(type(fault)), whole_file(path) as partial:
        partial.write_text("half")
        raise fault
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, sys
from pathlib import Path
from newllm_jax.files import whole_file
with whole_file(Path(sys.argv[1])) as partial:
    partial.write_text("half")
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(1)
"""


def test_what_a_killed_process_leaves_vanishes_and_what_a_live_one_writes_stays(tmp_path):
    path = tmp_path / "[file].txt"
    (tmp_path / ".other.txt.abc.txt").write_text("another's")
    command = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        with whole_file(path) as partial:
            partial.write_text("whole")
        assert len(list(tmp_path.glob(".*file*"))) == 1  # the process may still finish it
        process.stdin.close()
    assert len(list(tmp_path.glob(".*file*"))) == 1
    with whole_file(path) as partial:
        partial.write_text("again")
    assert sorted(file.name for file in tmp_path.iterdir()) == [".other.txt.abc.txt", "[file].txt"]


@pytest.mark.parametrize("create", [whole_file, whole_folder])
def test_what_another_process_deletes_before_it_is_locked_is_created_again(monkeypatch, tmp_path, create):
    """For a moment, what is new looks like what a killed process has left."""
    path, locks, lock = tmp_path / "name", [], fcntl.flock

    def create_another() -> None:
        with create(path):
            pass

    def lock_late(handle, how):
        locks.append(handle)
        if len(locks) == 1:
            create_another()
        lock(handle, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with create(path) as partial:
        create_another()  # which leaves alone what is locked
        assert partial.exists()
        (partial if create is whole_file else partial / "file").write_text("mine")
    assert (path if create is whole_file else path / "file").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file_that_was_written(tmp_path):
    with pytest.raises(OSError, match=r"file\.txt") as caught, whole_file(tmp_path / "file.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file.txt")
    with pytest.raises(OSError, match="inner") as caught, naming(Path("outer")):
        raise OSError(errno.ENOSPC, "No space left on device", "inner")
    assert caught.value.errno == errno.ENOSPC


def refuses(read, path, message):
    with pytest.raises(InputError) as raised:
        read(path)
    assert message in str(raised.value) and str(path) in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_json_and_toml_are_read_as_they_are(tmp_path, encoding):
    content = {"text": "Grüße \U0001f600\r\n", "list": [1, -2.5, True, None, {}, 10**30]}
    (tmp_path / "a.json").write_text(json.dumps(content), encoding)  # the emoji as two escapes
    assert read_json(tmp_path / "a.json") == content
    (tmp_path / "a.toml").write_text('text = "ü"\nlist = [1.5, 2]\n', encoding)
    assert read_toml(tmp_path / "a.toml") == {"text": "ü", "list": [1.5, 2]}
    (tmp_path / "deep.json").write_text("[" * DEEPEST + "]" * DEEPEST)
    assert str(read_json(tmp_path / "deep.json")) == "[" * DEEPEST + "]" * DEEPEST


@pytest.mark.parametrize("read", [read_text, read_json, read_toml])
def test_only_files_with_an_end_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    refuses(read, tmp_path / "pipe", "not a regular file")
    refuses(read, tmp_path, "not a regular file")
    refuses(read, Path("/dev/zero"), "not a regular file")
    refuses(read, tmp_path / "absent", "cannot be read (No such file or directory)")
    refuses(read, tmp_path / ("a" * 300), "cannot be read (File name too long)")
    with pytest.raises(InputError, match="not a file name"):
        read(tmp_path / "a\0b")
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**40)
    refuses(read, tmp_path / "huge", "1,099,511,627,776 bytes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON (Expecting property name"),
        (b"", "not valid JSON (Expecting value"),
        (b'{"a": 1, "b": 2, "a": 3}', "not valid JSON ('a' is there twice)"),
        (b'{"%s": 1, "%s": 3}' % (b"a" * 10**6, b"a" * 10**6), "is there twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * (DEEPEST + 1) + b"]" * (DEEPEST + 1), f"nested more than {DEEPEST} deep"),
        (b"[1%s]" % (b"0" * 400), "not finite or beyond float64"),
        (b"1" * 5000, "limit (4300 digits)"),
        (b"[1e400]", "not finite or beyond float64"),
        (b"[-Infinity]", "not finite or beyond float64"),
        (b'{"a": {"b": NaN}}', "not finite or beyond float64"),
        (rb'{"a": "\ud800"}', "surrogates not allowed"),
        (rb'{"\udc00": 1}', "surrogates not allowed"),
        (b"\x80", "not UTF-8 (byte 0x80 at 0)"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 (byte 0xff at 0)"),
    ],
)
def test_json_that_would_fail_later_is_refused(tmp_path, content, message):
    (tmp_path / "bad.json").write_bytes(content)
    refuses(read_json, tmp_path / "bad.json", message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a = ", "not valid TOML (Invalid value"),
        (b"a = 1\na = 2", "not valid TOML (Cannot overwrite a value"),
        (b"a = " + b"[" * 10_000, "nested too deeply"),
        (b"a = nan", "not finite or beyond float64"),
        (b"a = [-inf]", "not finite or beyond float64"),
        (b"a = 1" + b"0" * 400, "not finite or beyond float64"),
        (b"a = 1" + b"0" * 5000, "limit (4300 digits)"),
        (b".".join([b"a"] * 200) + b" = 1", f"nested more than {DEEPEST} deep"),
        (b"a = 1 # " + b"x" * LARGEST_TOML, "16,392 bytes"),
        ("a = 1".encode("utf-16"), "not UTF-8 (byte 0xff at 0)"),
    ],
)
def test_toml_that_would_fail_later_is_refused(tmp_path, content, message):
    (tmp_path / "bad.toml").write_bytes(content)
    refuses(read_toml, tmp_path / "bad.toml", message)
