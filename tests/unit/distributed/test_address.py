"""Addresses at which no Ray answers are named in seconds, by where they came from."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from pds_ray.config import ConfigError, RayConfig
from pds_ray.distributed import address, session
from pds_ray.distributed import submit as jobs
from pds_ray.distributed.address import Address, of_cluster, of_jobs
from tests.support.web_server import Web, serving, silent

VARIABLES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@contextmanager
def redis() -> Iterator[int]:
    """A server that answers as Redis does to what it does not know; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                connection.sendall(b"-ERR unknown command 'PRI'\r\n")

        threading.Thread(target=answer, daemon=True).start()
        yield server.getsockname()[1]


@contextmanager
def web() -> Iterator[int]:
    with serving(Web()) as host:
        yield int(host.rpartition(":")[2])


@contextmanager
def nobody() -> Iterator[int]:
    with socket.socket() as free:  # bound, not listening
        free.bind(("127.0.0.1", 0))
        yield free.getsockname()[1]


@pytest.mark.parametrize("prefix", ["", "ray://"])
@pytest.mark.parametrize(
    ("server", "message"),
    [
        (web, "is no port of Ray: a web server answers, as Ray's dashboard is one; a run joins"),
        (redis, "is no port of Ray: another service answers; a run joins a cluster at HEAD:6379"),
        (silent, "is no port of Ray: it took the connection and said nothing for"),
        (nobody, r"\(Connection refused\); start a cluster there or unset RAY_ADDRESS"),
    ],
)
def test_a_port_that_is_no_ray_is_named(
    monkeypatch: pytest.MonkeyPatch, server: Any, message: str, prefix: str
) -> None:
    monkeypatch.setattr(address, "ANSWER_S", 0.1)
    with server() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"{prefix}127.0.0.1:{port}")
        with pytest.raises(ConfigError, match=message) as caught:
            session.start(RayConfig())
    assert f"RAY_ADDRESS {prefix}127.0.0.1:{port}" in str(caught.value)
    assert "--address" not in str(caught.value)
    assert "\n" not in str(caught.value)


@contextmanager
def grpc_server(service: str = "", **methods: Any) -> Iterator[int]:
    """A server of gRPC whose calls answer nothing; yields its port."""
    server = grpc.server(ThreadPoolExecutor(1))
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(lambda _request, _context: b"")
        for name in methods
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None)


CLUSTER, CLIENTS = (
    ("ray.rpc.NodeInfoGcsService", "CheckAlive"),
    ("ray.rpc.RayletDriver", "ClusterInfo"),
)


@pytest.mark.parametrize(("prefix", "calls"), [("", CLUSTER), ("ray://", CLIENTS)])
def test_a_server_that_knows_the_calls_of_ray_may_be_one(
    prefix: str, calls: tuple[str, str]
) -> None:
    service, method = calls
    with grpc_server(service, **{method: None}) as port:
        Address(f"{prefix}127.0.0.1:{port}", "--address").check_runs_ray()


@pytest.mark.parametrize(
    ("prefix", "other", "calls"), [("", "ray://", CLIENTS), ("ray://", "", CLUSTER)]
)
def test_the_other_port_of_a_cluster_is_named(
    prefix: str, other: str, calls: tuple[str, str]
) -> None:
    service, method = calls
    with grpc_server(service, **{method: None}) as port, pytest.raises(ConfigError) as caught:
        Address(f"{prefix}127.0.0.1:{port}", "--address").check_runs_ray()
    assert (
        f"another port of the cluster answers, which is given as {other}127.0.0.1:{port};"
        in str(caught.value)
    )


@pytest.mark.parametrize("prefix", ["", "ray://"])
def test_another_service_of_grpc_is_no_ray(prefix: str) -> None:
    with grpc_server("shop.Basket", Add=None) as port, pytest.raises(ConfigError) as caught:
        Address(f"{prefix}127.0.0.1:{port}", "--address").check_runs_ray()
    assert "is no port of Ray: another service of gRPC answers; a run joins" in str(caught.value)


@pytest.mark.parametrize("value", ["head", "127.0.0.1", ":6379", "head:port"])
def test_an_address_without_host_or_port_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=f"RAY_ADDRESS {value} is no HOST:PORT; a run joins"):
        Address(value, "RAY_ADDRESS").check_runs_ray()


@pytest.mark.parametrize("value", ["auto", "local", "ray://head", "anyscale://a/b:1"])
def test_other_addresses_are_left_to_ray(value: str) -> None:
    Address(value, "--address").check_runs_ray()


@pytest.mark.parametrize(("flag", "named"), [(True, "--address"), (False, "RAY_ADDRESS")])
def test_a_web_address_is_for_jobs(monkeypatch: pytest.MonkeyPatch, flag: bool, named: str) -> None:
    url = "http://head:8265"
    if not flag:
        monkeypatch.setenv("RAY_ADDRESS", url)
    with pytest.raises(ConfigError) as caught:
        session.start(RayConfig(address=url if flag else None))
    assert str(caught.value) == (
        f"{named} {url} is where jobs are submitted, by `pds-ray submit --address {url}`; a run "
        "joins a cluster at HEAD:6379, or at auto on one of its nodes"
    )


def test_an_impossible_port_is_one_line() -> None:
    with pytest.raises(ConfigError, match="nothing answers at --address head:99999"):
        Address("head:99999", "--address").check_runs_ray()


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (web, "what answers is no Ray"),
        (silent, "no answer in 0 s"),
        (nobody, "nothing answers"),
        (redis, "nothing answers"),
    ],
)
def test_jobs_are_not_submitted_to_what_is_no_ray(
    monkeypatch: pytest.MonkeyPatch, server: Any, message: str
) -> None:
    monkeypatch.setattr(address, "ANSWER_S", 0.2)
    with server() as port, pytest.raises(ConfigError) as caught:
        jobs._client(f"http://127.0.0.1:{port}/")
    assert str(caught.value) == (
        f"no Ray cluster takes jobs at --address http://127.0.0.1:{port}/ ({message}); jobs are "
        "submitted to the dashboard of a cluster, http://HEAD:8265"
    )


def test_a_variable_is_named_only_if_the_address_came_from_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert of_cluster(None) is None
    assert of_jobs("http://flag:1") == Address("http://flag:1", "--address")
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert of_cluster(None) == Address("head:6379", "RAY_ADDRESS")
    assert of_cluster("flag:1") == Address("flag:1", "--address")
    assert of_jobs("http://flag:1") == Address("head:6379", "RAY_ADDRESS")  # as Ray has it
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://head:8265")
    assert of_jobs("http://flag:1") == Address("http://head:8265", "RAY_API_SERVER_ADDRESS")


def test_the_variable_is_named_when_jobs_cannot_be_submitted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with web() as port:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", f"http://127.0.0.1:{port}")
        with pytest.raises(ConfigError, match="jobs at RAY_API_SERVER_ADDRESS http://"):
            jobs._client("http://elsewhere:8265")


def test_a_password_in_an_address_is_not_shown() -> None:
    with nobody() as port, pytest.raises(ConfigError) as caught:
        jobs._client(f"http://me:secret@127.0.0.1:{port}")
    assert f"--address http://127.0.0.1:{port} (" in str(caught.value)
