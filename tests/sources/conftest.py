"""Fixtures of the tests of sources."""

from __future__ import annotations

import pytest

from tests.sources.text_files import fill


@pytest.fixture
def several(tmp_path):
    """A folder of the Hub's layout with two configurations."""
    header = "\n".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train*\n"
        f"  - split: test\n    path: {name}/test*"
        for name in ("poems", "prose")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{header}\n---\n# Texts\n")
    for name in ("poems", "prose"):
        fill(tmp_path / name / "train.parquet", f"{name} to learn")
        fill(tmp_path / name / "test.parquet", f"{name} to test")
    return tmp_path
