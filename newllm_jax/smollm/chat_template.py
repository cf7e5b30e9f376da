"""Chat templates: rendered in a process of their own, which costs a tenth of a second and whose bounds hold."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from newllm_jax.errors import InputError
from newllm_jax.smollm import template_process
from newllm_jax.smollm.template_process import CPU_SECONDS, MEMORY

SECONDS = 30.0  # on the clock, of a machine that does much else


def render(
    template: str, messages: Sequence[Mapping[str, str]], specials: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The text that a template makes of messages.

    Raises:
      InputError: the template is not valid, refuses these messages, leaves the sandbox, or needs more time or memory
        than a template does.
    """
    request = {
        "path": [_home("jinja2"), _home("markupsafe")],
        "template": template,
        "messages": [dict(message) for message in messages],
        "specials": dict(specials),
        "add_generation_prompt": add_generation_prompt,
    }
    # Isolated: neither the current folder nor the environment has a say in what is imported.
    command = [sys.executable, "-I", "-B", template_process.__file__]
    try:
        done = subprocess.run(
            command, input=json.dumps(request), capture_output=True, encoding="utf-8", timeout=SECONDS, check=False
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise InputError(f"chat: the model's chat template cannot be rendered ({error})") from error
    if done.returncode:
        bounds = f"it needs more than {CPU_SECONDS} s or {MEMORY >> 20} MiB"
        raise InputError(f"chat: the model's chat template cannot be rendered ({bounds})")
    reply = json.loads(done.stdout)
    if "error" in reply:
        reason = " ".join(reply["error"].split())
        raise InputError(f"chat: the model's chat template cannot be rendered ({reason})")
    return reply["text"]


def _home(package: str) -> str:
    """The folder that a package is imported from: an isolated process may know others only."""
    spec = importlib.util.find_spec(package)
    return str(Path(spec.origin).parent.parent) if spec and spec.origin else ""
