"""The examples of the documentation, run on small settings, and what they print."""

from __future__ import annotations

import re
from pathlib import Path
from runpy import run_path

import numpy as np
import pytest

from newllm_jax import train_cascade

PLAIN = {  # a model that compiles fast
    "cell": "plain", "variational_dropout": 0, "input_dropout": 0, "output_dropout": 0, "weight_dropout": 0,
    "weight_decay": 0, "ema_decay": 0,
}  # fmt: skip
FOLDER = Path(__file__).parent.parent / "docs" / "examples"


@pytest.fixture
def example(capsys):
    """Runs the `main` of an example: what it returns and prints."""

    def run(name: str, *arguments, **settings):
        result = run_path(str(FOLDER / f"{name}.py"))["main"](*arguments, **settings)
        return result, capsys.readouterr().out

    return run


def test_examples_are_short_and_say_what_they_show():
    files = sorted(FOLDER.glob("*.py"))
    assert len(files) == 5
    for file in files:
        text = file.read_text()
        assert text.startswith('"""') and f"python docs/examples/{file.name}" in text and "CPU cores" in text
        assert len(text.splitlines()) < 60


def test_a_cell_of_ones_own_learns(example, small):
    reached, out = example("own_cell", 4, **{**small, "batch_size": 16})
    found = [float(ppl) for ppl in re.findall(r"epoch \d  validation PPL (\S+)", out)]
    assert len(found) == 4 and f"{reached:.2f}" == f"{found[-1]:.2f}"
    assert found[-1] < found[0] < 64  # the size of the vocabulary, at which nothing is learned


def test_a_clipping_schedule_changes_the_training(example, small, tmp_path):
    taken = {name: value for name, value in small.items() if not name.startswith("clip")}
    histories, out = example("clipping_schedule", str(tmp_path), **{**taken, **PLAIN, "num_epochs": 3})
    one, rising = histories["one bound"], histories["rising bounds"]
    assert [entry["clip_norm"] for entry in one] == [1, 1, 1]
    np.testing.assert_allclose([entry["clip_norm"] for entry in rising], [0.1, 0.5, 2.0], rtol=1e-6)
    assert one[-1]["val_loss"] != rising[-1]["val_loss"]
    assert f"epoch 3  validation PPL {rising[-1]['val_ppl']:.2f}" in out


def test_hidden_states_turn_away_layer_by_layer(example, tiny_base):
    cosines, out = example("hidden_states", tiny_base, "Count", every=1)
    assert cosines.shape == (4, 5)  # the embedding, two layers, the last hidden state; five bytes
    np.testing.assert_allclose(cosines[0], 1, rtol=1e-6)
    assert np.all(cosines[2] < 0.99)
    assert out.splitlines()[0].split() == ["token", "layer", "0", "layer", "1", "layer", "2", "last"]
    assert f"{cosines[-1, 0]:9.3f}" in out.splitlines()[1] and out.splitlines()[1].startswith("'C'")


def test_a_stage_design_is_measured_beside_the_base(example, tiny_base, tiny_rows, tmp_path):
    rows, out = example(
        "stage_design", 1, 2, str(tmp_path), base_model=tiny_base, dataset=tiny_rows, train_chunks=9,
        validation_chunks=6, batch_size=4, num_epochs=2, learning_rate=0.02,
    )  # fmt: skip
    base, stage = rows
    assert base["exit_rates"] == [1.0] and stage["exit_rates"][1] == pytest.approx(0.4, abs=0.15)
    assert stage["val_loss"] != base["val_loss"]
    assert f"with the stage  validation PPL {stage['val_ppl']:.2f}" in out


def test_an_ensemble_is_measured_on_a_text(example, tiny, tmp_path):
    config = tiny.override({"num_stages": 2, "num_epochs": 1})
    trained = train_cascade(config, run_root=tmp_path, narrate=lambda _: None)
    page = tmp_path / "page.txt"
    page.write_text("alpha beta gamma delta 1234 omega " * 12)
    rows, out = example("own_text", str(trained.run_dir), str(page))
    assert [row["stages"] for row in rows] == [0, 1, 2]
    assert sum(group["tokens"] for group in rows[-1]["exit_groups"]) == 3 * 128  # three whole chunks of 408 bytes
    assert "Base+2  PPL" in out
    page.write_text("too short")
    with pytest.raises(SystemExit, match="has 9 tokens; at least 129 are needed"):
        example("own_text", str(trained.run_dir), str(page))
