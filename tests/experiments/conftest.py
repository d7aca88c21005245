"""The paper's table on invented texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mgam.evaluation.texts import TextLibrary

from .world import write

HOME = Path(__file__).resolve().parents[2] / "experiments" / "paper_table"
if HOME.is_dir():
    sys.path.insert(0, str(HOME))
else:  # a source archive has no experiments
    collect_ignore = ["test_paper_tasks.py", "test_paper_runs.py"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> TextLibrary:
    """Texts of all sources, the published ones from the few records of their own tests."""
    from mgam.evaluation.fetch import fetch_sources

    root = tmp_path_factory.mktemp("texts")
    write(root)
    for name in ("hotpotqa", "narrativeqa", "cnn_dailymail"):
        files = Path(__file__).parents[1] / "evaluation" / "fixtures" / name
        fetch_sources([name], say=lambda message: None, root=root, files=files)
    return TextLibrary(root)


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where libraries are kept."""
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="session")
def library(texts: TextLibrary, root: Path) -> Any:
    """The library of the invented texts."""
    from papertable.library import open_library

    return open_library("packages", texts, root)
