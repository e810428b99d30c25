"""One local Ray for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder


@pytest.fixture(scope="session", autouse=True)
def _on_ray(local_ray: None) -> None:
    """Start it before the first test."""


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(Folder(str(tmp_path / "run")))
