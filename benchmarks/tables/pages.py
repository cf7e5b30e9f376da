"""The pages that hold tables: README.md, README.ja.md, and those of docs.

A block between `<!-- table: NAME -->` and `<!-- end -->` is replaced by the table of that name.
"""

from __future__ import annotations

import re

from benchmarks.tables.benchmark import file_tables
from benchmarks.tables.designs import DESIGN_TABLES
from benchmarks.tables.devices import DEVICE_TABLES
from benchmarks.tables.experiments import EXPERIMENT_TABLES
from benchmarks.tables.files import ROOT, load_all
from benchmarks.tables.frontier import FRONTIER_TABLES
from benchmarks.tables.japanese import japanese_tables
from benchmarks.tables.leaderboard import LEADERBOARD_TABLES
from benchmarks.tables.peers import peer_tables
from benchmarks.tables.reliability import RELIABILITY_TABLES
from benchmarks.tables.results import RESULTS_TABLES
from benchmarks.tables.settings import SETTINGS_TABLES
from benchmarks.tables.speed import SPEED_TABLES
from benchmarks.tables.t4 import T4_TABLES

PAGES = (ROOT / "README.md", ROOT / "README.ja.md", *sorted((ROOT / "docs").rglob("*.md")))
TABLES = (
    RESULTS_TABLES | SPEED_TABLES | RELIABILITY_TABLES | EXPERIMENT_TABLES | DESIGN_TABLES | FRONTIER_TABLES
    | DEVICE_TABLES | T4_TABLES | LEADERBOARD_TABLES | SETTINGS_TABLES | peer_tables(load_all("peers"))
    | file_tables((load_all("benchmarks") | load_all("ablation")).items())
)  # fmt: skip
TABLES |= japanese_tables(TABLES)
BLOCK = re.compile(r"(<!-- table: (?P<name>.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def render(text: str) -> str:
    """A page with every table made anew."""
    return BLOCK.sub(lambda block: f"{block[1]}{TABLES[block['name']]()}\n{block[3]}", text)


def update_pages(check: bool) -> bool:
    """Writes the pages whose tables are not those of the JSON files, or with `check` only names them.

    Returns:
      Whether there were any.
    """
    before = {page: page.read_text(encoding="utf-8") for page in PAGES}
    after = {page: render(text) for page, text in before.items()}  # all, before any is written
    stale = [page for page in PAGES if after[page] != before[page]]
    for page in stale:
        print(f"{page.relative_to(ROOT)} {'is not up to date' if check else 'written'}")
        if not check:
            page.write_text(after[page], encoding="utf-8")
    return bool(stale)
