"""Writes the tables of README.md and of the pages in docs: `python -m benchmarks.tables`."""

from __future__ import annotations

import argparse
import sys

from benchmarks.tables.pages import update_pages


def main() -> int:
    """Updates the pages. With `--check` nothing is written, and the exit code is 1 where a page is not up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a page is not up to date"
    )
    check = parser.parse_args().check
    return int(update_pages(check) and check)


if __name__ == "__main__":
    sys.exit(main())
