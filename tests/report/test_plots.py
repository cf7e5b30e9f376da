"""Learning curves."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys

import pytest

from newllm_jax.report.plots import save_curves


def entries(count, val_ppl=50.0):
    return [
        {"epoch": epoch, "train_loss": 4 / epoch, "val_loss": 5 / epoch, "val_ppl": val_ppl and val_ppl / epoch}
        for epoch in range(1, count + 1)
    ]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_curves_are_a_picture(tmp_path, count):
    path = tmp_path / "curves.png"
    save_curves(path, entries(count), "title")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content.rstrip()[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (1200, 480)
    assert list(tmp_path.iterdir()) == [path]


def test_every_curve_is_drawn(tmp_path):
    pictures = []
    for change in ({}, {"train_loss": 1.0}, {"val_loss": 1.0}, {"val_ppl": 2.0}):
        save_curves(tmp_path / "curves.png", [{**entry, **change} for entry in entries(3)], "title")
        pictures.append((tmp_path / "curves.png").read_bytes())
    assert len(set(pictures)) == 4


def test_a_perplexity_that_overflowed_leaves_a_gap(tmp_path):
    save_curves(tmp_path / "curves.png", entries(2, val_ppl=None), "title")
    assert (tmp_path / "curves.png").stat().st_size > 1000


CURVES = """
import json, sys
from pathlib import Path
from newllm_jax.report.plots import save_curves
save_curves(Path("curves.png"), json.loads(sys.argv[1]), "title")
"""


def test_the_current_folder_has_no_say_in_the_curves(tmp_path):
    save_curves(tmp_path / "expected.png", entries(2), "title")
    settings = "text.usetex: True\nsavefig.dpi: 10\nlines.linewidth: 9\n"  # LaTeX is a program that would be run
    (tmp_path / "matplotlibrc").write_text(settings)
    (tmp_path / "latex").write_text(f"#!/bin/sh\ntouch {tmp_path}/left\n")
    (tmp_path / "latex").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "-P", "-c", CURVES, json.dumps(entries(2))]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "curves.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    assert not (tmp_path / "left").exists()
