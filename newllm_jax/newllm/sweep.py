"""Many trainings of New-LLM, those that can share a compiled program side by side: `newllm sweep`.

The directory of a sweep has `config.json` (what is common, and the grid), `results.json`, `report.md`, and in `members`
a run directory for each member, as `newllm train` leaves it but for the report, which `newllm report` writes: it can be
restored, evaluated, compared. Its losses are those of a single run but for rounding; its times are those of all members
beside it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax

from newllm_jax.config import NewLLMConfig, check, checked, checked_path
from newllm_jax.content import json_sha256
from newllm_jax.errors import InputError, NumericalError
from newllm_jax.newllm.experiment import OpenRun, Setup, data_facts, start_warnings
from newllm_jax.newllm.grid import GridMember, grid_members
from newllm_jax.newllm.plan import check_fits, members_that_fit, parameter_count
from newllm_jax.newllm.updates import Numbers, build_members, program_of, training_precision
from newllm_jax.newllm.wikitext import PREPARED_BY, Wikitext, load_wikitext
from newllm_jax.records.directory import RunDir
from newllm_jax.records.machine import environment
from newllm_jax.records.narration import Narrate
from newllm_jax.records.progress import narrate_start
from newllm_jax.records.results import SCHEMA_VERSION, RunResult, results_footer, results_header
from newllm_jax.records.stored_config import stored_config
from newllm_jax.records.sweep_progress import SweepProgress
from newllm_jax.report.finish import PAGE, write_results
from newllm_jax.report.sweep import finished_row, member_row, write_sweep_report
from newllm_jax.training.clock import Clock
from newllm_jax.training.members import Member, fit_members
from newllm_jax.training.mesh import DeviceMesh
from newllm_jax.training.stopping import Asked, Stopping, never

SYSTEM = "new-llm-sweep"  # in `config.json`; no command takes its directory for a run
MEMBERS = "members"  # the folder of their run directories
FAILURE = "failed.json"  # of a member whose loss did not stay finite
ON_DEVICE = {"examples": "device"}  # where members find their data, however large they are
MOST_AT_ONCE = 64  # each holds a lock and threads that write its checkpoints


class Group(NamedTuple):
    """Members that are trained side by side, and what they read."""

    members: list[GridMember]
    data: Wikitext


def sweep_newllm(
    config: NewLLMConfig | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    *,
    name: str = "sweep",
    run_root: str | Path = "runs",
    resume: str | Path | None = None,
    at_once: int | None = None,
    narrate: Narrate = print,
    stop: Asked = never,
) -> RunResult:
    """Trains every combination of the values of a grid, and evaluates the best parameters of each on the test split.

    Args:
      config: the settings that are common to all members.
      grid: the values of each setting that is not: `{"learning_rate": [1e-3, 2e-3], "seed": [0, 1, 2]}`.
      name, run_root: a new sweep goes to `run_root/name-time`.
      resume: the directory of a sweep to continue, with no config and no grid.
      at_once: the most members that are trained side by side; None: as many as fit into memory.
      narrate, stop: as for `train_newllm`.

    Raises:
      InputError: a setting, data set or directory that cannot be used.
      NumericalError: no member has a loss that stays finite.
      Stopped: `stop` or `time_limit` ended the sweep; resuming continues it after the last whole epoch.
    """
    clock = Clock()
    with ExitStack() as stack:
        if resume is None:
            config, sweep = config or NewLLMConfig(), None
            check("config", config, "a NewLLMConfig", isinstance(config, NewLLMConfig))
        else:
            if config is not None or grid:
                raise InputError("resume: a sweep goes on with the settings and the grid that it was started with")
            sweep = stack.enter_context(RunDir.open(checked_path("run_dir", resume)))
            config, grid = _stored(sweep)
        members = grid_members(config, grid or {})
        groups, config = list(_groups(members, at_once)), members[0].config
        sweep = sweep or stack.enter_context(RunDir.create(run_root, name))
        _begin(sweep, members, grid or {}, groups, narrate)
        stopping, rows = Stopping(clock, sweep.path, config, stop), list[dict[str, Any]]()
        for number, group in enumerate(groups, 1):
            narrate(f"program {number} of {len(groups)}: {len(group.members)} members side by side")
            rows += _train_group(sweep, group, stopping, narrate)
        results = write_results(sweep, write_sweep_report, {
            **results_header(sweep, config, training_precision(config)),
            "system": SYSTEM, "grid": sweep.description["grid"], "programs": len(groups),
            "members": sorted(rows, key=lambda row: row["number"]),
            **results_footer(clock.seconds()),
        })  # fmt: skip
    narrate(f"report      {sweep.path / PAGE}")
    if all("failed" in row for row in rows):
        raise NumericalError(f"no member could be trained to its end; the first: {rows[0]['failed']}")
    return RunResult(sweep.path, results)


def plan_sweep(
    config: NewLLMConfig, grid: Mapping[str, Sequence[Any]], at_once: int | None = None
) -> dict[str, Any]:  # fmt: skip
    """What a sweep would be: its members, and which of them are trained side by side.

    Raises:
      InputError: as `sweep_newllm`.
    """
    members = grid_members(config, grid)
    groups = list(_groups(members, at_once))
    return {
        "system": SYSTEM,
        "config": members[0].config.to_dict(),
        "grid": _as_json(members, grid),
        "environment": environment(training_precision(members[0].config)),
        "programs": [
            {
                "members": [member.name for member in group.members],
                "parameters": parameter_count(group.members[0].config, len(group.data.tokenizer)),
                "updates_per_epoch": group.data.steps(group.members[0].config),
                "num_epochs": group.members[0].config.num_epochs,
            }
            for group in groups
        ],
    }


def _groups(members: Sequence[GridMember], at_once: int | None) -> Iterator[Group]:
    """Members whose compiled programs are the same, in groups of nearly equal size that fit into memory."""
    limit: int = checked("at_once", MOST_AT_ONCE if at_once is None else at_once, int, least=1)
    programs: dict[str, list[GridMember]] = {}
    for member in members:
        programs.setdefault(json_sha256(program_of(member.config)), []).append(member)
    data: dict[str, Wikitext] = {}
    for alike in programs.values():
        config = alike[0].config
        read = json_sha256(
            [config.dataset, config.dataset_config, config.fallback, *(getattr(config, name) for name in PREPARED_BY)]
        )
        data[read] = data[read] if read in data else load_wikitext(config)
        precision = training_precision(config)
        check_fits(config.override(ON_DEVICE), data[read], precision)
        devices = sweep_mesh(config, len(alike)).size
        most = devices * members_that_fit(config, data[read], precision, math.ceil(len(alike) / devices))
        count = math.ceil(len(alike) / min(most, limit))
        size = math.ceil(len(alike) / count)
        for first in range(0, len(alike), size):
            yield Group(alike[first : first + size], data[read])


def _begin(
    sweep: RunDir,
    members: Sequence[GridMember],
    grid: Mapping[str, Sequence[Any]],
    groups: Sequence[Group],
    narrate: Narrate,
) -> None:
    """Writes `config.json` of a new sweep, and tells what was resolved."""
    config, data = members[0].config, groups[0].data
    precision = training_precision(config)
    facts = {
        "data": f"{data.provenance['source']}: {data_facts(data, config)}",
        "members": f"{len(members)}, in {len(groups)} program{'s' * (len(groups) > 1)}",
    }
    warnings = [line for group in groups for line in start_warnings(group.members[0].config, group.data)]
    narrate_start(narrate, sweep, precision, facts, dict.fromkeys(warnings))
    if not sweep.description:
        stored = {"config": config.to_dict(), "grid": _as_json(members, grid)}
        description = {**stored, "environment": environment(precision)}
        sweep.begin({"schema_version": SCHEMA_VERSION, "system": SYSTEM, **description})


def _as_json(members: Sequence[GridMember], grid: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """The settings of a grid that differ, as JSON has them, with the values that the members' configurations have."""
    settings = [member.config.to_dict() for member in members]
    found: dict[str, list[Any]] = {name: [] for name, values in grid.items() if len(values) > 1}
    for name, values in found.items():
        values.extend(each[name] for number, each in enumerate(settings) if each[name] not in
                      [other[name] for other in settings[:number]])  # fmt: skip
    return found


