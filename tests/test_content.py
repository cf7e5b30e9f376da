"""Hashes of arrays: of what they hold, not of how they lie in memory. Files of arrays: what was written, or nothing."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest

from newllm_jax.content import (
    array_sha256,
    arrays_written,
    check_seal,
    map_arrays,
    read_arrays,
    sealed,
    write_arrays,
)  # fmt: skip
from newllm_jax.errors import Note

pytestmark = pytest.mark.quick


def test_the_hash_is_that_of_type_shape_and_bytes():
    array = np.arange(6, dtype="<f4").reshape(2, 3)
    expected = hashlib.sha256(b"float32 <f4 (2, 3)\n" + array.tobytes()).hexdigest()
    assert array_sha256(array) == expected
    assert array_sha256(np.asfortranarray(array)) == expected
    assert array_sha256(np.stack([array, array], -1)[..., 0]) == expected


def test_whatever_differs_changes_the_hash():
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    flipped = array.copy()
    flipped.view(np.uint8)[1, 7] ^= 1
    bits = np.array([1, 2], np.uint16)
    different = [
        array, flipped, array.T, array.ravel(), array[None], array.view(np.int32), array.view(">f4"), -0.0 * array,
        np.abs(0.0 * array), array[:0], array[:, :0], np.array("a"), np.array("b"), np.array(["a"]), np.float32(1)[...],
        bits, bits.view(np.float16), bits.view(jnp.bfloat16),
    ]  # fmt: skip
    assert len({array_sha256(each) for each in different}) == len(different)
    with pytest.raises(TypeError, match="Python objects"):
        array_sha256(np.array([None]))


def test_a_sealed_object_is_what_was_written_or_an_error():
    content = {"loss": 0.1, "list": [1, 2.5, None], "text": "é\ud800", "nested": {"b": 1, "a": True}}
    written = json.loads(json.dumps(sealed(content)))
    check_seal(written, required=True)
    assert {**content, "sha256": written["sha256"]} == written
    assert sealed(written) == written  # sealing again changes nothing
    for damaged in ({**written, "loss": 0.2}, {**written, "more": 1}, {**written, "sha256": "0" * 64}, [], "text"):
        with pytest.raises(ValueError):
            check_seal(damaged, required=False)
    check_seal(content, required=False)
    with pytest.raises(ValueError, match="it has no sha256"):
        check_seal(content, required=True)


ARRAYS = {
    "numbers": np.arange(24, dtype=np.float32).reshape(4, 6)[:, ::2], "ids": np.arange(5, dtype=np.uint16),
    "hits": np.array([True, False]), "none": np.zeros((0, 3), np.int32), "one": np.float32(2)[...],
}  # fmt: skip


readers = pytest.mark.parametrize("read", [read_arrays, map_arrays])


@readers
def test_arrays_are_read_as_they_were_written(tmp_path, read):
    file = tmp_path / "new" / "file.arrays"
    assert read(file, ["key", 1]) is None  # absent, which is nothing to tell
    write_arrays(file, ["key", 1], ARRAYS)
    found = read(file, ["key", 1])
    assert found is not None and found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert array_sha256(found[name]) == array_sha256(array)
    assert list(file.parent.iterdir()) == [file]


@readers
def test_arrays_of_another_key_are_not_read(tmp_path, read):
    write_arrays(tmp_path / "a", {"split": "train", "start": 1}, ARRAYS)
    assert read(tmp_path / "a", {"start": 1, "split": "train"})
    for key in ({"split": "train", "start": 2}, {"split": "test", "start": 1}, {"split": "train", "start": "1"}, None):
        with pytest.warns(Note, match=f"^{tmp_path}/a: damaged, or of something else; its content is made anew$"):
            assert read(tmp_path / "a", key) is None


@pytest.mark.filterwarnings("ignore::newllm_jax.errors.Note")
@readers
def test_no_damage_is_read(tmp_path, read):
    write_arrays(tmp_path / "whole", 0, ARRAYS)
    whole, draw = (tmp_path / "whole").read_bytes(), random.Random(0)
    for trial in range(600):
        damaged, place = bytearray(whole), draw.randrange(len(whole))
        if trial % 3 == 0:
            damaged[place] ^= 1 << draw.randrange(8)
        elif trial % 3 == 1:
            del damaged[place:]
        else:
            damaged[place : place + draw.randrange(20)] = draw.randbytes(draw.randrange(1, 20))
        (tmp_path / "damaged").write_bytes(damaged)
        assert damaged == whole or read(tmp_path / "damaged", 0) is None


@readers
def test_a_right_hash_over_what_cannot_be_read(tmp_path, read):
    for content in (
        b"",
        b"words",
        (2**60).to_bytes(8, "little") + b"{}",
        b"\2\0\0\0\0\0\0\0{}0000",
        b"\2\0\0\0\0\0\0\0[]",
    ):
        (tmp_path / "forged").write_bytes(hashlib.sha256(b"0\n" + content).digest() + content)
        with pytest.warns(Note):
            assert read(tmp_path / "forged", 0) is None


@readers
def test_what_is_no_file_is_absent(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    for name in ("pipe", "folder", "loop", "file/file", "x" * 300):
        assert read(tmp_path / name, 0) is None


@readers
def test_a_huge_file_costs_no_memory(tmp_path, read):
    with (tmp_path / "huge").open("wb") as stream:
        stream.truncate(2**28)
    tracemalloc.start()
    with pytest.warns(Note):
        assert read(tmp_path / "huge", 0) is None
    assert tracemalloc.get_traced_memory()[1] < 2**23
    tracemalloc.stop()


def test_arrays_that_are_written_in_pieces(tmp_path):
    key, array = ["key", 1], np.arange(24, dtype=np.uint16).reshape(6, 4)
    shapes = {"a": (np.uint16, (6, 4)), "head": (np.uint8, (3,))}
    with arrays_written(tmp_path / "a", key, shapes) as writer:
        for part in (array[:4], array[:0], array[4:]):
            writer.write(part)
        writer.write(b"abc")
    for read in (read_arrays, map_arrays):
        found = read(tmp_path / "a", key)
        assert found is not None and np.array_equal(found["a"], array) and found["head"].tobytes() == b"abc"
    whole = (tmp_path / "a").read_bytes()
    too_few = pytest.raises(ValueError, match="48 bytes were written of arrays of 51")
    with too_few, arrays_written(tmp_path / "a", key, shapes) as writer:
        writer.write(array)
    assert (tmp_path / "a").read_bytes() == whole and [*tmp_path.iterdir()] == [tmp_path / "a"]


def test_mapped_arrays_outlive_their_file_and_cannot_be_changed(tmp_path):
    write_arrays(tmp_path / "a", 0, ARRAYS)
    found = map_arrays(tmp_path / "a", 0)
    write_arrays(tmp_path / "a", 0, {"ids": ARRAYS["ids"] + 1})
    assert found is not None and np.array_equal(found["ids"], ARRAYS["ids"])
    with pytest.raises(ValueError, match="read-only"):
        found["ids"][0] = 1


WRITE_AND_READ = """
import sys
from pathlib import Path
import numpy as np
from newllm_jax.content import read_arrays, write_arrays
for number in range(30):
    write_arrays(Path(sys.argv[1]), 0, {"a": np.full(200_000, number)})
    assert len(set(read_arrays(Path(sys.argv[1]), 0)["a"].tolist())) == 1
"""


def test_two_processes_write_one_file(tmp_path):
    command = [sys.executable, "-W", "error", "-c", WRITE_AND_READ, tmp_path / "file"]
    both = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
