"""Hidden states in files without a name: what is written is read, a full disk is told, what was read leaves memory."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from newllm_jax.cascade import states
from newllm_jax.cascade.states import States, release, spare_folder

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("in_files", [False, True])
def test_what_is_written_is_read(in_files, tmp_path):
    blocks = [np.random.default_rng(size).normal(size=(size, 3)).astype(np.float32) for size in (4, 1, 0, 2)]
    written = States(3, tmp_path / "new" if in_files else None)
    for block in blocks:
        written.append(block[:, ::-1])
    found = written.array()
    assert isinstance(found, np.memmap) == in_files
    np.testing.assert_array_equal(found, np.concatenate(blocks)[:, ::-1])
    assert States(3, tmp_path if in_files else None).array().shape == (0, 3)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_is_told_with_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(states.tempfile, "TemporaryFile", lambda **_: Path("/dev/full").open("wb", buffering=0))  # noqa: SIM115
    written = States(3, tmp_path)
    with pytest.raises(OSError, match="No space left") as raised:
        written.append(np.ones((2, 3), np.float32))
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path))


def mapped_bytes() -> int:
    """Bytes of this process's memory that are parts of files."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssFile"].split()[0]) * 1024


def test_what_was_read_leaves_memory(tmp_path):
    written = States(1024, tmp_path)
    written.append(np.ones((8192, 1024), np.float32))  # 32 MiB
    found, before = written.array(), mapped_bytes()
    assert found[:, 0].sum() == 8192
    assert mapped_bytes() - before > 2**24
    release(found[5:])  # a part of it gives back all
    assert mapped_bytes() - before < 2**23
    assert found[:, 1].sum() == 8192
    release(np.ones(3))  # in memory: nothing happens


def test_few_hidden_states_of_a_command_stay_in_memory(monkeypatch, tmp_path):
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path))
    monkeypatch.setattr(states, "SMALL", 100 * 3 * 4)
    assert (spare_folder(100, 3), spare_folder(101, 3)) == (None, tmp_path)
