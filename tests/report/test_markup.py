"""Texts of users and models in Markdown: what is shown is what they are."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from newllm_jax.report.markup import escaped, fenced

pytestmark = pytest.mark.quick
HOSTILE = [
    "<script>alert(1)</script>", "a | b", "`code`", "![x](http://x/y.png)", "[x](javascript:y)", "*b* __c__ _d_",
    "back\\slash \\| pipe", "&lt; &amp;", "<http://x>", "$x$ \\$", "# not a heading", "snake_case_name",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_an_escaped_text_is_shown_as_it_is(text):
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")  # as a viewer may be that shows HTML
    page = parser.parse(f"| a | b |\n|---|---|\n| {escaped(text)} | end |")
    cells = [token for token in page if token.type == "inline"]
    assert [child.content for cell in cells[2:3] for child in cell.children or () if child.type != "text_special"]
    assert "".join(child.content for child in cells[2].children or ()) == text
    assert len(cells) == 4 and cells[3].content == "end"


def test_a_name_without_special_letters_stays_readable():
    assert escaped("cascade-quickstart_published-20300101 (wikitext-2-v1)") == (
        "cascade-quickstart_published-20300101 (wikitext-2-v1)"
    )
    assert escaped("two\nlines\x1b[31m") == "two lines\ufffd\\[31m"


@pytest.mark.parametrize("text", ["plain", "```\n<b>", "````` five", "a\x00b\x1b[2J", ""])
def test_a_block_ends_where_it_should(text):
    (token,) = MarkdownIt().parse(fenced(text))
    assert token.type == "fence"
    assert token.content.rstrip("\n") == text.replace("\x00", "\ufffd").replace("\x1b", "\ufffd")
