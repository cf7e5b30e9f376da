"""A short text and where each of its tokens exited: with marks in a plain page, in colours on one that has them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from html import escape
from itertools import groupby
from typing import Any

from newllm_jax.report.markup import fenced, visible

BLOCK = "exits"  # the language of the block in Markdown, which a coloured text replaces in HTML
RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
CLASSES = 6  # of colours and lines under the text, in `page.css`; after the last one the first again
WIDE = 100  # columns of a plain page


def exit_text(results: Mapping[str, Any]) -> str:
    """The section of a report: what the marks mean, and the text with a raised number after what a stage predicts."""
    if "example" not in results:
        return ""
    text = "".join(
        f"{before}⟨{words}⟩{str(place).translate(RAISED)}{after}" if place and words else f"{before}{words}{after}"
        for before, words, after, place in _groups(results)
    )
    lines = (textwrap.fill(line, WIDE, break_long_words=False) for line in visible(text).splitlines())
    return f"""## Where the tokens of a text exit

The first {len(results["example"]["tokens"])} tokens of the validation text. After those that a raised number closes, \
the stage of that number predicts the next token; after the others, the base does.

{fenced(chr(10).join(lines), BLOCK)}

"""


def exit_spans(results: Mapping[str, Any]) -> str:
    """The same text as HTML, below a legend; each exit has a colour, a line under the text, and its number."""
    spans = "".join(
        f'{before}<span class="{_class(place)}">{escape(visible(words))}</span>'
        + (f"<sup>{place}</sup>" if place and words else "")
        + after
        for before, words, after, place in _groups(results)
    )
    counts = dict[int, int]()
    for place in results["example"]["exits"]:
        counts[place] = counts.get(place, 0) + 1
    legend = "".join(
        f'<li><span class="{_class(place)}">{f"stage {place}" if place else "base"}</span> {count} tokens</li>'
        for place, count in sorted(counts.items())
    )
    return f'<ul class="legend">{legend}</ul><p class="exits">{spans}</p>'


def _groups(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """The text of tokens in a row that exit at the same place: white space, what is between, white space; the place."""
    pairs = zip(results["example"]["tokens"], results["example"]["exits"], strict=True)
    for place, group in groupby(pairs, lambda pair: pair[1]):
        text = "".join(text for text, _ in group)
        words = text.strip()
        before = text[: len(text) - len(text.lstrip())] if words else text
        yield before, words, text[len(before) + len(words) :], place


def _class(place: int) -> str:
    return f"exit exit-{0 if place == 0 else 1 + (place - 1) % CLASSES}"
