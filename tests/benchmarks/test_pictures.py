"""The picture of the signals."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import pictures


def results():
    def epochs(scale):
        return [
            {"epoch": n, "val_ppl": 70.0 / scale / (n + 1), "signal": [scale, 0.1 * scale], "gradient": [0.1, scale]}
            for n in range(4)
        ]

    return {"variants": {"normal": {"epochs": epochs(1)}, "he": {"epochs": epochs(2)}, "residual": {"error": "no"}}}


def test_every_measure_of_every_variant_is_drawn(tmp_path):
    drawn = []
    changes = [
        ("signal", [1.0, 0.1]), ("signal", [1.0, 0.3]), ("gradient", [0.3, 1.0]), ("val_ppl", 50.0), ("val_ppl", None)
    ]  # fmt: skip
    for name, (what, value) in zip(("normal", "normal", "he", "normal", "he"), changes, strict=True):
        changed = copy.deepcopy(results())
        changed["variants"][name]["epochs"][2][what] = value  # the first is as it was; None overflowed: a gap
        pictures.save_signal(tmp_path / "picture.png", changed)
        drawn.append((tmp_path / "picture.png").read_bytes())
    assert len(set(drawn)) == len(changes)
    assert drawn[0][:8] == b"\x89PNG\r\n\x1a\n" and len(drawn[0]) < 150_000


def test_pictures_lie_beside_their_files(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "ablation"
    folder.mkdir()
    monkeypatch.setattr(pictures, "RESULTS", tmp_path)
    pictures.main([])
    assert list(folder.iterdir()) == []
    (folder / "signal-h100.json").write_text(json.dumps(results()))
    pictures.main([])
    assert sorted(path.name for path in folder.iterdir()) == ["signal-h100.json", "signal-h100.png"]
    with pytest.raises(Exception, match="absent.json"):
        pictures.main([str(tmp_path / "absent.json")])
