"""Bad input is one line with exit code 2, and a measurement that fails or takes too long is a row that says so."""

from __future__ import annotations

import sys
import time

import pytest

from benchmarks import cascade, generation, newllm, signal, startup
from benchmarks.harness.machine import device_slug
from benchmarks.harness.program import Program, run_program
from newllm_jax.errors import InputError


@pytest.mark.quick
@pytest.mark.parametrize(
    ("main", "argv", "says"),
    [
        (newllm.main, ["--peers", "tensorflow"], "peers: no 'tensorflow'"),
        (newllm.main, ["--config", "advnced"], "did you mean advanced?"),
        (newllm.main, ["--config", ""], "names no configuration"),
        (newllm.main, ["--updates", "0"], "positive integer"),
        (newllm.main, ["--sweep", "length", "--sizes", "64,x"], "sizes: '64,x'"),
        (newllm.main, ["--sweep", "seeds", "--seeds", "0,-1"], "seeds: '0,-1'"),
        (cascade.main, ["--seeds", "a"], "seeds: 'a'"),
        (newllm.main, ["--precision", "fp99"], "precision: must be one of"),
        (newllm.main, ["--output", "/dev/null/x.json"], "/dev/null"),
        (cascade.main, ["--only", "nothing"], "only: no 'nothing'"),
        (startup.main, ["--imports", "many"], "--imports"),
        (generation.main, ["--forms", "dots,tables"], "forms: no 'tables'"),
        (signal.main, ["--variants", "normal,xavier"], "variants: no 'xavier'"),
        (signal.main, ["--variants", "none"], "names no variant"),
        (signal.main, ["--config", "advnced"], "did you mean advanced?"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, main, argv, says):
    monkeypatch.setattr(sys, "argv", ["benchmark", *argv])
    monkeypatch.setattr(Program, "measure", lambda *_, **__: pytest.fail("something was measured before the refusal"))
    assert run_program(main) == 2
    err = capsys.readouterr().err
    assert (err[:7], err.count("\n")) == ("error: ", 1) and says in err


@pytest.mark.quick
def test_device_names_for_files():
    found = [device_slug(name) for name in ("NVIDIA H200", "Tesla T4", "cpu", "NVIDIA A100-SXM4-40GB")]
    assert found == ["h200", "t4", "cpu", "a100-sxm4-40gb"]


def fails(task):
    raise RuntimeError("CUDA error: no kernel image\nmore lines")


def refuses(task):
    raise InputError("dataset: nope")


def dawdles(task):
    time.sleep(60)


def test_a_failing_measurement_is_a_line_and_the_next_one_goes_on():
    here = "tests.benchmarks.harness.test_program"
    with Program("newllm", "").parse([]) as program:
        assert program.measure(f"{here}:fails", {}, "a") == {"error": "RuntimeError: CUDA error: no kernel image"}
        assert program.measure(f"{here}:dawdles", {}, "b", limit=0.5) == {"error": "given up after 0.5 s"}
        with pytest.raises(InputError, match="dataset: nope"):
            program.measure(f"{here}:refuses", {}, "c")
        with pytest.raises(InputError, match="no kernel image"):
            program.measure(f"{here}:fails", {}, "d", fatal=True)
