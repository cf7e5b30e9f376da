"""A page as one file: it shows what was written, whatever that is, and needs nothing else."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from newllm_jax.report.exits import exit_spans, exit_text
from newllm_jax.report.html import POLICY, figures, html_page
from newllm_jax.report.markup import escaped, fenced
from newllm_jax.report.plots import Drawing
from newllm_jax.report.tables import markdown_table

VOID = {"meta", "br", "use", "path", "rect"}
HOSTILE = ["<script>alert(1)</script>", "a | b", "`x` ```` y", "![x](http://x/y.png)", "[x](javascript:y)", "*b*"]


class Page(HTMLParser):
    """The elements of a page, and the text of each."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts = [], [], [], {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.mark.quick
@pytest.mark.parametrize("text", HOSTILE)
def test_what_users_type_is_shown_and_nothing_else(text):
    table = markdown_table(["name", "value"], [[escaped(text), "1"], ["other", "2"]])
    markdown = f"# Run: {escaped(text)}\n\n{table}\n\n{fenced(text, 'sh')}"
    page = Page(html_page(markdown, {}))
    assert page.texts["h1"] == page.texts["title"] == [f"Run: {text}"] or "".join(page.texts["h1"]) == f"Run: {text}"
    assert page.texts["td"] == [text, "1", "other", "2"] or "".join(page.texts["td"][:-3]) == text
    assert page.texts["code"] == [text + "\n"]
    assert not {"script", "img", "a", "em"} & set(page.tags)
    assert page.tags.count("tr") == 3 and page.tags.count("td") == 4


def test_html_in_a_page_is_text():
    page = Page(html_page("A <b>bold</b> claim\n\n<div onclick='x'>\n\n![away](http://x/y.png)", {}))
    assert not {"b", "div", "img"} & set(page.tags)
    assert any("<b>bold</b>" in text for text in page.texts["p"])
    assert "away" in page.texts["p"]


def test_pictures_and_blocks_are_replaced_where_there_is_something_for_them():
    markdown = (
        "Before\n\n![curves](curves.png)\n\n```exits\nplain\n```\n\n```sh\nrun\n```\n\nAfter ![curves](curves.png)"
    )
    page = html_page(markdown, {"curves.png": "<figure>drawn</figure>", "exits": "<i>coloured</i>"})
    assert page.count("<figure>drawn</figure>") == 1 and "<i>coloured</i>" in page and "plain" not in page
    assert "run\n</code>" in page
    Page(page)


def test_a_page_needs_nothing_else():
    drawing = Drawing("A <title> & more", lambda axes: axes.plot([1, 2], marker="o"))
    page = html_page("# Some\n\n![curves](curves.png)", {"curves.png": figures([drawing, drawing])})
    found = Page(page)
    assert f'content="{POLICY}"' in page
    assert found.tags.count("svg") == 2 and not {"script", "link", "img", "iframe", "image"} & set(found.tags)
    references = [value for name, value in found.attributes if name in ("href", "xlink:href", "src")]
    assert references and all(value.startswith("#") for value in references)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))
    assert "@import" not in page and "A <title> & more" in found.texts["figcaption"][0]
    identifiers = [value for name, value in found.attributes if name == "id"]
    assert len(identifiers) == len(set(identifiers))


EXAMPLE = {"example": {"tokens": ["The", " <b>", "", " é", "\n", " |"], "exits": [0, 1, 1, 2, 0, 12]}}


def test_a_text_and_its_exits():
    assert exit_text({}) == ""
    block = exit_text(EXAMPLE).split("```exits\n")[1].split("\n```")[0]
    assert block == "The ⟨<b>⟩¹ ⟨é⟩²\n ⟨|⟩¹²"
    page = Page(exit_spans(EXAMPLE))
    assert page.texts["span"] == ["base", "stage 1", "stage 2", "stage 12", "The", "<b>", "é", "|"]
    assert page.texts["sup"] == ["1", "2", "12"]
    classes = [value for name, value in page.attributes if name == "class" and value.startswith("exit ")]
    assert classes[:4] == ["exit exit-0", "exit exit-1", "exit exit-2", "exit exit-6"]
    assert [text.strip() for text in page.texts["li"]] == ["2 tokens", "2 tokens", "1 tokens", "1 tokens"]