def _stored(sweep: RunDir) -> tuple[NewLLMConfig, dict[str, Any]]:
    """What a sweep was started with. Raises InputError where it is none, or damaged."""
    if sweep.description.get("system") != SYSTEM:
        raise InputError(f"{sweep.path}: not a sweep")
    grid = sweep.description.get("grid")
    try:
        check("grid", grid, "a table", isinstance(grid, dict))
        return NewLLMConfig.from_dict(sweep.description["config"]), sweep.description["grid"]
    except (InputError, KeyError) as error:
        raise InputError(f"{sweep.path / 'config.json'}: damaged ({error})") from error


def _train_group(sweep: RunDir, group: Group, stopping: Stopping, narrate: Narrate) -> list[dict[str, Any]]:
    """Trains the members that are not finished and writes their results; the rows of all of them."""
    with ExitStack() as stack:
        runs: dict[int, OpenRun] = {}
        for member in group.members:
            run = stack.enter_context(RunDir.open_or_create(sweep.path / MEMBERS / member.folder))
            if run.description:
                member.config.check_resumption(stored_config(run, NewLLMConfig), str(run.path))
            setup = Setup.from_config(member.config, group.data)
            if runs:  # they share one compiled evaluation
                shared = next(iter(runs.values())).setup.training.evaluate
                setup = setup._replace(training=dataclasses.replace(setup.training, evaluate=shared))
            quiet = _ignore if not run.description else lambda line, name=member.name: narrate(f"{name}: {line}")
            runs[member.number] = OpenRun.begin(stack, run, setup, stopping.clock, quiet)
        results = {number: run.finished() for number, run in runs.items()}
        failures = {number: failure for number, run in runs.items() if (failure := _stored_failure(run.run))}
        left = {number: run for number, run in runs.items() if results[number] is None and number not in failures}
        if left:
            failures |= _fit(
                {member: left[member.number] for member in group.members if member.number in left}, stopping, narrate
            )
        for number, run in left.items():
            if number in failures:
                run.run.write_json(FAILURE, {"schema_version": SCHEMA_VERSION, "failed": failures[number]})
                continue
            stopping.check("test")
            with stopping.timed("test"):
                results[number] = run.run.write_json("results.json", run.finish())
        return [_row(member, results[member.number], failures.get(member.number, "")) for member in group.members]


