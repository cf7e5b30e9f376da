"""`python -m newllm_jax COMMAND`, the same as `newllm COMMAND`."""

from __future__ import annotations

import sys

from newllm_jax.cli import signals


def run(argv: list[str] | None = None) -> None:
    """The process of a command, up to its end. It listens for signals before anything else is imported."""
    signals.listen()
    from newllm_jax.cli.process import main

    sys.exit(main(argv))


if __name__ == "__main__":
    run()
