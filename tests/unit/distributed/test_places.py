"""Folders that a session needs: those that are set, others where they cannot be used, or advice."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from pds_ray.distributed import places
from pds_ray.distributed.places import RayFolders
from pds_ray.errors import ConfigError


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_ray_has_its_files_where_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert places.ray_folders() == RayFolders("/tmp", None, "")
    monkeypatch.setenv("TMPDIR", "/var/tmp")
    assert places.ray_folders() == RayFolders("/var/tmp", None, "")
    monkeypatch.setenv("RAY_TMPDIR", "/dev/shm")
    assert places.ray_folders() == RayFolders("/dev/shm", None, "")


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    ("folder", "why"),
    [("/tmp/" + "x" * 60, "is too long for sockets"), ("/tmp/none-ü", "is not ASCII")],
)
def test_sockets_go_elsewhere_and_objects_stay(
    monkeypatch: pytest.MonkeyPatch, name: str, folder: str, why: str
) -> None:
    monkeypatch.setenv(name, folder)
    found = places.ray_folders()
    assert (found.sockets, found.spilled) == ("/tmp", folder)
    assert found.note.startswith(f"{name} {folder} {why}")
    assert not Path(folder).exists(), "looking makes nothing"


def test_a_folder_may_be_as_long_as_its_sockets_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the kernel takes: a socket of a byte more cannot be bound."""
    most = places._most_bytes()
    longest = most + len("/" + places.RAY_SOCKET.format(pid=os.getpid()))
    with pytest.raises(OSError, match="too long"), socket.socket(socket.AF_UNIX) as one:
        one.bind("/tmp/" + "s" * (longest + 1 - 5))
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(path := "/tmp/" + "s" * (longest - 5))
    os.unlink(path)
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * (most - 5))
    assert places.ray_folders().note == ""
    monkeypatch.setenv("TMPDIR", "/tmp/" + "x" * (most - 4))
    assert "too long" in places.ray_folders().note


def test_a_closed_folder_is_replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "file" / "in"))
    found = places.ray_folders()
    assert (found.sockets, found.spilled) == ("/tmp", None)
    assert "cannot be written to (Not a directory)" in found.note


def test_without_any_folder_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "TEMPORARY", "/proc/none")
    with pytest.raises(ConfigError, match=r"^Ray has no place .* set RAY_TMPDIR to a folder that"):
        places.ray_folders()
    monkeypatch.setenv("TMPDIR", "/proc/other")
    with pytest.raises(ConfigError, match=r"TMPDIR /proc/other cannot be written to \("):
        places.ray_folders()
    monkeypatch.setenv("RAY_TMPDIR", "/dev/shm")
    assert places.ray_folders().sockets == "/dev/shm"


def test_a_token_is_made_where_ray_cannot_keep_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.ray_token() is None, "Ray makes a file of its own"
    monkeypatch.setenv("HOME", "/proc/none")
    tokens = {places.ray_token(), places.ray_token()}
    assert len(tokens) == 2
    assert all(len(token or "") == 64 for token in tokens)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "given")
    assert places.ray_token() is None
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # a user without a home
    assert places.ray_token() is not None


def test_a_machine_without_a_network_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    places.require_loopback()

    def unreachable(*_: object) -> None:
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    with pytest.raises(ConfigError, match=r"does not reach itself .*unreachable\), .* set lo up$"):
        places.require_loopback()
