"""A page of Markdown as one HTML file that needs nothing else: no network, no other file, no script."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from newllm_jax.report.plots import Drawing, svg

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

# Whatever got into a page, a browser fetches nothing for it and runs nothing of it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""
INSERT = "insert"  # the type of a token that is HTML of ours


def html_page(markdown: str, inserts: Mapping[str, str]) -> str:
    """The page.

    Args:
      markdown: its text. HTML in it is shown as text.
      inserts: HTML that takes the place of a picture, by the picture's file name, or of a block, by its language.
    """
    parser = _parser()
    tokens = list(_inserted(parser.parse(markdown), inserts))
    heading = next((content for token, content in pairwise(tokens) if token.type == "heading_open"), None)
    title = "".join(token.content for token in heading.children or ()) if heading else ""
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    body = parser.renderer.render(tokens, parser.options, {})
    return PAGE.format(policy=POLICY, title=escape(title), style=style, body=body)


def figures(drawings: Sequence[Drawing]) -> str:
    """Drawings as figures, each below its title, side by side where there is room."""
    shown = "".join(
        f"<figure><figcaption>{escape(drawing.title)}</figcaption>{svg(drawing, number)}</figure>\n"
        for number, drawing in enumerate(drawings, 1)
    )
    return f'<div class="figures">\n{shown}</div>\n'


def _inserted(tokens: Sequence[Token], inserts: Mapping[str, str]) -> Iterator[Token]:
    """The tokens; in place of a paragraph that is one picture, or of a block, what is to be there."""
    from markdown_it.token import Token

    rest = iter(tokens)
    for token in rest:
        found = ""
        if token.type == "fence":
            found = inserts.get(token.info, "")
        elif token.type == "paragraph_open":
            content = next(rest)
            children = content.children or []
            if len(children) == 1 and children[0].type == "image":
                found = inserts.get(str(children[0].attrs["src"]), "")
            if not found:
                yield token
                token = content
        if not found:
            yield token
            continue
        if token.type == "paragraph_open":
            next(rest)
        yield Token(INSERT, "", 0, content=found)


@cache
def _parser() -> MarkdownIt:
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    rules: dict[str, str] = {
        "table_open": '<div class="wide" tabindex="0"><table>\n',
        "table_close": "</table></div>\n",
    }
    for name, text in rules.items():
        parser.add_render_rule(name, lambda _self, _tokens, _index, _options, _env, text=text: text)
    parser.add_render_rule(INSERT, _content)
    parser.add_render_rule("image", _alternative)
    return parser


def _content(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    return tokens[index].content


def _alternative(_: Any, tokens: Sequence[Token], index: int, *__: Any) -> str:
    """A picture that is another file has its text only."""
    return escape(tokens[index].content)
