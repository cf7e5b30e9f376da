"""An exported model: a folder that can be copied and published, and read like the run that it is from.

newllm.json   settings and fingerprints of the run, what was exported, a hash of each other file but the card
README.md     the model card, which anyone may edit
...           tensors, and vocabulary or tokenizer, as the system writes them
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from newllm_jax.config import checked, checked_path
from newllm_jax.errors import InputError
from newllm_jax.files import file_size
from newllm_jax.records.directory import EXPORTED, RunDir, read_sealed
from newllm_jax.records.results import SCHEMA_VERSION

TENSORS = "model.safetensors"
CARD = "README.md"


def write_description(
    folder: Path, run: RunDir, fingerprints: Mapping[str, str], exported: Mapping[str, Any]
) -> None:  # fmt: skip
    """Writes `newllm.json`, the last file but the card.

    Args:
      run: what was exported.
      fingerprints: of the sources that it was trained on.
      exported: what restoring it needs beside files: `epoch`, thresholds, as JSON content.
    """
    description = {
        **run.description,
        "schema_version": SCHEMA_VERSION,
        "config": {**run.description["config"], "mirror": ""},  # a folder of whoever trained it
        "fingerprints": dict(fingerprints),
        "export": {**exported, "files": {path.name: _sha256(path) for path in sorted(folder.iterdir())}},
    }
    RunDir(folder, {}).write_json(EXPORTED, description)


def open_trained(path: str | Path) -> RunDir:
    """The run of a run directory or of an exported folder.

    Raises:
      InputError: it is neither, or damaged.
    """
    path = checked_path("run_dir", path)
    file = path / EXPORTED
    if not file.is_file():
        return RunDir.open(path)
    description = read_sealed(file)
    if not isinstance(description, dict) or not isinstance(description.get("export"), dict):
        raise InputError(f"{file}: not the description of an exported model")
    return RunDir(path, description)


def is_exported(run: RunDir) -> bool:
    """Whether a run is that of an exported folder, all files of which are what was exported.

    Raises:
      InputError: a file of such a folder that is absent, or was changed.
    """
    file = run.path / EXPORTED
    if "export" not in run.description or not file.is_file():
        return False
    hashes = run.description["export"].get("files")
    if not isinstance(hashes, dict) or not all(name == Path(name).name for name in hashes):
        raise InputError(f"{file}: damaged (files are names with a hash each)")
    for name, sha256 in hashes.items():
        if _sha256(run.path / name) != sha256:
            raise InputError(f"{run.path / name}: damaged, or changed after it was exported; export the run again")
    return True


def exported_value(run: RunDir, name: str, declared: Any, **bounds: float) -> Any:
    """What `write_description` was told under a name, of the declared type. Raises InputError as `checked` does."""
    try:
        return checked(name, run.description["export"].get(name), declared, **bounds)
    except InputError as error:
        raise InputError(f"{run.path / EXPORTED}: damaged ({error})") from error


def _sha256(file: Path) -> str:
    file_size(file)  # a pipe has no end
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
