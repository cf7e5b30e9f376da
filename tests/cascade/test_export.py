"""Exported stages: those of the published design, and a design with its routing, are the run again."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import newllm_jax
from newllm_jax.errors import InputError
from newllm_jax.systems import evaluate, export, restore


@pytest.fixture(scope="module")
def published(tiny, tmp_path_factory):
    config = tiny.override({"num_stages": 2, "num_epochs": 1})
    return newllm_jax.train_cascade(config, run_root=tmp_path_factory.mktemp("published"), narrate=str).run_dir


def test_stages_are_the_run_again(published, tmp_path):
    folder = export(published, tmp_path / "new")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "newllm.json", "stages.safetensors"]
    run, again = restore(published), restore(folder)
    assert [stage.threshold for stage in run.stages] == [stage.threshold for stage in again.stages]
    jax.tree.map(np.testing.assert_array_equal, [s.params for s in run.stages], [s.params for s in again.stages])
    assert (run.stage, run.config, len(again.stages)) == (again.stage, again.config, 2)
    assert evaluate(folder) == evaluate(published)
    assert "`transformers` cannot run it" in (folder / "README.md").read_text()


@pytest.mark.parametrize("fixture", ["reentry_run", "skip_run"])
def test_a_design_is_the_run_again(request, fixture, tmp_path):
    run_dir = request.getfixturevalue(fixture).run_dir
    folder = export(run_dir, tmp_path / "new")
    run, again = restore(run_dir), restore(folder)
    assert (run.trained.design, run.routing.threshold, run.kept_stages) == (
        again.trained.design, again.routing.threshold, again.kept_stages
    )  # fmt: skip
    for each, other in ((run.trained.params, again.trained.params), (run.routing.probe, again.routing.probe)):
        jax.tree.map(np.testing.assert_array_equal, each, other)
    assert (run.routing.probe is None) == (run.config.criterion != "probe")
    measured = json.loads((run_dir / "results.json").read_text())["ensemble"]
    losses = [entry["val_loss"] for entry in evaluate(folder)["ensemble"]]
    assert losses == pytest.approx([entry["val_loss"] for entry in measured], rel=1e-5)


@pytest.mark.parametrize("thresholds", [None, [0.5], ["a", "b"]])
def test_thresholds_that_do_not_fit_are_named(published, tmp_path, thresholds):
    from newllm_jax.content import sealed

    file = export(published, tmp_path / "new") / "newllm.json"
    description = json.loads(file.read_text())
    del description["sha256"]
    description["export"]["thresholds"] = thresholds
    file.write_text(json.dumps(sealed(description)))
    with pytest.raises(InputError, match=r"newllm.json: damaged \(thresholds: |tensor 'stage_2.* is not expected"):
        restore(file.parent)
