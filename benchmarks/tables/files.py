"""Where the results lie, and how a file of them is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "results"


def load(path: str) -> Any:
    """The content of a JSON file by its path under `docs/results`."""
    return json.loads((RESULTS / path).read_text(encoding="utf-8"))


def load_all(folder: str, pattern: str = "*.json") -> dict[str, Any]:
    """The JSON files of a folder under `docs/results` whose names match a pattern: content by name without ending."""
    return {path.stem: load(f"{folder}/{path.name}") for path in sorted((RESULTS / folder).glob(pattern))}
