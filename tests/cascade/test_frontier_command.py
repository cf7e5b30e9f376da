"""`newllm frontier` from end to end, on a run of each design."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest

from newllm_jax.cascade.frontier import POLICIES, SHARES
from newllm_jax.records.directory import RunDir
from newllm_jax.systems import frontier

pytestmark = pytest.mark.usefixtures("in_an_empty_folder")


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A text of another kind."""
    file = tmp_path_factory.mktemp("texts") / "other.txt"
    letters = np.random.default_rng(5).choice(list("etaoin shrdlu"), (40, 30))
    file.write_text("\n".join(map("".join, letters)))
    return str(file)


@pytest.fixture
def altered(reentry_run, tmp_path):
    """A copy of a run whose description says something else."""

    def alter(**changed):
        run = RunDir.open(shutil.copytree(reentry_run.run_dir, tmp_path / "altered"))
        run.begin({**run.description, **changed})
        return run.path

    return alter


NAMES = "reentry, seed 0", "skip, seed 0"


def squeezed(text):
    """A table without the blanks that align it."""
    return re.sub(" +", " ", text)


def test_two_runs(newllm, reentry_run, skip_run, elsewhere, tmp_path):
    runs = [reentry_run, skip_run]
    code, out, err = newllm("frontier", *(run.run_dir for run in runs), "--elsewhere", elsewhere, "--output", "a/b")
    assert code == 0, err
    folder = tmp_path / "a" / "b"
    assert {path.name for path in folder.iterdir()} == {"frontier.json", "frontier.md", "frontier.png"}
    page = (folder / "frontier.md").read_text()
    assert out == f"{page}\nwritten to a/b\n"
    assert (folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    content = json.loads((folder / "frontier.json").read_text(), parse_constant=pytest.fail)
    base, *entries = content["entries"]
    assert {"command", "environment", "seconds", "schema_version"} <= content.keys()
    assert [(each["name"], each["policy"]) for each in entries] == [
        (name, policy) for name in NAMES for policy in POLICIES
    ]  # fmt: skip
    for name, run, own in zip(NAMES, runs, (entries[:3], entries[3:]), strict=True):
        alone, routed = run.results["test"]
        row = routed if run.results["kept_stages"] else alone  # a run that keeps no stage is the base
        (point,), chosen = base["points"], own[0]["chosen"]
        assert (point["flops"], chosen["flops"]) == pytest.approx((1, row["flops"]))
        assert (point["loss"], chosen["loss"]) == pytest.approx((alone["loss"], row["loss"]), rel=1e-5)
        assert all([each["asked"] for each in entry["points"]] == list(SHARES) for entry in own)
        assert own[0]["trained_parameters"] == run.results["stages"][0]["stage_parameters"]
        (line,) = (line for line in page.splitlines() if line.startswith(f"| {name} ") and "to" in line
                   and ":" not in line)  # fmt: skip
        assert f"| {chosen['flops']:.3f} |" in squeezed(line) and f"{chosen['loss']:.4f} (" in line
        assert f"| {own[0]['elsewhere'][elsewhere]['loss']:.4f} |" in squeezed(line)
        curves = [line for line in page.splitlines() if line.startswith(f"| {name} ") and ": " in line]
        assert [line.split("|")[2].strip() for line in curves] == [
            run.results["config"]["criterion"], "oracle (knows the loss of both paths)", "chance"
        ]  # fmt: skip
    assert "| base | 0 | 1.000 |" in squeezed(page)
    assert entries[0]["elsewhere"][elsewhere]["loss"] != base["elsewhere"][elsewhere]["loss"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"system": "new-llm"}, "runs: {run} is a run of new-llm, which has no frontier"),
        (
            {"fingerprints": {"data": "another", "base": "one"}},
            "runs: {run} has another base or other chunks than {first}",
        ),
    ],
)  # fmt: skip
def test_runs_that_do_not_belong(refused, altered, skip_run, changed, message):
    run = altered(**changed)
    assert refused("frontier", skip_run.run_dir, run) == message.format(run=run, first=skip_run.run_dir)


def test_a_run_without_test_chunks(refused, altered, reentry_config):
    run = altered(config=reentry_config.override({"test_chunks": 0}).to_dict())
    assert refused("frontier", run) == f"test_chunks: must be above 0 in {run}, for a frontier, not 0"


def test_other_bad_input(refused, reentry_run, tmp_path):
    assert refused("frontier") == "the following arguments are required: RUN_DIR"
    assert refused("frontier", "nowhere") == "nowhere: no such run directory"
    (tmp_path / "file").write_text("")
    line = refused("frontier", reentry_run.run_dir, "--output=file")
    assert line == "output: must be a folder or a new name, not 'file'"
    (tmp_path / "short.txt").write_text("short")
    line = refused("frontier", reentry_run.run_dir, "--elsewhere=short.txt")
    assert line == "elsewhere: short.txt gives no chunk of 129 tokens"
    assert not (tmp_path / "frontier").exists()
    refused("frontier", reentry_run.run_dir, "--output=file/below")
    with pytest.raises(ValueError, match="runs: must be at least one run directory"):
        frontier([])
