"""The pages of the site beyond their links: messages, the tutorial's changes, the reference, the Japanese pages."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import newllm_jax
from benchmarks.tables import japanese, pages

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a language on a page of `docs`."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@cache
def messages() -> set[tuple[int, re.Pattern[str]]]:
    """Every text of the package that could be a message: how many letters of it are fixed, and a pattern of it."""
    found = set()
    for path in (ROOT / "newllm_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            parts = node.values if isinstance(node, ast.JoinedStr) else [node]
            fixed = [part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str)]
            if len(text := "".join(fixed)) >= 14:
                whole = (re.escape(part.value) if isinstance(part, ast.Constant) else ".*?" for part in parts)
                found.add((len(text), re.compile("".join(whole))))
    return found


def said_by_the_package(line: str) -> bool:
    """Whether a text of the package is in a line and makes up a fifth of it; what the error before said is the rest."""
    return any(5 * fixed > len(line) and pattern.search(line) for fixed, pattern in messages())


def quoted(block: str) -> str:
    """A message as the package has it: without the frame of a box, and without what the command puts before it."""
    text = re.sub(r"^(\+-+\+|error:|note:) *", "", block.strip(), flags=re.MULTILINE)
    return re.sub(r" *\|\n\| *", " ", text.strip()).strip("| ")


QUOTED = [quoted(block) for block in blocks("faq.md", "(?:text|output)")]


@pytest.mark.parametrize("line", QUOTED)
def test_messages_of_the_faq_are_those_of_the_package(line):
    assert said_by_the_package(line)


def test_another_wording_is_found():
    line = next(line for line in QUOTED if line.startswith("precision: "))
    assert not said_by_the_package(line.replace("needs", "wants"))
    assert len(QUOTED) > 12


def test_messages_of_the_faq_come_out(refused, in_an_empty_folder):
    text = (DOCS / "faq.md").read_text()
    for typed in (
        ["train", "--config", "quickstart", "--precision", "tf32"],
        ["train", "--config", "quickstart", "--learning_rat", "1"],
        ["train", "--resume", "runs/absent"],
    ):
        assert f"\nerror: {refused(*typed)}\n" in text


def test_the_changes_of_the_tutorial_work(tmp_path):
    """Both apply to the code as it is, and do what the page says."""
    shutil.copytree(ROOT / "newllm_jax", tmp_path / "newllm_jax", ignore=shutil.ignore_patterns("__pycache__"))
    (settings,) = blocks("tutorial.md", "toml")
    (tmp_path / "wide.toml").write_text(settings)
    layer, criterion = blocks("tutorial.md", "diff")
    for change in (layer, criterion):
        subprocess.run(["git", "apply"], input=change, text=True, cwd=tmp_path, check=True)
    program = """
import jax, jax.numpy as jnp, numpy as np
from newllm_jax import ContextVectorLM, hardness, load_config
from newllm_jax.cascade.criteria import SINGLE_PASS
from newllm_jax.newllm.recurrence.scan import forms_for

assert load_config("wide.toml", {"squared_relu": True}).squared_relu
sizes = dict(vocabulary_size=9, embed_dim=4, hidden_dim=8, context_dim=4, num_layers=2, initialization="he")
plain, squared = (ContextVectorLM(**sizes, squared_relu=on) for on in (False, True))
assert (forms_for(plain.spec, 2, 3)[0], forms_for(squared.spec, 2, 3)[0]) == ("cpu", "plain")
ids = jnp.array([[1, 2, 3], [4, 5, 6]])
params = squared.init(jax.random.key(0), ids)
logits = [model.apply(params, ids)[0] for model in (plain, squared)]
assert not np.allclose(*logits)

def loss(params):
    return jnp.sum(squared.apply(params, ids)[0] ** 2)

gradient = jax.jit(jax.grad(loss))(params)
loss = jax.jit(loss)
higher, lower = (loss(jax.tree.map(lambda leaf: leaf + step, params)) for step in (1e-3, -1e-3))
np.testing.assert_allclose(sum(map(jnp.sum, jax.tree.leaves(gradient))), (higher - lower) / 2e-3, rtol=2e-2)

assert "agreement" in SINGLE_PASS
vectors, prediction = jnp.ones((2, 3)), jnp.log(jnp.array([[0.5, 0.5], [0.9, 0.1]]))
np.testing.assert_allclose(hardness.token_scores("agreement", vectors, vectors, prediction), [0.5, 0.82], rtol=1e-5)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_reference_has_every_public_name():
    text = (DOCS / "reference.md").read_text()
    filled_in = set(re.findall(r"^::: newllm_jax\.(\w+)$", text, re.MULTILINE))
    named = filled_in | set(re.findall(r"\w+", " ".join(re.findall(r"`\w+`|^### \w+$", text, re.MULTILINE))))
    assert set(newllm_jax.__all__) - named == set()
    assert filled_in <= set(newllm_jax.__all__)


JAPANESE = {"README.ja.md": "README.md", "docs/ja/newllm.md": "docs/newllm.md", "docs/ja/cascade.md": "docs/cascade.md"}


def figures(page: str) -> set[str]:
    """The numbers of a page with a point or a comma, or of three digits and more."""
    text = re.sub(r"\]\([^)]*\)", "", (ROOT / page).read_text())
    return {found.rstrip(".,") for found in re.findall(r"\d[\d.,]*", text) if re.search(r"[.,]\d|\d{3}", found)}


@pytest.mark.parametrize("page", JAPANESE)
def test_japanese_pages_have_the_figures_of_the_english_ones(page):
    assert figures(page) - figures(JAPANESE[page]) == set()
    tables = re.findall(r"<!-- table: (.+?) -->", (ROOT / page).read_text())
    assert len(tables) > 3 and all(name.startswith("ja ") for name in tables)


def test_japanese_tables_change_words_only():
    table = pages.TABLES["newllm summary"]
    translated = japanese.in_japanese(table)
    assert re.findall(r"[\d.,]{3,}", translated) == re.findall(r"[\d.,]{3,}", table())
    assert "公表された検証PPL" in translated and "published" not in translated
    with pytest.raises(KeyError, match="no such heading"):
        japanese.in_japanese(lambda: "| no such heading |\n| --- |\n| 1 |")
