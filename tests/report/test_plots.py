"""Drawings as PNG and as SVG."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from newllm_jax.report.cascade_drawings import cascade_drawings
from newllm_jax.report.curves import compared_drawings, training_drawings
from newllm_jax.report.plots import Drawing, save_drawings, svg
from newllm_jax.report.published import Curve


def entries(count, val_ppl=50.0, **changed):
    return [
        {"epoch": epoch, "train_loss": 4 / epoch, "val_loss": 5 / epoch, "val_ppl": val_ppl and val_ppl / epoch,
         "val_accuracy": epoch / 50, "learning_rate": 1e-3 / epoch, "clip_norm": 0.5, "grad_norm": 2 / epoch, **changed}
        for epoch in range(1, count + 1)
    ]  # fmt: skip


@pytest.mark.parametrize("count", [1, 3, 40])
def test_curves_are_a_picture(tmp_path, count):
    path = tmp_path / "curves.png"
    save_drawings(path, training_drawings(entries(count)), "title")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content.rstrip()[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1500, 705)
    assert list(tmp_path.iterdir()) == [path]


KEYS = {"train_loss": 0, "val_loss": 0, "val_ppl": 1, "val_accuracy": 2, "learning_rate": 3, "grad_norm": 4,
        "clip_norm": 4}  # fmt: skip


def test_every_curve_is_drawn():
    before = [svg(drawing, 1) for drawing in training_drawings(entries(3))]
    for key, place in KEYS.items():
        assert svg(training_drawings(entries(3, **{key: 0.3}))[place], 1) != before[place], key


def test_a_perplexity_that_overflowed_leaves_a_gap(tmp_path):
    save_drawings(tmp_path / "curves.png", training_drawings(entries(2, val_ppl=None)), "title")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e-300, 1e29, 1e300])
def test_figures_of_any_size_are_drawn(value):
    changed = dict.fromkeys(("val_loss", "val_ppl", "grad_norm"), value)
    group = {"exit": 0, "tokens": 1, "base_loss": 2.0, "loss": 2.0}
    ensemble = [
        {"stages": stages, "val_ppl": ppl, "exit_rates": [1.0, 0.0], "exit_groups": [group], "flops": 1.0 + stages}
        for stages, ppl in enumerate((9.0, value))
    ]
    stages = [{"stage": 1, "epochs": entries(2, **changed), "best": {"epoch": 1}}]
    drawings = cascade_drawings({"ensemble": ensemble, "stages": stages})
    assert all(svg(drawing, 1) for drawing in [*training_drawings(entries(2, **changed)), *drawings])


def test_the_published_curve_is_dashed_and_told():
    curve = Curve("baseline", "CPU", {1: 48.6, 3: 23.3})
    plain, beside = training_drawings(entries(3)), training_drawings(entries(3), published=curve)
    assert [drawing.note for drawing in plain] == [""] * 5
    assert "published curve of `baseline`" in beside[1].note
    assert "stroke-dasharray" in svg(beside[1], 1) and "published, baseline" in svg(beside[1], 1)
    assert "stroke-dasharray" not in svg(plain[1], 1)


def test_an_svg_has_the_colours_and_letters_of_its_page():
    (text,) = [svg(drawing, 1) for drawing in training_drawings(entries(3))[:1]]
    assert ElementTree.fromstring(text.replace("xlink:href", "href")).get("viewBox")
    assert "<text" in text and "validation</text>" in text
    assert {"var(--ink)", "var(--muted)", "var(--rule)", "var(--series-1)"} <= set(re.findall(r"var\([^)]*\)", text))
    assert not re.findall(r"(?:fill|stroke): #\w+", text)  # a colour that does not change with the page
    assert set(re.findall(r"font: ([^;\"]*)", text)) <= {f"{size}px var(--sans)" for size in (9, 10)}
    assert "http" not in text


def test_names_are_neither_formulas_nor_hidden():
    names = ["$x^2$", "_private", "<b>&", "n" * 99]
    runs = [{"name": name, "epochs": entries(2)} for name in names]
    text = svg(compared_drawings(runs, [])[0], 1)
    assert all(f"{shown}</text>" in text for shown in ("$x^2$", "_private", "&lt;b&gt;&amp;", f"{'n' * 33}…"))


def test_the_same_drawing_is_the_same_text_and_its_number_tells_its_parts():
    drawing = Drawing("some", lambda axes: axes.plot([1, 2], marker="o"))
    assert svg(drawing, 1) == svg(drawing, 1)
    identifiers = [set(re.findall(r'id="(\w+)"', svg(drawing, number))) for number in (1, 2)]
    assert all(identifiers) and not identifiers[0] & identifiers[1]


CURVES = """
import json, sys
from pathlib import Path
from newllm_jax.report.curves import training_drawings
from newllm_jax.report.plots import save_drawings
save_drawings(Path("curves.png"), training_drawings(json.loads(sys.argv[1])), "title")
"""


def test_the_current_folder_has_no_say_in_the_curves(tmp_path):
    save_drawings(tmp_path / "expected.png", training_drawings(entries(2)), "title")
    settings = "text.usetex: True\nsavefig.dpi: 10\nlines.linewidth: 9\n"  # LaTeX is a program that would be run
    (tmp_path / "matplotlibrc").write_text(settings)
    (tmp_path / "latex").write_text(f"#!/bin/sh\ntouch {tmp_path}/left\n")
    (tmp_path / "latex").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-P", "-c", CURVES, json.dumps(entries(2))]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert not (tmp_path / "left").exists()
