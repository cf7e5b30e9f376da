"""Trains New-LLM: `python train.py --config advanced` (`--help` tells the rest)."""

import sys

from newllm_jax.__main__ import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
