"""Executes `docs/colab.ipynb` from start to end on small settings, and writes its outputs into it.

    python -m benchmarks.notebook

The settings are those of its parameters cell where NEWLLM_NOTEBOOK_SMALL names a folder with a base model and rows of
text: a random Llama of two layers, so the figures mean nothing, and every command and cell is run all the same.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "colab.ipynb"
SMALL = "NEWLLM_NOTEBOOK_SMALL"
SECONDS = 600  # for one cell


def execute(folder: Path) -> Any:
    """The notebook after all of its cells have run in `folder`, one after the other.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised.
    """
    import nbformat
    from nbclient import NotebookClient

    from tests.reliability.tiny import write_sources

    sources = folder / "sources"
    sources.mkdir()
    write_sources(sources)
    environment = {  # of the kernel, and of the commands in its cells
        SMALL: sources.name,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "140",
    }
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env={**os.environ, **environment})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
    return notebook


def joined(outputs: list[Any]) -> list[Any]:
    """The outputs of a cell with the pieces of each of its streams as one, as a terminal shows it in the end."""
    whole = list[Any]()
    for output in outputs:
        if output.output_type == "stream" and whole and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    for output in whole:
        if output.output_type == "stream":
            output.text = shown(output.text)
    return whole


def shown(text: str) -> str:
    """What a terminal shows of a text after progress bars in it have been painted over."""
    lines = [""]
    for part in re.split(r"(\n|\r|\x1b\[[0-9;?]*[A-Za-z])", text):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[2K":  # erase the line
            lines[-1] = ""
        elif part == "\x1b[1A":  # one line up
            lines.pop()
        elif part != "\r" and not part.startswith("\x1b"):
            lines[-1] += part
    return "\n".join(lines)


def main() -> None:
    """Writes the notebook with its outputs."""
    import nbformat

    from newllm_jax.files import whole_file

    with tempfile.TemporaryDirectory() as folder:
        executed = execute(Path(folder))
        text = nbformat.writes(executed).replace(folder, "...")
    with whole_file(NOTEBOOK) as partial:
        partial.write_text(text + "\n", encoding="utf-8")
    print(f"written to {NOTEBOOK.name}")


if __name__ == "__main__":
    main()
