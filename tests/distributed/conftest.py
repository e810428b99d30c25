"""One local Ray for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pds_ray.config import RayConfig
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder


@pytest.fixture(scope="session", autouse=True)
def local_ray() -> Iterator[None]:
    from pds_ray.distributed import session

    session.start(RayConfig(num_cpus=2, object_store_gib=0.5))
    yield
    session.stop()


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(Folder(str(tmp_path / "run")))
