"""The pages say what the committed JSON files say, name the sources of published figures, and link to what exists."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from newllm_jax.report.cascade_tables import ensemble_table

ROOT = Path(__file__).parent.parent


def test_tables_come_from_the_results():
    command = [sys.executable, "-m", "benchmarks.tables", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_published_figure_names_its_source():
    published = json.loads((ROOT / "docs" / "results" / "published.json").read_text())
    figures = []

    def walk(node):
        if isinstance(node, dict) and "value" in node:
            figures.append(node["source"])
        elif isinstance(node, dict):
            for child in node.values():
                walk(child)

    walk({key: value for key, value in published.items() if key != "sources"})
    assert len(figures) > 20
    assert set(figures) <= set(published["sources"])


# The file that no command writes: its figures were read from the sources that it names.
TYPED_BY_HAND = {"published.json"}
# The first words of a command, and the system that its results.json names.
EXPERIMENTS = {
    ("python", "train.py"): "new-llm",
    ("python", "cascade.py"): "cascade",
    ("newllm", "cascade"): "cascade",
    ("newllm", "finetune"): "finetune",
    ("newllm", "sweep"): "new-llm-sweep",
}
# Sweeps whose rows were collected from single runs; the file's note says so.
COLLECTED = {"newllm-seeds-h200.json", "cascade-seeds-h200.json"}
RESULTS = ROOT / "docs" / "results"
FILES = [path for path in sorted(RESULTS.rglob("*.json")) if path.name not in TYPED_BY_HAND]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(RESULTS).as_posix())
def test_every_file_of_results_has_a_command_that_makes_it_again(path):
    found = json.loads(path.read_text())
    if "system" in found:
        first, second, *_ = shlex.split(found["command"])
        assert EXPERIMENTS[first, second] == found["system"]
        assert first == "newllm" or (ROOT / second).is_file()
        return
    if path.stem.startswith("gpu-tests"):
        command = rf"python -m pytest -n \d+ tests/gpu --report {re.escape(path.relative_to(ROOT).as_posix())}"
        assert re.fullmatch(command, found["command"])
        assert (found["failed"], found["skipped"]) == (0, 0)
        assert found["passed"] == len(found["tests"]) > 20
        return
    if path.parent == RESULTS / "reliability":
        module = f"tests.reliability.{path.stem.split('-')[0]}"
        assert found["command"].startswith(f"python -m {module}")
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
        return
    if path.parent == RESULTS / "peers":
        words = shlex.split(found["command"])
        assert words[:3] == ["python", "-m", "benchmarks.peers"]
        typed = importlib.import_module("benchmarks.peers").options().parse(words[3:]).arguments
        assert path.stem.startswith(f"{typed.task}-{typed.kind}-{typed.size}")
        assert (typed.task, typed.kind) == (found["task"], found["kind"])
        return
    if path == RESULTS / "cascade" / "hardness.json":
        assert found["command"].startswith("newllm hardness ")
        return
    if path in (RESULTS / "cascade" / "ablation.json", RESULTS / "cascade" / "search.json"):
        assert found["command"].startswith(f"python -m benchmarks.designs --table {path.stem}")
        return
    if path.parent == RESULTS / "cascade" and path.stem.startswith("frontier"):
        assert found["command"].startswith("newllm frontier ")
        assert found["entries"][0]["system"] == "base"
        return
    assert path.parent in (RESULTS / "benchmarks", RESULTS / "ablation")
    module = importlib.import_module(f"benchmarks.{found['benchmark']}")
    sweep = found.get("sweep")
    assert sweep is None or sweep in module.SWEEPS
    assert path.stem.replace("_", "-").startswith("-".join(filter(None, [found["benchmark"], sweep])).replace("_", "-"))
    if path.name in COLLECTED:
        assert f"python -m benchmarks.{found['benchmark']} --sweep {sweep}" in found["note"]
        return
    words = shlex.split(found["command"])
    assert words[:3] == ["python", "-m", f"benchmarks.{found['benchmark']}"]
    typed = module.options().parse(words[3:]).arguments  # raises InputError where an option is no longer there
    assert getattr(typed, "sweep", None) == sweep


@pytest.mark.parametrize("config", ["baseline", "advanced"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_committed_runs_have_the_published_settings_and_reach_the_published_numbers(config, seed):
    from newllm_jax.config import load_config

    run = json.loads((ROOT / "docs" / "results" / "newllm" / f"{config}-seed{seed}.json").read_text())
    expected = load_config(config, {"seed": seed, "dataset": run["config"]["dataset"]})
    assert type(expected).from_dict(run["config"]) == expected  # settings that came later have their defaults
    assert run["data"]["train_sequences"] == 51_026
    low, high = {"baseline": (22.2, 24.5), "advanced": (32.5, 39)}[config]  # published: 23.34 and 36.45
    assert low <= run["best"]["val_ppl"] <= high


PAGES = [
    *(ROOT / name for name in ("README.md", "README.ja.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to a file that does not exist, or to a heading that is not in it."""
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_of_the_pages_exist(page):
    assert broken_links(page) == []
    named = re.findall(r"(?<!\.cache/)\b((?:newllm_jax|tests)/[\w/]+(?:\.\w+)?)", page.read_text())
    assert [path for path in named if not (ROOT / path).exists()] == []
    rooms = re.findall(r"`((?:newllm|cascade|config|report|records|training|cli)/[\w/]*\.py)`", page.read_text())
    assert [path for path in rooms if not (ROOT / "newllm_jax" / path).exists()] == []


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A heading, here\n[1](page.md#a-heading-here) [2](#a-heading) [3](absent.md) [4](page.md)")
    assert broken_links(page) == ["#a-heading", "absent.md"]


def test_readme_shows_what_the_quickstart_runs_gave():
    text = (ROOT / "README.md").read_text()
    runs = RESULTS / "quickstart"
    newllm, cascade = (json.loads((runs / name).read_text()) for name in ("newllm.json", "cascade.json"))
    shown = re.findall(r"^epoch +(\d+)/10  train loss (\S+)  val loss (\S+)  val PPL (\S+)  accuracy (\S+)", text, re.M)
    assert len(shown) == 3
    for epoch, *figures in shown:
        entry = newllm["epochs"][int(epoch) - 1]
        assert figures == [
            f"{entry['train_loss']:.4f}", f"{entry['val_loss']:.4f}", f"{entry['val_ppl']:.2f}",
            f"{entry['val_accuracy']:.1%}",
        ]  # fmt: skip
    assert ensemble_table(cascade) in text


def test_what_is_promised_is_tested():
    pages = [(ROOT / name).read_text() for name in ("SECURITY.md", "docs/reliability.md")]
    promises = [promise for page in pages for promise in re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", page)]
    assert len(promises) > 40
    assert [name for file, name in promises if name and f"def {name}(" not in (ROOT / file).read_text()] == []
    assert all((ROOT / file).is_file() for file, _ in promises)
