"""Files of text in every format, and what is read of them."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from newllm_jax.errors import InputError
from newllm_jax.sources.text import open_source

SPLITS = ("train", "validation", "test")
LINES = ["first line , of words", "second line", "third"]


def fill(path, *lines):
    """Writes rows in the format that the file's ending names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines or LINES
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": list(lines)}), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    elif path.suffix == ".json":
        path.write_text(json.dumps([{"text": line} for line in lines]))
    elif path.suffix == ".csv":
        path.write_text("id,text\n" + "".join(f'{index},"{line}"\n' for index, line in enumerate(lines)))
    elif path.suffix == ".tsv":
        path.write_text("id\ttext\n" + "".join(f"{index}\t{line}\n" for index, line in enumerate(lines)))
    else:
        path.write_text("".join(f"{line}\n" for line in lines))
    return path


def rows(path, configuration="", names=SPLITS):
    return open_source(str(path), configuration, "error").splits(names)


def complaint(path, configuration=""):
    with pytest.raises(InputError) as caught:
        rows(path, configuration)
    return str(caught.value)
