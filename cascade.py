"""Trains CASCADE: `python cascade.py --hard_ratio 0.6` (`--help` tells the rest)."""

import sys

from newllm_jax.cli.process import main

if __name__ == "__main__":
    sys.exit(main(["cascade", *sys.argv[1:]]))
