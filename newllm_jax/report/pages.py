"""The files of a report, and the parts that the reports of all systems have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from newllm_jax.files import whole_file
from newllm_jax.report.exits import BLOCK, exit_spans
from newllm_jax.report.html import figures, html_page
from newllm_jax.report.markup import escaped, fenced
from newllm_jax.report.plots import Drawing, save_drawings

CURVES = "curves.png"


def write_pages(
    folder: Path, name: str, markdown: str, picture: str, drawings: Sequence[Drawing], results: Mapping[str, Any]
) -> Path:  # fmt: skip
    """Writes a report: its picture, `name.html` and, last, `name.md`, whose path it returns.

    Args:
      markdown: the text of both; the picture stands in it under its file name.
      picture: that name. Without drawings there is none.
      results: `name`, and what is on the page in another form than in Markdown.
    """
    inserts = {BLOCK: exit_spans(results)} if "example" in results else {}
    if drawings:
        save_drawings(folder / picture, drawings, results["name"])
        inserts[picture] = figures(drawings)
    for ending, text in (("html", html_page(markdown, inserts)), ("md", markdown)):
        with whole_file(folder / f"{name}.{ending}") as partial:
            partial.write_text(text, encoding="utf-8")
    return folder / f"{name}.md"


def figure_notes(drawings: Sequence[Drawing]) -> str:
    """What must be said of the drawings, as a paragraph; "" for nothing."""
    notes = " ".join(drawing.note for drawing in drawings if drawing.note)
    return f"{notes}\n\n" if notes else ""


def sample_text(results: Mapping[str, Any]) -> str:
    """The section with the texts that the model made; "" for results without any."""
    samples = results.get("samples")
    if not samples:
        return ""
    prompt = samples[0]["prompt"]
    told = f"Each answers *{escaped(prompt)}*" if prompt else "Each begins at the start of a text"
    texts = "\n\n".join(
        f"**After epoch {sample['epoch']}**\n\n{fenced(sample['text'] or '(nothing)', 'sample')}" for sample in samples
    )
    return f"""## Text of the model

{told}. Drawn as `newllm generate` draws unless told otherwise, with the seed of the run.

{texts}

"""


def ending_text(results: Mapping[str, Any]) -> str:
    """The last sections: the machine and versions of a run, and the command that repeats it on the same data."""
    environment, data = results["environment"], results.get("data", {})
    versions = ", ".join(
        f"{package} {escaped(environment[package])}"
        for package in ("python", "newllm-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
        if package in environment
    )
    return f"""## Environment

| | |
|---|---|
| device | {escaped(environment["device"])} ({escaped(environment["platform"])}), {environment["precision"]} |
| versions | {versions} |
| time, memory | {results["seconds"]:.0f} s, {results["peak_memory_bytes"] / 2**30:.2f} GiB at most |

## The same run again

{_source_text(data)}

{fenced(results["command"], "sh")}
"""


def _source_text(data: Mapping[str, Any]) -> str:
    """What a run must read to be the same."""
    if "source" not in data:
        return "On the same data:"
    told = f"It read {escaped(data['source'])}"
    if data.get("fallback"):
        told += f", as {escaped(data['asked'])} was not available"
    return f"{told}{_fingerprint(data)}."


def _fingerprint(data: Mapping[str, Any]) -> str:
    fingerprint = data.get("fingerprint")
    return f" (fingerprint `{fingerprint[:12]}`)" if fingerprint else ""
