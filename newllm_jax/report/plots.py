"""Drawings as pictures: several in one PNG, or each as an SVG that has its colours and letters from the page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeAlias

from newllm_jax.files import whole_file

Axes: TypeAlias = Any  # of matplotlib

# Each colour by the variable of `page.css` that replaces it; that page has a second set, for a dark screen. The series
# can be told apart by people who see no red or no green.
SERIES = ("#0b62a4", "#c4500b", "#00795a", "#9b4f96", "#a87400", "#4a8fb5")
INK, MUTED, RULE, PAPER = "#24292f", "#69707a", "#d9dde3", "#ffffff"
VARIABLES = {
    **{color: f"--series-{number}" for number, color in enumerate(SERIES, 1)},
    INK: "--ink", MUTED: "--muted", RULE: "--rule", PAPER: "--paper",
}  # fmt: skip
STYLE: dict[str, Any] = {  # above all, what a text is: text, whatever dollars are in it
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 10, "text.color": INK, "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED, "xtick.color": RULE, "ytick.color": RULE, "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED, "grid.color": RULE, "grid.linewidth": 0.6, "axes.grid": True, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "xtick.bottom": False,
    "ytick.left": False, "legend.frameon": False, "legend.fontsize": 9, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "lines.linewidth": 1.7, "lines.markersize": 4,
}  # fmt: skip
WIDTH, HEIGHT = 5.0, 3.0  # inches; 360 units of an SVG, which is the width of a phone
LEFT, RIGHT, BOTTOM, TOP = 0.13, 0.04, 0.17, 0.03  # the parts of both that axes leave free: all of them line up
HEADING = 0.35  # inches above each row of a PNG, for titles
IN_A_ROW = 3


@dataclass(frozen=True)
class Drawing:
    """One pair of axes.

    Attributes:
      title: what is drawn, with its unit.
      draw: draws it.
      note: what must be said of it, as Markdown; "": nothing.
    """

    title: str
    draw: Callable[[Axes], None]
    note: str = ""


def color(number: int) -> str:
    """The colour of a series; after the last one the first again."""
    return SERIES[number % len(SERIES)]


def place_color(place: int) -> str:
    """The colour of a place where tokens exit, 0 for the base."""
    return MUTED if place == 0 else color(place - 1)


def save_drawings(path: Path, drawings: Sequence[Drawing], title: str) -> None:
    """All drawings as one PNG."""
    columns = min(IN_A_ROW, len(drawings))
    rows = -(-len(drawings) // columns)
    a_row = HEIGHT + HEADING
    with _figure((WIDTH * columns, a_row * rows + HEADING)) as figure:
        every = figure.subplots(rows, columns, squeeze=False).ravel()
        height = a_row * rows + HEADING
        inner = HEIGHT * (1 - BOTTOM - TOP)
        figure.subplots_adjust(
            left=LEFT / columns, right=1 - RIGHT / columns, wspace=(LEFT + RIGHT) / (1 - LEFT - RIGHT),
            bottom=HEIGHT * BOTTOM / height, top=1 - (2 * HEADING + HEIGHT * TOP) / height,
            hspace=(a_row - inner) / inner,
        )  # fmt: skip
        for axes, drawing in zip(every, drawings, strict=False):
            drawing.draw(axes)
            axes.set_title(drawing.title)
        for axes in every[len(drawings) :]:
            axes.set_axis_off()
        figure.suptitle(title)
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=100, format="png")


def svg(drawing: Drawing, number: int) -> str:
    """A drawing as an SVG element of a page.

    Args:
      number: of the drawing; its identifiers contain it, as those of a page must differ.
    """
    from matplotlib import rc_context

    text = StringIO()
    with _figure((WIDTH, HEIGHT)) as figure, rc_context({"svg.hashsalt": str(number)}):
        figure.patch.set_alpha(0)
        axes = figure.subplots()
        figure.subplots_adjust(LEFT, BOTTOM, 1 - RIGHT, 1 - TOP)
        axes.patch.set_alpha(0)
        drawing.draw(axes)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _embedded(text.getvalue())


def _embedded(document: str) -> str:
    """The element of an SVG document, without what only a file of its own needs."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>\s*", "", element, flags=re.DOTALL)
    element = re.sub(r'<g id="[^"]*"', "<g", element)  # names of parts, which several drawings have
    element = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img" aria-hidden="true">', element, count=1)
    element = re.sub(r"(font: [\d.]+px) [^;\"]*", r"\1 var(--sans)", element)
    element = re.sub(r"font: (bold|\d+) ([\d.]+px) [^;\"]*", r"font: \1 \2 var(--sans)", element)
    for found, variable in VARIABLES.items():
        element = element.replace(found, f"var({variable})")
    return element.strip()


@contextmanager
def _figure(size: tuple[float, float], own: dict[str, Any] = STYLE) -> Iterator[Any]:
    """A figure in matplotlib's own style, with some changes.

    A `matplotlibrc` of the current folder has no say: it could have LaTeX run.
    """
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with style.context(["default", own]):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield figure


def legend_below(axes: Axes, columns: int) -> None:
    """Draws the legend below the axes, which become shorter by the room that it needs."""
    place = axes.get_position()
    rows = -(-len(axes.get_legend_handles_labels()[0]) // columns)
    taken = 0.12 * rows * place.height
    axes.set_position((place.x0, place.y0 + taken, place.width, place.height - taken))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=columns)


@contextmanager
def picture(path: Path, title: str) -> Iterator[Any]:
    """A PNG of two drawings side by side, whose axes it yields."""
    with _figure((10, 4), {}) as figure:
        figure.set_layout_engine("constrained")
        drawings = figure.subplots(1, 2)
        yield drawings
        for axes in drawings:
            axes.grid(alpha=0.3)
        figure.suptitle(title)
        with whole_file(path) as partial:
            figure.savefig(partial, dpi=120, format="png")