def _stored_failure(run: RunDir) -> str:
    """Why a member could not go on, by an earlier process; "" where it could."""
    return str(run.read_json(FAILURE).get("failed", "")) if (run.path / FAILURE).is_file() else ""


def _row(member: GridMember, results: dict[str, Any] | None, failure: str) -> dict[str, Any]:
    """A member in the results of the sweep."""
    row = member_row(member.number, member.name, member.settings, f"{MEMBERS}/{member.folder}")
    return row | ({"failed": failure} if results is None else finished_row(results))


def _fit(runs: Mapping[GridMember, OpenRun], stopping: Stopping, narrate: Narrate) -> dict[int, str]:
    """Trains runs side by side; why some of them could not go on, by number."""
    first = next(iter(runs.values())).setup
    mesh = sweep_mesh(first.config, len(runs))
    program = build_members(first.config, first.model, first.data.steps(first.config), len(runs), mesh)
    members = []
    for member, run in runs.items():
        run.run.write_metrics(run.history)
        members.append(Member(
            member.name, run.setup.config, run.setup.training, Numbers.from_config(run.setup.config), run.checkpoints,
            run.run.append_metrics, run.state, run.history,
        ))  # fmt: skip
    config = first.config.override(ON_DEVICE)
    splits = {name: first.data.split(name, config) for name in ("train", "validation")}
    with SweepProgress(members, first.config.num_epochs, narrate) as progress:
        fit_members(program, members, splits, stopping, progress)
    for run, member in zip(runs.values(), members, strict=True):
        run.state, run.history = member.state, member.history
    return {
        member.number: trained.failure for member, trained in zip(runs, members, strict=True) if trained.failure
    }  # fmt: skip


def sweep_mesh(config: NewLLMConfig, members: int) -> DeviceMesh:
    """The devices that share out some members: for `auto` all, but no more than there are members."""
    if config.mesh == "auto":
        return DeviceMesh(min(jax.device_count(), members))
    mesh = DeviceMesh.parse(config.mesh)
    check("mesh", config.mesh, "auto or data=N in a sweep, whose members are each on one device", mesh.fsdp == 1)
    check("mesh", config.mesh, f"of no more devices than the {jax.device_count()} here",
          mesh.size <= jax.device_count())  # fmt: skip
    return mesh


def _ignore(line: str) -> None:
    """Of a new member there is nothing to tell that its sweep has not told."""
