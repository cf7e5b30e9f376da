"""The Hub: the cache is looked at first, one short probe, and what happens where it cannot be reached."""

from __future__ import annotations

import errno
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from fnmatch import fnmatch

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from newllm_jax.errors import InputError
from newllm_jax.sources import hub, text
from newllm_jax.sources.hub import HubOutOfReach, hub_answers, hub_folder, hub_is_offline
from newllm_jax.sources.text import open_source


@pytest.fixture
def online(monkeypatch):
    """A Hub that answers, as far as the probe can tell."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "hub_answers", lambda: True)


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """Stands in for `snapshot_download`: a folder of what is cached, and one of what the Hub has."""
    asked = []

    def snapshot_download(repository, *, repo_type, allow_patterns=None, revision=None, local_files_only=False):
        asked.append((repository, repo_type, allow_patterns, local_files_only))
        cached, there = (tmp_path / place / repository for place in ("cached", "hub"))
        if not local_files_only:
            for file in (path for path in there.rglob("*") if path.is_file()):
                name = file.relative_to(there).as_posix()
                if allow_patterns is None or any(fnmatch(name, pattern) for pattern in allow_patterns):
                    (cached / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, cached / name)
        elif not cached.is_dir():
            raise LocalEntryNotFoundError("not cached")
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    snapshot_download.root, snapshot_download.asked = tmp_path, asked
    return snapshot_download


def fill(folder, **texts):
    folder.mkdir(parents=True)
    for name, line in texts.items():
        (folder / f"{name}.txt").write_text(f"{line}\n")
    return folder


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("true", True), ("YES", True), ("0", False), ("", False)])
def test_offline_by_environment(monkeypatch, value, offline):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert hub_is_offline() is offline
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not hub_is_offline()


def test_the_probe_knocks_where_the_hub_is_said_to_be(monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub_answers()
        monkeypatch.setenv("HTTPS_PROXY", f"127.0.0.1:{port}")
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
        assert hub_answers()
    assert not hub_answers()  # nobody listens there any more


def test_the_probe_ends_in_time_whatever_hangs(monkeypatch):
    def looks_up_a_name(*_, **__):
        time.sleep(3)
        raise OSError

    monkeypatch.setattr(socket, "create_connection", looks_up_a_name)
    started = time.monotonic()
    assert not hub_answers(timeout=0.2)
    assert time.monotonic() - started < 2
    assert hub.PROBE_SECONDS <= 10


def test_the_cache_is_looked_at_first(repositories, monkeypatch):
    cached = fill(repositories.root / "cached" / "someone" / "texts", train="words")
    with monkeypatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE")
        patch.setattr(hub, "hub_answers", lambda: pytest.fail("probed although cached"))
        assert hub_folder("someone/texts", "dataset", ["*.txt"]) == cached
    assert hub_folder("someone/texts", "dataset") == cached
    with pytest.raises(HubOutOfReach, match=r"dataset 'someone/texts' is not in the local cache and HF_HUB_OFFLINE"):
        hub_folder("someone/texts", "dataset", ["*.parquet"])  # only a part of it is cached


def test_a_silent_hub_is_out_of_reach(repositories, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(hub, "hub_answers", lambda: False)
    with pytest.raises(HubOutOfReach, match="model 'someone/model' is not in the local cache and the Hub does not"):
        hub_folder("someone/model", "model")
    assert [local_only for *_, local_only in repositories.asked] == [True]


@pytest.mark.quick
def test_a_download(repositories, online):
    fill(repositories.root / "hub" / "someone" / "texts", train="words of the Hub", test="t", validation="v")
    source = open_source("someone/texts", "", "error")
    assert (source.name, source.fallback) == ("someone/texts", "")
    assert source.splits(["train"])["train"] == ["words of the Hub"]


def test_only_the_configuration_is_fetched_where_it_has_a_folder(repositories, online):
    folder = fill(repositories.root / "hub" / "someone" / "texts" / "small", train="a few words").parent
    header = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train.txt\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n{header.format('small')}{header.format('large')}---\n")
    assert open_source("someone/texts", "", "error", "small").configuration == "small"
    assert all(patterns == ["README.md", "small/*"] for _, _, patterns, _ in repositories.asked)


def test_a_configuration_elsewhere_in_the_repository_is_found(repositories, online):
    folder = fill(repositories.root / "hub" / "someone" / "texts" / "data", train="a few words").parent
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: small\n  data_files:\n  - split: train\n    path: data/train.txt\n---\n"
    )
    assert open_source("someone/texts", "small", "error").splits(["train"])["train"] == ["a few words"]


def test_a_download_that_breaks_off(repositories, online, monkeypatch):
    def breaks_off(*_, **__):
        raise LocalEntryNotFoundError("connection lost")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(HubOutOfReach, match="the Hub does not answer"), monkeypatch.context() as patch:
        patch.setattr(hub, "hub_answers", lambda: False)
        hub_folder("someone/texts", "dataset")
    with pytest.raises(HubOutOfReach, match="the Hub stopped answering during the download"):
        hub_folder("someone/texts", "dataset")


def test_a_full_disk_is_not_the_hubs_silence(repositories, online, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fill(repositories.root / "hub" / "someone" / "texts", train="words")
    monkeypatch.setattr(shutil, "copy", full)
    with pytest.raises(OSError, match="No space left on device"):
        open_source("someone/texts", "", "builtin")


class Refusal(http.server.BaseHTTPRequestHandler):
    """A Hub, or a proxy on the way to it, that says no to everything."""

    def do_GET(self):
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()

    def do_CONNECT(self):
        self.send_response(403)
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("HF_ENDPOINT", "InputError: dataset 'someone/texts': the Hub refused it (404 "),
        ("HTTPS_PROXY", "HubOutOfReach: dataset 'someone/texts' is not in the local cache and the Hub "),
    ],
)
def test_what_a_hub_and_a_proxy_refuse(tmp_path, variable, message):
    # The real client, in a process of its own: it reads the environment when it is imported.
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        unset = {"HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"}
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {variable: f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        code = "from newllm_jax.sources.hub import hub_folder; hub_folder('someone/texts', 'dataset')"
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
        server.shutdown()
    assert message in ran.stderr.splitlines()[-1]


def test_what_the_hub_refuses_is_no_reason_to_fall_back(monkeypatch):
    def refuses(*_):
        raise InputError("dataset 'someone/texts': the Hub refused it (404 Client Error.)")

    monkeypatch.setattr(text, "hub_folder", refuses)
    with pytest.raises(InputError, match="the Hub refused it"):
        open_source("someone/texts", "", "builtin")


def test_a_name_that_the_hub_cannot_have():
    with pytest.raises(InputError, match=r"'some one/texts': neither a path that exists nor a Hub name \(owner/name\)"):
        open_source("some one/texts", "", "builtin")


def test_falling_back_says_why_and_where_the_text_is_from():
    source = open_source("someone/texts", "", "builtin")
    assert source.path is None
    assert source.provenance()["asked"] == "someone/texts"
    assert source.provenance()["source"].startswith("builtin (")
    assert "'someone/texts' is not in the local cache and HF_HUB_OFFLINE is set" in source.provenance()["fallback"]


def test_no_falling_back_where_that_is_an_error():
    with pytest.raises(InputError, match=r"^dataset: dataset 'someone/texts' is not in the local cache .* or builtin$"):
        open_source("someone/texts", "", "error")


def test_a_slip_in_a_folders_name_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "data" / "wikitext").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="name a local folder or file that exists"):
        open_source("data/wikitxt", "", "builtin")
    with pytest.raises(InputError, match=r"'elsewhere/corpus\.txt' does not exist"):
        open_source("elsewhere/corpus.txt", "", "builtin")
