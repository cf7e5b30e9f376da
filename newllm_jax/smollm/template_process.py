"""Renders one chat template, in a process of its own that has bounds: the program of `chat_template.render`.

The template comes with the weights. It sees the messages, and no attribute or method of Python that could change or
reach anything; what it may still do, loop and allocate without end, the system ends.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence

CPU_SECONDS = 2
MEMORY = 512 * 2**20  # bytes of address space
LARGEST_TEXT = 2**20  # characters


def set_bounds() -> None:
    """Bounds of this process: time, memory, no file of more than 0 bytes. Windows has none."""
    try:
        import resource
    except ImportError:
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform != "darwin":  # which refuses it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def render(
    template: str, messages: Sequence[Mapping[str, str]], specials: Mapping[str, str], add_generation_prompt: bool
) -> str:
    """The text that a template makes of messages. Raises whatever Jinja raises; ValueError for a text without end."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    # Block trimming and the two names below are what templates of the Hub are written for.
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    sandbox.globals["raise_exception"] = refuse
    sandbox.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    text = sandbox.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, **specials
    )
    if len(text) > LARGEST_TEXT:
        raise ValueError(f"a text of {len(text)} characters; {LARGEST_TEXT} are read")
    return text


def main() -> None:
    """Reads a request from stdin and writes the text, or what was wrong, to stdout: JSON both."""
    request = json.load(sys.stdin)
    sys.path += request.pop("path")
    set_bounds()
    try:
        reply = {"text": render(**request)}
    except Exception as error:
        reply = {"error": str(error)[:500] or type(error).__name__}
    json.dump(reply, sys.stdout)


if __name__ == "__main__":
    main()
