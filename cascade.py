"""Trains CASCADE: `python cascade.py --hard_ratio 0.6` (`--help` tells the rest)."""

import sys

from newllm_jax.__main__ import run

if __name__ == "__main__":
    run(["cascade", *sys.argv[1:]])
