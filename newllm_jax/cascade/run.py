"""A CASCADE run on disk: where its stages lie, which of their weights go on, and its models given back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from newllm_jax.cascade.ensemble import TrainedStage
from newllm_jax.cascade.paths import Routing, TrainedDesign
from newllm_jax.cascade.probe import init_probe
from newllm_jax.cascade.stage.designs import build_design
from newllm_jax.cascade.stage.model import Stage, init_stage, stage_config
from newllm_jax.config import CascadeConfig
from newllm_jax.content import read_arrays, write_arrays
from newllm_jax.errors import InputError
from newllm_jax.processes import host_copies, is_first
from newllm_jax.records.directory import RunDir
from newllm_jax.records.exported import exported_value, is_exported, open_trained, write_description
from newllm_jax.records.results import check_fingerprints, stored_fingerprints
from newllm_jax.records.stored_config import stored_config
from newllm_jax.records.tensor_file import read_tree, write_tree
from newllm_jax.smollm.base import fingerprints, load_base
from newllm_jax.smollm.pretrained import Pretrained
from newllm_jax.smollm.tokenizer import Tokenizer
from newllm_jax.training.history import History, best_epoch, is_finished
from newllm_jax.training.manifest import Owner, tree_sha256
from newllm_jax.training.step import Params

ROUTING = "routing.arrays"  # the file of a run directory that says which tokens take which path
STAGES = "stages.safetensors"  # the file of an exported folder with what was trained


@dataclass(frozen=True)
class CascadeRun:
    """A frozen base and the stages trained on it, ready to call.

    Attributes:
      base: the base model, its parameters (NumPy) and where they came from.
      stage: the architecture of all stages: `run.stage.apply({"params": run.stages[0].params}, hidden)`.
      stages: parameters and threshold of each, in order.
      config: of the run.
      run: its directory.
    """

    base: Pretrained
    stage: Stage
    stages: tuple[TrainedStage, ...]
    config: CascadeConfig
    run: RunDir

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the base."""
        return self.base.tokenizer


@dataclass(frozen=True)
class DesignRun:
    """A frozen base and a design trained on it, ready to call.

    Attributes:
      base: the base model, its parameters (NumPy) and where they came from.
      trained: the design, the base's parameters and the trained ones, on the device.
      routing: which tokens take which path.
      kept_stages: 1, or 0 where the base alone was better on validation and the run keeps the best.
      config: of the run.
      run: its directory.
    """

    base: Pretrained
    trained: TrainedDesign
    routing: Routing
    kept_stages: int
    config: CascadeConfig
    run: RunDir

    @property
    def tokenizer(self) -> Tokenizer:
        """Of the base."""
        return self.base.tokenizer


def stage_folder(run: RunDir, number: int) -> Path:
    """The folder of the checkpoints of stage `number` (from 1)."""
    return run.checkpoints / f"stage_{number}"


def extraction_folder(run: RunDir) -> Path:
    """The folder of hidden states and what else is made of them, until the run is finished."""
    return run.path / "extraction"


def begun_stages(run: RunDir) -> list[int]:
    """The numbers of the stages that have a folder, rising."""
    names = (re.fullmatch(r"stage_([1-9]\d{0,8})", path.name) for path in run.checkpoints.glob("stage_*"))
    return sorted(int(name[1]) for name in names if name)


def stage_owner(run: RunDir, earlier: Sequence[TrainedStage]) -> Owner:
    """Whose the checkpoints of the next stage are: it was trained on what the stages before it handed on."""
    after = tree_sha256(earlier[-1].params) if earlier else ""
    return Owner(run.run_id, f"stage_{len(earlier) + 1}", after, run.description)


def chosen_epoch(history: History, config: CascadeConfig) -> int:
    """The epoch whose weights go on to the next stage and to the ensemble."""
    return len(history) if config.stage_weights == "last" else best_epoch(history)


def restore_cascade(run_dir: str | Path) -> CascadeRun | DesignRun:
    """The base and the finished stages of a run, each with the weights that went on. Changes nothing on disk.

    A run of a design other than the published one gives a `DesignRun`.

    Args:
      run_dir: a run directory or an exported folder.

    Raises:
      InputError: not a CASCADE run, one without a finished stage or whose stages are damaged, or a base that cannot be
        had.
    """
    run = open_trained(run_dir)
    config = stored_config(run, CascadeConfig)
    base = load_base(config)
    check_fingerprints(run, fingerprints(base))
    if not config.has_published_design:
        return restore_design(run, config, base)
    stage = Stage(stage_config(base.model.config, config.stage_layers))
    if is_exported(run):
        return CascadeRun(base, stage, _read_exported_stages(run, stage, config), config, run)
    stages = read_stages(run, stage, config)
    if not stages:
        raise InputError(f"{run.path}: has no trained stage yet; cascade.py --resume {run.path} continues it")
    expected = _stages_in_results(run, config)
    if len(stages) < expected:
        again = f"cascade.py --resume {run.path} trains the others again"
        raise InputError(f"{run.path}: has {len(stages)} of its {expected} stages; {again}")
    if config.kept_stages == "best":
        kept = run.read_json("results.json").get("kept_stages", len(stages)) if expected else len(stages)
        stages = stages[:kept]
    return CascadeRun(base, stage, tuple(stages), config, run)


def _read_exported_stages(run: RunDir, stage: Stage, config: CascadeConfig) -> tuple[TrainedStage, ...]:
    thresholds = exported_value(run, "thresholds", tuple[float, ...])
    like = jax.eval_shape(lambda: init_stage(stage, config.seed, 1))
    params = jax.device_put(read_tree(run.path / STAGES, _numbered([like] * len(thresholds))))
    return tuple(map(TrainedStage, params.values(), thresholds))


