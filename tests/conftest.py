"""Fixtures for all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pictures and captions that lie beside the checkout and are not part of the project."""
    path = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"no test data in {path}")
    return path


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    """The port of an S3 server with an empty bucket."""
    from tests.support.object_store import running_server

    with running_server() as port:
        yield port


@pytest.fixture
def s3_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of the server in the environment."""
    from tests.support.object_store import KEY, SECRET

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
