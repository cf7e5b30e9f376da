"""Files that are whole or absent, and where the cache lies."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from newllm_jax.files import cache_folder, naming, whole_file


def test_where_the_cache_lies(monkeypatch):
    monkeypatch.setenv("NEWLLM_CACHE", "/own")
    assert cache_folder() == Path("/own")
    monkeypatch.delenv("NEWLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/the/user")
    assert cache_folder() == Path("/of/the/user/newllm_jax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/newllm_jax")


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


def test_a_full_disk_names_the_file_that_was_written(tmp_path):
    with pytest.raises(OSError, match=r"file\.txt") as caught, whole_file(tmp_path / "file.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.filename == str(tmp_path / "file.txt")
    with pytest.raises(OSError, match="inner") as caught, naming(Path("outer")):
        raise OSError(errno.ENOSPC, "No space left on device", "inner")
    assert caught.value.errno == errno.ENOSPC
