"""The cut of rows into chunks."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from newllm_jax.errors import InputError
from newllm_jax.smollm.alpaca import chunk_rows, row_chunks, row_text


class Characters:
    """A tokenizer whose ids are the code points."""

    def encode(self, text):
        return [ord(character) for character in text]


def rows_of(*lengths):
    """Rows whose text has these many characters: a letter for each row, and two line breaks."""
    return [{"instruction": chr(97 + i) * (n - 2), "input": "", "output": ""} for i, n in enumerate(lengths)]


def letters(chunks):
    """The row that each chunk comes from."""
    return "".join(chr(chunk[0]) for chunk in chunks)


def test_text_of_a_row():
    assert row_text({"instruction": "Add.", "input": "1 2", "output": "3"}, 0) == "Add.\n1 2\n3"
    assert row_text({"instruction": "Hi", "input": None, "output": "Hello"}, 0) == "Hi\n\nHello"


@pytest.mark.parametrize(("length", "chunks"), [(0, 0), (128, 0), (129, 1), (256, 1), (257, 2), (300, 2), (385, 3)])
def test_chunks_of_a_row(length, chunks):
    cut = list(row_chunks(list(range(length))))
    assert cut == [list(range(128 * i, 128 * i + 129)) for i in range(chunks)]


def test_first_chunks_train_and_the_next_validate():
    rows = rows_of(130, 300, 100, 400, 150, 150)  # 1, 2, 0, 3, 1, 1 chunks
    chunks = chunk_rows(rows, Characters(), (4, 3))
    assert letters(chunks.train) == "abbd" and letters(chunks.validation) == "dde"  # row d on both sides, as published
    assert chunks.train.shape == (4, 129) and chunks.train.dtype == np.int32
    assert (chunks.train_tokens, chunks.validation_tokens) == (512, 384)


def test_split_between_rows():
    rows = rows_of(130, 300, 100, 400, 150, 150)
    chunks = chunk_rows(rows, Characters(), (4, 2), split_rows=False)
    assert letters(chunks.train) == "abbd" and letters(chunks.validation) == "ef"
    with pytest.raises(InputError, match="they give 6 chunks of 129 tokens, 7 are asked for"):
        chunk_rows(rows, Characters(), (4, 3), split_rows=False)
    fewer = chunk_rows(rows, Characters(), (8, 4), split_rows=False, shrink=True)
    assert letters(fewer.train) == "abbdd" and letters(fewer.validation) == "ef"


def test_reads_no_more_rows_than_it_needs():
    def rows():
        yield from rows_of(150, 150, 150)
        raise AssertionError("read on")

    assert letters(chunk_rows(rows(), Characters(), (2, 1)).validation) == "c"


def test_too_few_rows_says_how_many_chunks_there_are():
    with pytest.raises(InputError, match="they give 3 chunks of 129 tokens, 4 are asked for"):
        chunk_rows(rows_of(150, 300), Characters(), (3, 1))
    with pytest.raises(InputError, match="they give 0 chunks"):
        chunk_rows([], Characters(), (3, 1), shrink=True)


def test_too_few_rows_shrink_in_proportion():
    chunks = chunk_rows(rows_of(*[150] * 23), Characters(), (1000, 100), shrink=True)
    assert (len(chunks.train), len(chunks.validation)) == (20, 2)
    assert letters(chunks.train) + letters(chunks.validation) == letters(np.arange(97, 119)[:, None])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "a", "output": "b"}, "row 0 has no column 'input'"),
        ({"instruction": "a", "input": 3, "output": "b"}, "column 'input' of row 0 holds int"),
    ],
)
def test_rows_that_are_not_alpaca(row, message):
    with pytest.raises(InputError, match=message):
        chunk_rows([row], Characters(), (1, 1))


def test_chunks_of_the_real_rows(smollm2):
    parquet = pytest.importorskip("pyarrow.parquet")
    if not os.environ.get("NEWLLM_TEST_DATA"):
        pytest.skip("NEWLLM_TEST_DATA names no folder of test data")
    folder = Path(os.environ["NEWLLM_TEST_DATA"]) / "datasets" / "alpaca" / "data"
    rows = [row for file in sorted(folder.glob("*.parquet")) for row in parquet.read_table(file).to_pylist()]
    chunks = chunk_rows(rows, smollm2.tokenizer)
    assert (chunks.train_tokens, chunks.validation_tokens) == (128_000, 12_800)
    # Row 722 gives the last train and the first validation chunk, which overlap by one id.
    assert chunks.train[-1, -1] == chunks.validation[0, 0]
    ids = smollm2.tokenizer.encode(row_text(rows[722], 722))
    assert chunks.train[-1].tolist() in list(row_chunks(ids)) and chunks.validation[0].tolist() in list(row_chunks(ids))
    apart = chunk_rows(rows, smollm2.tokenizer, split_rows=False)
    np.testing.assert_array_equal(apart.train, chunks.train)
    next_row = row_chunks(smollm2.tokenizer.encode(row_text(rows[723], 723)))
    assert apart.validation[0].tolist() == next(next_row)
    with pytest.raises(InputError, match="they give 2814 chunks"):
        chunk_rows(rows, smollm2.tokenizer, (2800, 100))


@pytest.mark.parametrize("split_rows", [True, False])
def test_all_chunks_but_those_of_the_other_splits(split_rows):
    rows = rows_of(150, 300, 450, 150, 300, 300, 450, 150)  # 1, 2, 3, 1, 2, 2, 3, 1 chunks, a letter a row
    chunks = chunk_rows(rows, Characters(), (None, 2, 0, 3), split_rows=split_rows)
    asked = chunk_rows(rows, Characters(), (len(chunks.train), 2, 0, 3), split_rows=split_rows)
    assert chunks.fingerprint == asked.fingerprint
    assert letters(chunks.train) == ("abbcccdeef" if split_rows else "abbcccdee")
    assert letters(chunks.validation) + letters(chunks.calibration) == ("fgggh" if split_rows else "ffggg")
    more = len(chunks.train) + 1
    with pytest.raises(InputError, match="too few rows"):
        chunk_rows(rows, Characters(), (more, 2, 0, 3), split_rows=split_rows)
    with pytest.raises(InputError, match="they give 15 chunks of 129 tokens, 16 are asked for"):
        chunk_rows(rows, Characters(), (None, 15), shrink=True)
    assert letters(chunk_rows(rows, Characters(), (None, 14)).train) == "a"


def test_four_splits_share_no_row():
    rows = rows_of(150, 300, 450, 150, 300, 300, 450, 150)  # 1, 2, 3, 1, 2, 2, 3, 1 chunks, a letter a row
    apart = chunk_rows(rows, Characters(), (2, 2, 1, 2), split_rows=False)
    found = [letters(apart.splits[name]) for name in ("train", "validation", "test", "calibration")]
    cut = chunk_rows(rows, Characters(), (2, 2, 1, 2))
    assert [len(split) for split in apart.splits.values()] == [2, 2, 1, 2]
    assert all(set(one).isdisjoint(other) for one, other in itertools.combinations(found, 2)), found
    straddled = [letters(split) for split in cut.splits.values()]
    assert not all(set(one).isdisjoint(other) for one, other in itertools.combinations(straddled, 2))
    assert cut.fingerprint != chunk_rows(rows, Characters(), (2, 2)).fingerprint
