"""A trace of a few updates: of the second call, once, and none unless asked for."""

import gzip
import json

from newllm_jax import load_config, train_newllm
from newllm_jax.training.profile import UPDATES, Profile


def test_only_the_second_call_is_traced(tmp_path):
    profile = Profile(tmp_path)
    for updates in (1, 2, 3):
        with profile.call(updates):
            pass
    assert profile.updates == 2
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_a_run_keeps_a_trace_of_its_updates(small, tmp_path):
    told = []
    config = load_config("baseline", {**small, "num_epochs": 1, "profile": True})
    run = train_newllm(config, run_root=tmp_path, narrate=told.append).run_dir
    (trace,) = (run / "profile").rglob("*.trace.json.gz")
    with gzip.open(trace, "rt") as stream:
        events = json.load(stream)["traceEvents"]
    assert any("updates" in str(event.get("name")) for event in events)  # the compiled function
    (line,) = (line for line in told if line.startswith("profile"))
    assert line.startswith(f"profile     {UPDATES} updates: tensorboard --logdir {run / 'profile'}")


def test_without_the_setting_there_is_none(small_run):
    assert not (small_run / "profile").exists()
