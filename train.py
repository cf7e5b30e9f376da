"""Trains New-LLM: `python train.py --config advanced` (`--help` tells the rest)."""

import sys

from newllm_jax.cli.process import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
