"""One device and several: the same losses, batches, masks and members; and grids that cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from newllm_jax.config import CascadeConfig, FinetuneConfig, NewLLMConfig
from newllm_jax.errors import InputError
from newllm_jax.newllm.updates import training_mesh
from newllm_jax.training import mesh as meshes
from newllm_jax.training.mesh import DeviceMesh, choose_mesh
from tests.reliability.tiny import CHECKOUT

# What each run of `tests.training.meshes` on several devices is compared with.
PAIRS = {
    "windows@data=2": "windows@data=1",
    "windows@data=4": "windows@data=1",
    "windows@data=8": "windows@data=1",
    "parts@data=4": "windows@data=1",
    "files@data=4": "windows@data=1",
    "stream@data=8": "stream@data=1",
    "finetune@data=8": "finetune@data=1",
    "finetune@data=2,fsdp=4": "finetune@data=1",
    "lora@data=2,fsdp=2": "lora@data=1",
    "reentry@fsdp=8": "reentry@data=1",
    "published@data=4": "published@data=1",
    "sweep@auto": "sweep@data=1",
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """The losses of tiny runs on simulated devices, by `job@grid`."""
    asked = sorted({*PAIRS, *PAIRS.values()})
    folder = tmp_path_factory.mktemp("meshes")
    command = [sys.executable, "-m", "tests.training.meshes", str(folder), *asked]
    found = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, env={**os.environ})
    assert found.returncode == 0, found.stderr[-2000:]
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", PAIRS)
def test_losses_do_not_depend_on_the_devices(figures, name):
    one, several = figures[PAIRS[name]], figures[name]
    assert several["devices"] > one["devices"] == 1  # the knob was turned
    np.testing.assert_allclose(several["epochs"], one["epochs"], rtol=2e-4)
    assert one["epochs"][0] != one["epochs"][-1]  # something was learnt, or drawn, in between


def test_parameters_are_divided(figures):
    """A device has an eighth of what can be divided, and everything else."""
    whole, part = figures["finetune@data=1"]["held"], figures["finetune@data=2,fsdp=4"]["held"]
    assert part < 0.3 * whole
    assert figures["finetune@data=8"]["held"] == whole


def test_grids_of_settings():
    assert DeviceMesh.parse("data=4") == DeviceMesh(4, 1)
    assert DeviceMesh.parse("fsdp=2, data=3") == DeviceMesh(3, 2)
    assert str(DeviceMesh(2, 2)) == "data=2,fsdp=2"
    for wrong in ("4", "data=0", "data", "model=2", "data=2,data=2", "data=2;fsdp=2", "data=-1", "data=9999999"):
        with pytest.raises(InputError, match="mesh: .*auto, or numbers of devices"):
            DeviceMesh.parse(wrong)


def test_auto_takes_the_devices_that_share_out_a_batch_evenly(monkeypatch):
    monkeypatch.setattr(meshes.jax, "device_count", lambda: 8)
    assert choose_mesh("auto", 32).size == 8
    assert choose_mesh("auto", 12).size == 6
    assert choose_mesh("auto", 7).size == 7
    assert choose_mesh("auto", 11).size == 1
    with pytest.raises(InputError, match="4 devices cannot share out 6 examples evenly; change batch_size"):
        choose_mesh("data=4", 6)
    with pytest.raises(InputError, match="of no more devices than the 8 here"):
        choose_mesh("data=16", 32)


def test_several_processes_use_all_devices(monkeypatch):
    monkeypatch.setattr(meshes.jax, "device_count", lambda: 8)
    monkeypatch.setattr(meshes, "are_several", lambda: True)
    assert choose_mesh("auto", 16).size == 8
    with pytest.raises(InputError, match="8 devices cannot share out 12 examples evenly"):
        choose_mesh("auto", 12)
    with pytest.raises(InputError, match="of all 8 devices"):
        choose_mesh("data=4", 16)


def test_parameters_of_new_llm_are_not_divided(monkeypatch):
    monkeypatch.setattr(meshes.jax, "device_count", lambda: 8)
    with pytest.raises(InputError, match="too few to be divided"):
        training_mesh(NewLLMConfig(mesh="data=2,fsdp=2"))


def test_a_single_device_moves_nothing():
    tree = {"a": np.ones((4, 8))}
    one = DeviceMesh()
    assert one.place(tree) is tree and one.place_parameters(tree) is tree and one.share(tree) is tree
    assert jax.device_count() == 1  # of this process


def test_recomputation_is_refused_where_it_does_nothing():
    with pytest.raises(InputError, match="recompute: .*false where a stage has the published design"):
        CascadeConfig(recompute=True)
    assert FinetuneConfig(recompute=True).recompute
