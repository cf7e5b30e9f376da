"""Reports in headless Chromium: in light, in dark and on a phone. It skips where there is no `chromium`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.screenshots import chromium, framed
from newllm_jax.records.directory import RunDir
from newllm_jax.report import cascade, newllm
from newllm_jax.report.html import POLICY

pytestmark = pytest.mark.skipif(not shutil.which("chromium"), reason="there is no chromium on PATH")

RESULTS = Path(__file__).parents[2] / "docs" / "results"
PROBE = """<script>
const color = (element, name) => getComputedStyle(element)[name];
const text = document.querySelector("svg text"), line = document.querySelector("svg path[style*='--series-1']");
parent.postMessage({
  page: document.title.split(":")[0], width: innerWidth, scroll: document.documentElement.scrollWidth,
  wide: [...document.querySelectorAll(".wide")].filter((box) => box.scrollWidth > box.clientWidth).length,
  columns: new Set([...document.querySelectorAll("figure")].map((figure) => figure.offsetLeft)).size,
  paper: color(document.body, "backgroundColor"), ink: color(document.body, "color"),
  drawn: [color(text, "fill"), color(line, "stroke")], letters: parseFloat(color(text, "fontSize")),
  scale: document.querySelector("svg").clientWidth / document.querySelector("svg").viewBox.baseVal.width,
  fetched: performance.getEntriesByType("resource").length,
}, "*");
</script>"""
COLLECT = """<script>
const found = [];
addEventListener("message", (event) => { found.push(event.data); document.title = JSON.stringify(found); });
</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> list[Path]:
    """Copies of a report of New-LLM and of CASCADE that tell what became of them."""
    written = []
    long_name = "a-name-" + "x" * 90
    samples = [{"epoch": 1, "prompt": "", "text": "word " * 40 + "y" * 200}]
    example = {"tokens": [" token"] * 60 + [" " + "z" * 200], "exits": [0, 1, 2] * 20 + [1]}
    for module, file, more in (
        (newllm, "newllm/baseline-seed0.json", {"samples": samples}),
        (cascade, "quickstart/cascade-published.json", {"example": example}),
    ):
        folder = tmp_path_factory.mktemp("report")
        results = {**json.loads((RESULTS / file).read_text()), "name": long_name, **more}
        module.write_report(RunDir(folder, {}), results)
        text = (folder / "report.html").read_text()
        assert "<script" not in text
        (folder / "probed.html").write_text(text.replace(POLICY, "").replace("</body>", f"{PROBE}</body>"))
        written.append(folder / "probed.html")
    return written


def probe(pages, folder, width, is_light):
    """What each page told of itself, in a window of this width."""
    frame = folder / f"{width}-{is_light}.html"
    frame.write_text(COLLECT + framed(pages, width, 1200))
    shown = chromium(
        frame, is_light, "--dump-dom", f"--window-size={max(width, 500)},1300", "--virtual-time-budget=5000"
    )
    told = json.loads(re.search(r"<title>(.*?)</title>", shown)[1].replace("&amp;", "&"))  # type: ignore[index]
    return sorted(told, key=lambda page: page["page"])


def test_reports_in_light_in_dark_and_on_a_phone(pages, tmp_path):
    light, dark = (probe(pages, tmp_path, 1200, is_light) for is_light in (True, False))
    phone = probe(pages, tmp_path, 390, True)
    for told in (light, dark, phone):
        assert [page["page"] for page in told] == ["CASCADE", "New-LLM"]
        assert [page["fetched"] for page in told] == [0, 0]
        assert all(page["scroll"] <= page["width"] for page in told)
        assert all(page["letters"] * page["scale"] > 9 for page in told)  # pixels
    assert [page["width"] for page in light + phone] == [1200, 1200, 390, 390]
    assert [page["columns"] for page in light + phone] == [2, 2, 1, 1]
    assert [page["wide"] for page in phone] == [
        4,
        1,
    ]  # tables scroll in their own boxes: stages, ensemble, exits, epochs
    for bright, night in zip(light, dark, strict=True):
        assert bright["paper"] == "rgb(255, 255, 255)" != night["paper"]
        assert lightness(night["paper"]) < 40 and lightness(night["ink"]) > 200 > 60 > lightness(bright["ink"])
        assert all(one != other for one, other in zip(bright["drawn"], night["drawn"], strict=True))
        assert all(lightness(color) > 120 for color in night["drawn"])


def lightness(color):
    """The mean of red, green and blue, 0 to 255."""
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3
