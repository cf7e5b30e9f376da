"""`newllm sweep`: what it refuses, what it prints and leaves."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")

SMALL = [
    "--dataset=builtin", "--vocabulary_size=50", "--embed_dim=16", "--hidden_dim=16", "--context_dim=16",
    "--num_layers=2", "--sequence_length=8", "--stride=8", "--batch_size=1024", "--num_epochs=1",
]  # fmt: skip


@pytest.fixture
def output(newllm):
    """What a command prints that ends well."""

    def run(*argv):
        code, out, err = newllm(*argv)
        assert code == 0, err
        return out

    return run


@pytest.mark.quick
@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["--sead", "1,2"], "--sead: no such option; did you mean seed?"),
        (["--seed", "1,x"], "seed: 'x' is not an integer"),
        (["--seed", "1,,2"], "seed: '' is not an integer"),
        (["--seed", "1,1"], "seed: the values of members 1 and 2 are the same"),
        (["--seed", "1,-1"], "seed: must be from 0 to"),
        (["--dropout", "0.1,1"], "dropout: must be at least 0 and below 1, not 1.0"),
        (["--clip_norms", "1;x", "--clip_epochs", ""], "clip_norms: 'x' is not a list of numbers"),
        (["--at_once", "0"], "at_once: must be at least 1, not 0"),
        (["--at_once", "two"], "argument --at_once: invalid int value: 'two'"),
        (["--mirror", "elsewhere"], "mirror: does not go with a sweep"),
        (["--tracker", "none,tensorboard"], "tracker: does not go with a sweep"),
        (["--save_minutes", "5"], "save_minutes: does not go with a sweep"),
        (["--seed", ",".join(map(str, range(1001)))], "grid: 1,001 members are more than 1,000"),
        (["--config", "advnced"], "config: no configuration 'advnced'; did you mean advanced?"),
        (["--resume", "missing"], "missing: no such run directory"),
        (["--resume", "missing", "--seed", "1"], "seed: does not go with --resume"),
        (["--resume", "missing", "--config", "advanced"], "config: does not go with --resume"),
        (["--resume", "missing", "--dry_run"], "dry_run: does not go with --resume"),
    ],
)
def test_bad_input_is_one_line(refused, tmp_path, typed, message):
    assert message in refused("sweep", *typed)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.quick
def test_a_dry_run_tells_the_programs(output):
    planned = json.loads(output("sweep", *SMALL, "--dropout", "0,0.1,0.2", "--seed", "0,1", "--dry_run"))
    assert [len(program["members"]) for program in planned["programs"]] == [2, 4]
    assert planned["grid"] == {"dropout": [0.0, 0.1, 0.2], "seed": [0, 1]}


def test_what_a_sweep_prints_and_leaves(output, refused, tmp_path):
    out = output("sweep", *SMALL, "--seed", "0,1")
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("sweep-baseline-")
    assert "program 1 of 1: 2 members side by side" in out
    results = json.loads((folder / "results.json").read_text())
    best = min(row["best"]["val_ppl"] for row in results["members"])
    assert f"epoch   1/1  val PPL {best:.2f}" in out
    assert f"{best:.2f}" in (folder / "report.md").read_text()
    member = folder / results["members"][0]["run"]
    assert f"{results['members'][0]['best']['val_ppl']:.2f}" in output("report", str(member))
    assert "names no system that is known ('new-llm-sweep')" in refused("report", folder)
    assert "no results of a run" in refused("compare", folder)
    assert "not a sweep" in refused("sweep", "--resume", member)
