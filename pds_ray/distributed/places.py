"""Folders of this machine that a session needs, and what stands in their way. No Ray here."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pds_ray.errors import ConfigError, first_line
from pds_ray.store.storage import LOCK, Folder, is_remote

SOCKET_BYTES = 103 if sys.platform == "darwin" else 107
"""Longest path of a Unix socket."""
RAY_SOCKET = "ray/session_2026-11-29_12-24-46_039886_{pid}/sockets/plasma_store"
"""The longest path of Ray's sockets below its temporary folder, for one date."""
TEMPORARY = "/tmp"
LOOPBACK_S = 10.0
"""Seconds after which a machine does not reach itself."""


@dataclass(frozen=True)
class RayFolders:
    """The folders of the files of a local Ray."""

    sockets: str
    """Sockets and logs, in `ray/`."""
    spilled: str | None
    """Objects that its store in memory has no room for; None: with the logs."""
    note: str
    """One line on what is not where it was wanted, "" if all is."""


def ray_folders() -> RayFolders:
    """Return the folders of a local Ray: those that are set, else /tmp.

    Raises ConfigError in one line if none can be used.
    """
    variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if os.environ.get(name)), "")
    wanted = os.environ.get(variable) or TEMPORARY
    closed, long = why_closed(wanted), _why_no_sockets(wanted)
    if not closed and not long:
        return RayFolders(wanted, None, "")
    problem = f"{variable or 'the folder'} {wanted} {closed or long}"
    if wanted == TEMPORARY or why_closed(TEMPORARY):
        raise ConfigError(
            f"Ray has no place for its sockets: {problem}; set RAY_TMPDIR to a folder that can be "
            f"written to, with a path of at most {_most_bytes()} bytes"
        )
    note = f"{problem}: Ray has its sockets in {TEMPORARY}/ray"
    return RayFolders(TEMPORARY, None if closed else wanted, note)


def ray_token() -> str | None:
    """Return a secret for a local Ray that cannot keep its own in the home folder, else None."""
    home = os.path.expanduser("~")  # "~" for a user without one
    kept = Path(home, ".ray", "auth_token")
    given = os.environ.keys() & {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}
    can_be_kept = os.path.isabs(home) and not why_closed(str(kept.parent))
    return None if given or can_be_kept or os.access(kept, os.R_OK) else secrets.token_hex(32)


def _most_bytes() -> int:
    """Return the length of the longest temporary folder that leaves room for Ray's sockets."""
    return SOCKET_BYTES - len("/" + RAY_SOCKET.format(pid=os.getpid()))


def _why_no_sockets(folder: str) -> str:
    """Return why Ray cannot have its sockets in a folder, "" if it can."""
    if len(os.fsencode(folder)) > _most_bytes():
        return f"is too long for sockets, which have at most {_most_bytes()} bytes here"
    return "" if folder.isascii() else "is not ASCII, and Ray takes no other sockets"


def why_closed(folder: str) -> str:
    """Return why a folder, there or still to be made, cannot be written to, "" if it can."""
    try:
        # what `os.access` says of root is not what holds
        with tempfile.TemporaryFile(dir=existing(folder)):
            return ""
    except OSError as error:
        return f"cannot be written to ({error.strerror})"


def existing(folder: str) -> Path:
    """Return the folder, or the innermost around it that is there."""
    place = Path(folder)
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    return place


def require_current_folder() -> None:
    """Raise ConfigError in one line if the current folder is gone."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError(
            "the current folder was deleted; change to one that exists, as by `cd`"
        ) from None


def require_loopback() -> None:
    """Raise ConfigError in one line if this machine does not reach itself, as Ray has to."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), LOOPBACK_S).close()
    except OSError as error:
        raise ConfigError(
            f"this machine does not reach itself at 127.0.0.1 ({first_line(error)}), where Ray's "
            "processes meet; switch its network interface lo on: ip link set lo up"
        ) from error


def require_shared(folder: Folder, option: str) -> None:
    """Raise ConfigError if the driver's folder, given by `option`, is not visible here.

    Its lock shows it.
    """
    if not is_remote(folder.path) and not folder.exists(LOCK):
        raise ConfigError(
            f"{folder.shown} is not to be seen on all nodes; give an {option} on a disk that they "
            "share, or on a store"
        )
