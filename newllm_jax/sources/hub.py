"""Repositories of the Hugging Face Hub as local folders: the cache first, then one short probe, then a download."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from newllm_jax.bars import no_bar
from newllm_jax.errors import InputError, disk_fault, shown

PROBE_SECONDS = 5.0
ADDRESSES = "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy"


class HubOutOfReach(InputError):
    """The Hub cannot be reached and the repository is not in the local cache."""


def hub_is_offline() -> bool:
    """Whether the user asked for no network (`HF_HUB_OFFLINE`)."""
    return os.environ.get("HF_HUB_OFFLINE", "").strip().upper() in {"1", "ON", "YES", "TRUE"}


def hub_answers(timeout: float = PROBE_SECONDS) -> bool:
    """Whether a connection to the Hub (or its proxy, or `HF_ENDPOINT`) opens within `timeout` seconds."""
    address = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    address = address or os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    parts = urlsplit(address if "://" in address else f"http://{address}")
    answered = threading.Event()

    def probe() -> None:
        try:
            with socket.create_connection((parts.hostname or "", parts.port or 443), timeout=timeout):
                answered.set()
        except OSError:
            pass

    # In a thread: looking up a name, and one address after another, would each take a time of its own.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(timeout)
    return answered.is_set()


def hub_folder(
    repository: str, kind: str, patterns: Sequence[str] | None = None, revision: str | None = None
) -> Path:  # fmt: skip
    """The snapshot of a Hub repository as a local folder.

    Args:
      repository: `owner/name`.
      kind: `"dataset"` or `"model"`.
      patterns: which files are needed, as globs; all of them where None.
      revision: a branch, tag or commit; the main branch where None.

    Raises:
      HubOutOfReach: not cached, and the Hub is offline or does not answer.
      InputError: the Hub answers, and has no such repository (or none that this user may read); or a variable of the
        environment holds no address.
    """
    for variable in ADDRESSES:
        try:
            _ = urlsplit(os.environ.get(variable, "")).port
        except ValueError as error:
            raise InputError(f"{variable}: {shown(os.environ[variable])} is no address ({error})") from error
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = list(patterns) if patterns is not None else None
    asked: dict[str, Any] = {"repo_type": kind, "allow_patterns": wanted, "revision": revision}
    cached = None
    try:
        cached = Path(snapshot_download(repository, **asked, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    except HFValidationError as error:
        raise InputError(f"{kind} {repository!r}: neither a path that exists nor a Hub name (owner/name)") from error
    if cached and wanted and all(any(cached.glob(pattern)) for pattern in wanted):
        return cached
    silent = "HF_HUB_OFFLINE is set" if hub_is_offline() else "" if hub_answers() else "the Hub does not answer"
    if silent and cached and wanted is None:
        return cached  # whether it is all there is, only the Hub could say
    if silent:
        raise HubOutOfReach(f"{kind} {repository!r} is not in the local cache and {silent}")
    try:
        with no_bar():
            return Path(snapshot_download(repository, **asked))
    except LocalEntryNotFoundError as error:
        raise HubOutOfReach(f"{kind} {repository!r}: the Hub stopped answering during the download") from error
    except HfHubHTTPError as error:
        raise InputError(f"{kind} {repository!r}: the Hub refused it ({str(error).splitlines()[0]})") from error
    except Exception as error:  # a proxy that refuses, a broken connection: each HTTP library has errors of its own
        if disk_fault(error) or (isinstance(error, OSError) and error.filename is not None):
            raise  # the cache folder's fault, not the network's
        reason = str(error) or type(error).__name__
        raise HubOutOfReach(
            f"{kind} {repository!r} is not in the local cache and the Hub is shut ({reason})"
        ) from error
