"""The form of `config.json` and `results.json`, the same for all systems, and the fingerprints of what a run reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.config import Precision, RunConfig
from newllm_jax.content import json_sha256
from newllm_jax.errors import InputError
from newllm_jax.records.directory import RunDir
from newllm_jax.records.machine import command_line, environment, peak_memory_bytes

SCHEMA_VERSION = 2  # since 2 the files have a hash of their content


@dataclass(frozen=True)
class RunResult:
    """The result of a training run, whatever the system.

    Attributes:
      run_dir: the directory of its files.
      results: the content of `results.json`.
    """

    run_dir: Path
    results: dict[str, Any]


@dataclass(frozen=True)
class Fingerprint:
    """A hash of the content of a source.

    Attributes:
      name: `data` or `base`, its key in `config.json`.
      source: the setting and the source, for a message: `dataset: data/wikitext`.
      value: a sha256 over the content.
    """

    name: str
    source: str
    value: str


def describe_run(
    config: RunConfig, precision: Precision, fingerprints: tuple[Fingerprint, ...], files: Mapping[str, Any] = {}
) -> dict[str, Any]:  # fmt: skip
    """The content of `config.json`, which every checkpoint has too.

    Args:
      files: the content of other JSON files that the run needs, by name; `config.json` has their hashes.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "system": config.system,
        "config": config.to_dict(),
        "fingerprints": {each.name: each.value for each in fingerprints},
        "files": {name: json_sha256(content) for name, content in files.items()},
        "environment": environment(precision),
    }


def check_fingerprints(
    run: RunDir, fingerprints: tuple[Fingerprint, ...], before: Mapping[str, str] | None = None
) -> None:  # fmt: skip
    """Raises InputError where a source at hand is not what the run was trained on.

    Args:
      before: for runs whose `config.json` has no fingerprints (those of New-LLM up to version 0.1.0).
    """
    stored = stored_fingerprints(run, before)
    for now in fingerprints:
        value = stored.get(now.name, now.value)
        if value != now.value:
            raise InputError(
                f"{now.source} is not what the run was trained on (fingerprint {value[:12]}, now {now.value[:12]})"
            )


def stored_fingerprints(run: RunDir, before: Mapping[str, str] | None = None) -> dict[str, str]:
    """The fingerprints that `config.json` has, or `before` where it has none.

    Raises:
      InputError: a damaged file.
    """
    stored = run.description.get("fingerprints", before or {})
    if not isinstance(stored, dict) or not all(isinstance(value, str) for value in stored.values()):
        raise InputError(f"{run.path / 'config.json'}: damaged (fingerprints are texts by name)")
    return dict(stored)


def results_header(run: RunDir, config: RunConfig, precision: Precision) -> dict[str, Any]:
    """The first entries of `results.json`."""
    return {
        "schema_version": SCHEMA_VERSION,
        "system": config.system,
        "run_id": run.run_id,
        "name": run.path.name,
        "config": config.to_dict(),
        "command": command_line(),
        "environment": environment(precision),
    }


def results_footer(seconds: float) -> dict[str, Any]:
    """The last entries of `results.json`; `seconds`: the duration of the run."""
    return {"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}


def results_of_command(seconds: float) -> dict[str, Any]:
    """The first entries of the JSON of a command that trains nothing; `seconds`: how long it took."""
    return {"schema_version": SCHEMA_VERSION, "command": command_line(), "environment": environment("fp32"),
            "seconds": seconds}  # fmt: skip


def finished_results(run: RunDir, key: str, count: int) -> dict[str, Any] | None:
    """The results of a run, if it has them and they are of so many epochs or stages at least; else None.

    A run that was extended, and stopped after its last epoch, still has the results of before. Damaged ones, or those
    of another run, are as good as none: they are made again.

    Args:
      key: `epochs` or `stages`.
    """
    try:
        results = run.read_json("results.json")
        is_whole = results.get("run_id", "") == run.run_id and len(results[key]) >= count
    except (InputError, KeyError, TypeError, AttributeError):
        return None
    return results if is_whole else None
