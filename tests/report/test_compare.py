"""`newllm compare`: the tables and curves of several runs, in a folder beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from newllm_jax.errors import InputError
from newllm_jax.report.compare import best_of, comparison, comparison_folder, drawings_of, write_comparison
from newllm_jax.report.plots import svg
from newllm_jax.report.published import PUBLISHED_RUNS

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")
RESULTS = Path(__file__).parents[2] / "docs" / "results"
WRITTEN = {"comparison.md", "comparison.html", "comparison.png"}


def read(name):
    return {"name": Path(name).name, **json.loads((RESULTS / f"{name}.json").read_text())}


def test_it_is_written_beside_the_runs(newllm, small_run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(small_run, tmp_path / "runs" / name)
    code, out, err = newllm("compare", "runs/one", "runs/two")
    assert (code, err) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    folder = tmp_path / "runs" / "comparison"
    assert {path.name for path in folder.iterdir()} == WRITTEN
    assert (folder / "comparison.md").read_text() in out and out.endswith(f"written to {folder}/comparison.html\n")
    page = (folder / "comparison.html").read_text()
    assert page.count("<svg") == 2 and "<title>Comparison</title>" in page
    assert (folder / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    code, out, err = newllm("compare", "runs/one", "runs/two/results.json", "--output", "elsewhere/new")
    assert (code, err) == (0, "")
    assert {path.name for path in Path("elsewhere/new").iterdir()} == WRITTEN


def test_a_run_that_is_named_twice_is_refused(refused, small_run, tmp_path):
    for name in ("one", "two"):
        shutil.copytree(small_run, tmp_path / "runs" / name)
    assert refused("compare", "runs/one", "runs/two", "runs/one/") == "runs: 'runs/one/' is named twice"
    assert refused("compare", "runs/one", "runs/one/results.json").endswith("results.json' is named twice")
    assert not (tmp_path / "runs" / "comparison").exists()


def test_the_folder_is_the_deepest_that_holds_all_runs():
    assert comparison_folder(["runs/a", "runs/b"]) == Path("runs/comparison").resolve()
    assert comparison_folder(["runs/a", "runs/more/b"]) == Path("runs/comparison").resolve()
    assert comparison_folder(["one/a", "other/b/"]) == Path("comparison").resolve()
    assert comparison_folder(["runs/a", "runs/b/results.json"]) == Path("runs/comparison").resolve()
    assert comparison_folder(["a.json"]) == Path("comparison").resolve()
    assert comparison_folder(["runs/a"]) == Path("runs/comparison").resolve()
    with pytest.raises(InputError, match="output: the runs have no folder in common"):
        comparison_folder(["/a/run", "/b/run"])


def test_runs_are_drawn_on_one_axis_beside_what_was_published():
    runs = [read("newllm/baseline-seed0"), read("newllm/baseline-seed1"), read("quickstart/newllm")]
    perplexity, loss = drawings_of(runs)
    text = svg(perplexity, 1)
    assert all(f"{run['name']}</text>" in text for run in runs)
    assert text.count("published, baseline</text>") == 1 and "published curve of `baseline`" in perplexity.note
    assert "published" not in svg(loss, 1) and loss.note == ""
    assert "Dashed, beside the perplexity: the published curve of `baseline` (CPU)" in comparison(runs)
    assert drawings_of(runs[2:])[0].note == ""


def test_cascades_are_drawn_by_the_number_of_stages():
    cascade = read("quickstart/cascade-published")
    (drawing,) = drawings_of([*PUBLISHED_RUNS, cascade])
    text = svg(drawing, 1)
    assert all(f"{label}</text>" in text for label in ("Base", "Base+5", cascade["name"], "published, 0.6"))
    assert len(drawings_of([cascade, read("cascade/finetune-135m-lr1e-5")])) == 3


def test_names_do_not_break_the_page(tmp_path):
    name = "<script>|`x`"
    path = write_comparison(tmp_path / "c", [{**read("quickstart/cascade-published"), "name": name}])
    page = path.with_suffix(".html").read_text()
    assert "<script>" not in page and page.count("&lt;script&gt;|`x`</td>") == 3
    assert "&lt;script&gt;|`x`</th>" in page


def test_what_differs_is_said():
    first, second, quickstart = map(read, ("newllm/baseline-seed0", "newllm/baseline-seed1", "quickstart/newllm"))
    alike, unlike = comparison([first, second]), comparison([first, second, quickstart])
    assert "Different data" not in alike and "**Different data**" in unlike
    assert "**Different settings** of {} / {}: `seed` 0 / 1.\n".format(first["name"], second["name"]) in alike
    assert "`learning_rate` 0.0001 / 0.0001 / " in unlike and "`dataset`" not in unlike
    assert "Different settings" not in comparison([first, first])
    assert "Different settings" not in comparison([first, read("quickstart/cascade-published")])  # of other systems


def test_the_best_of_a_cascade_is_the_lowest_of_its_ensemble():
    run = read("quickstart/cascade-published")
    perplexities = [entry["val_ppl"] for entry in run["ensemble"]]
    assert perplexities[0] < 30 < 100 < perplexities[-1]
    assert best_of(run)[1:] == (perplexities[0], "Base")


def test_the_tokens_of_a_stage_are_named():
    published, helped = read("quickstart/cascade-published"), read("quickstart/cascade")
    rows = [line for line in comparison([published, helped]).splitlines() if line.startswith("| 1 ")]
    assert [row.split("|")[9].strip() for row in rows] == ["hard", "all"]
