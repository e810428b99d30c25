"""Fixtures for all tests. No test but those of the network itself may depend on a network."""

from __future__ import annotations

import os

# read by the hub's clients when they are imported, hence set before any test module is
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
)

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray of two CPUs for all tests of the session."""
    from pds_ray.config import RayConfig
    from pds_ray.distributed import lifetime, session

    session.start(RayConfig(num_cpus=2, object_store_gib=0.5))
    with lifetime.undo().pop_all():  # no other `session.stop` ends it
        yield
        session.stop()  # those that tests began on it


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real images and captions beside the checkout, if there is one."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no test data in {path}")
    return path


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """Yield the port of an S3 server with an empty bucket."""
    from tests.support.object_store import running_server

    with running_server() as port:
        yield port


@pytest.fixture
def s3_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the credentials of the server into the environment."""
    from tests.support.object_store import KEY, SECRET

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
