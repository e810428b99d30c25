"""Addresses of clusters, and whether a Ray answers there: asked in seconds, where Ray tries longer.

A variable of the environment is named as the origin of an address only if it was taken from it.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from http import HTTPStatus

import grpc
import requests

from pds_ray.config import ConfigError
from pds_ray.errors import first_line, without_secrets

ANSWER_S = 8.0
"""Seconds for a connection, and as many for its answer."""

# the preface of HTTP/2 with empty settings, to which Ray's ports (gRPC) answer with theirs
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4

_CLUSTER, _CLIENTS = "/ray.rpc.NodeInfoGcsService/CheckAlive", "/ray.rpc.RayletDriver/ClusterInfo"
"""Calls that a cluster answers at its port, and at that of ray://."""
_WORDS = ("auto", "local")
"""Addresses of Ray that are no host."""

WHERE = "a run joins a cluster at HEAD:6379, or at auto on one of its nodes"


@dataclass(frozen=True)
class Address:
    """The address of a cluster, and the flag or the variable that it comes from."""

    value: str
    origin: str

    @property
    def shown(self) -> str:
        """The address without a password."""
        return without_secrets(self.value)

    def __str__(self) -> str:
        return f"{self.origin} {self.shown}"

    @property
    def way_out(self) -> str:
        """The way to do without it."""
        return f"drop {self.origin}" if self.origin.startswith("-") else f"unset {self.origin}"

    def check_runs_ray(self) -> None:
        """Raise ConfigError in one line unless a port that speaks as Ray's do answers.

        `auto` and addresses of other schemes are left to Ray.
        """
        target = self.value.removeprefix("ray://")
        host, _, port = target.rpartition(":")
        if self.value in _WORDS or "://" in target or (target != self.value and not host):
            return  # ray://HOST means a port of Ray's choice
        if not (host and port.isdigit()):
            raise ConfigError(f"{self} is no HOST:PORT; {WHERE}")
        try:
            with socket.create_connection((host.strip("[]"), int(port)), ANSWER_S) as connection:
                found = _greet(connection)
            found = found or _ask(target, client=target != self.value)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"nothing answers at {self} ({reason}); start a cluster there or {self.way_out}"
            ) from None
        if found:
            raise ConfigError(f"{self} is no port of Ray: {found}; {WHERE}")

    def check_takes_jobs(self) -> None:
        """Raise ConfigError in one line unless the Jobs API of a Ray answers at a web address."""
        if not self.value.startswith(("http://", "https://")):
            self.check_runs_ray()
            return
        why = _no_jobs_api(f"{self.value.rstrip('/')}/api/version")
        if why:
            raise ConfigError(
                f"no Ray cluster takes jobs at {self} ({why}); jobs are submitted to the dashboard "
                "of a cluster, http://HEAD:8265"
            )


def _no_jobs_api(url: str) -> str:
    """Return why no Jobs API tells its version at `url`, "" if one does, or wants a token."""
    try:
        answer = requests.get(url, timeout=ANSWER_S)
    except requests.Timeout:
        return f"no answer in {ANSWER_S:.0f} s"
    except requests.RequestException as error:
        refused = isinstance(error, requests.ConnectionError)
        return "nothing answers" if refused else first_line(error)
    is_other = answer.status_code == HTTPStatus.NOT_FOUND or (
        answer.ok and "ray_version" not in answer.text
    )
    return "what answers is no Ray" if is_other else ""


def _greet(connection: socket.socket) -> str:
    """Return what answers a greeting in HTTP/2 otherwise than gRPC does, "" if nothing does."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return ""  # it would not answer without a certificate
    connection.settimeout(ANSWER_S)
    try:
        connection.sendall(_GREETING)
        answer = connection.recv(9)
    except TimeoutError:
        return f"it took the connection and said nothing for {ANSWER_S:.0f} s"
    except OSError as error:
        return f"it broke the connection ({first_line(error)})"
    if answer.startswith((b"HTTP/", b"<")):  # or an error page alone
        return "a web server answers, as Ray's dashboard is one"
    return "" if answer[3:4] == bytes([_SETTINGS]) else "another service answers"


def _ask(target: str, client: bool) -> str:
    """Return what answers calls of gRPC otherwise than a Ray does, "" if one may be there."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return ""
    wanted, other = (_CLIENTS, _CLUSTER) if client else (_CLUSTER, _CLIENTS)
    with grpc.insecure_channel(target, [("grpc.enable_http_proxy", 0)]) as channel:
        if _knows(channel, wanted):
            return ""
        if not _knows(channel, other):
            return "another service of gRPC answers"
        prefix = "" if client else "ray://"
        return f"another port of the cluster answers, which is given as {prefix}{target}"


def _knows(channel: grpc.Channel, method: str) -> bool:
    """Return whether the server has the method, whatever it says to an empty call."""
    try:
        channel.unary_unary(method)(b"", timeout=ANSWER_S)
    except grpc.RpcError as error:
        return error.code() is not grpc.StatusCode.UNIMPLEMENTED
    return True


def of_cluster(flag: str | None) -> Address | None:
    """Return the address of the cluster that a run joins; None starts a local Ray."""
    return _first(("--address", flag), ("RAY_ADDRESS", os.environ.get("RAY_ADDRESS")))


def of_jobs(flag: str | None) -> Address | None:
    """Return where jobs are submitted; Ray lets both variables override the flag."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    return _first(*((name, os.environ.get(name)) for name in names), ("--address", flag))


def _first(*found: tuple[str, str | None]) -> Address | None:
    return next((Address(value, origin) for origin, value in found if value), None)