def _numbered(stages: Sequence[Params]) -> dict[str, Params]:
    return {f"stage_{number}": params for number, params in enumerate(stages, 1)}


def export_cascade(trained: CascadeRun | DesignRun, run: RunDir, folder: Path) -> None:
    """Writes `stages.safetensors` and `newllm.json` into an empty folder: all but the base, which keeps its name.

    Args:
      run: the directory that `trained` was restored from.
    """
    exported: dict[str, Any]
    if isinstance(trained, DesignRun):
        write_tree(folder / STAGES, {"trained": trained.trained.params, "probe": trained.routing.probe})
        exported = {"threshold": trained.routing.threshold, "kept_stages": trained.kept_stages}
    else:
        write_tree(folder / STAGES, _numbered([stage.params for stage in trained.stages]))
        exported = {"thresholds": [stage.threshold for stage in trained.stages]}
    write_description(folder, run, stored_fingerprints(run), exported)


def _stages_in_results(run: RunDir, config: CascadeConfig) -> int:
    """How many stages the results of a run are of, which may by now have begun another one; 0 where it has none."""
    if not (run.path / "results.json").exists():
        return 0
    try:
        return len(run.read_json("results.json")["stages"])
    except (InputError, KeyError, TypeError):
        return config.num_stages


def read_stages(run: RunDir, stage: Stage, config: CascadeConfig) -> list[TrainedStage]:
    """The stages of a run up to the first that is not finished, each with the weights that went on.

    Raises:
      InputError: a stage that is damaged, or not finished although later ones are there.
    """
    from newllm_jax.training.checkpoint import read_chosen
    from newllm_jax.training.checkpoint_folder import epochs_in

    like, choose = jax.eval_shape(lambda: init_stage(stage, config.seed, 1)), partial(chosen_epoch, config=config)
    begun = [
        number for number in begun_stages(run) if number <= config.num_stages and epochs_in(stage_folder(run, number))
    ]  # fmt: skip
    stages = list[TrainedStage]()
    for number in range(1, max(begun, default=0) + 1):
        _, params, record = read_chosen(stage_folder(run, number), stage_owner(run, stages), like, choose)
        if not is_finished(record["history"], config):
            if number < max(begun):
                raise InputError(f"{run.path}: stage {number} is not finished, although later ones are there")
            break
        stages.append(TrainedStage(params, record["threshold"]))
    return stages


def _routing_key(params: Any) -> list[Any]:
    """What the content of `routing.arrays` depends on."""
    return ["routing", tree_sha256(params)]


def write_routing(run: RunDir, routing: Routing, kept_stages: int, params: Any) -> None:
    """Writes the threshold, the probe and the number of stages that are used, for these trained parameters."""
    arrays = {"threshold": np.float64(routing.threshold), "kept_stages": np.int32(kept_stages)}
    if routing.probe is not None:
        leaves = jax.tree_util.tree_leaves_with_path(routing.probe)
        arrays |= {f"probe{jax.tree_util.keystr(path)}": np.asarray(leaf) for path, leaf in leaves}
    key = _routing_key(host_copies(params))
    if is_first():
        write_arrays(run.path / ROUTING, key, arrays)


def has_finished_design(run: RunDir, base: Pretrained, config: CascadeConfig) -> bool:
    """Whether a run of a design has all that `restore_cascade` reads."""
    if not (run.path / ROUTING).exists():
        return False
    restore_design(run, config, base)
    return True


def restore_design(run: RunDir, config: CascadeConfig, base: Pretrained) -> DesignRun:
    """The trained design of a run on a base that was read. Raises InputError where it is not finished."""
    design = build_design(config, base.model, "fp32")
    moment = jnp.eye(base.model.config.hidden_size)
    like = jax.eval_shape(lambda params: design.init(params, config.seed, moment), base.params)
    probe_like = None
    if config.criterion == "probe":
        probe_like = jax.eval_shape(lambda: init_probe(base.model.config.hidden_size, 0))
    if is_exported(run):
        tree = read_tree(run.path / STAGES, {"trained": like, "probe": probe_like})
        params, probe = tree["trained"], tree["probe"]
        threshold = exported_value(run, "threshold", float)
        kept_stages = exported_value(run, "kept_stages", int, least=0, most=1)
    else:
        params, found = _trained_design(run, config, like)
        named, structure = jax.tree_util.tree_leaves_with_path(probe_like), jax.tree.structure(probe_like)
        probe = jax.tree.unflatten(structure, [found[f"probe{jax.tree_util.keystr(path)}"] for path, _ in named])
        threshold, kept_stages = float(found["threshold"]), int(found["kept_stages"])
    trained = TrainedDesign(design, jax.device_put(base.params), jax.device_put(params))
    return DesignRun(base, trained, Routing(threshold, probe), kept_stages, config, run)


def _trained_design(run: RunDir, config: CascadeConfig, like: Params) -> tuple[Params, dict[str, np.ndarray]]:
    """What was trained, and the content of the file of its routing. Raises InputError where it is not finished."""
    from newllm_jax.training.checkpoint import read_chosen

    choose = partial(chosen_epoch, config=config)
    _, params, record = read_chosen(stage_folder(run, 1), stage_owner(run, []), like, choose)
    found = read_arrays(run.path / ROUTING, _routing_key(params)) if is_finished(record["history"], config) else None
    if found is None:
        raise InputError(f"{run.path}: is not finished; cascade.py --resume {run.path} continues it")
    return params, found
