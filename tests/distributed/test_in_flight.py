"""Work in flight: what workers report, and what the driver sees of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray

from pds_ray.distributed import in_flight as module
from pds_ray.distributed import ray_private
from pds_ray.distributed.in_flight import InFlight

pytestmark = pytest.mark.ray


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_driver_sees_what_workers_do_until_it_ends() -> None:
    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, in_flight: InFlight) -> None:
            self.in_flight = in_flight

        def begin(self, what: str, item: str = "", done: float = 0.0) -> None:
            self.block = self.in_flight.doing(what, item)
            self.doing = self.block.__enter__()
            self.doing.reach(done)

        def end(self) -> None:
            self.block.__exit__(None, None, None)

    arrived = set[str]()
    here = ray.get_runtime_context().get_node_id()[:8]
    with InFlight() as in_flight, InFlight() as another:
        seen, workers = in_flight.reports(arrived.__contains__), [Worker.remote(in_flight)]
        workers.append(Worker.remote(in_flight))
        with another.doing("works for another", "s/0") as doing:
            doing.reach(99)
            ray.get(workers[0].begin.remote("the encoder to load"))
            ray.get(workers[1].begin.remote("shard s to be encoded", "s/0", 16.5))
            wait_until(lambda: seen.read() or seen.describe().count("for") == 2)
        expected = rf"(the encoder to load|shard s to be encoded) \(for \d+ s, on node {here}\), .*"
        assert re.fullmatch(expected, seen.describe())
        assert seen.ahead() == 16
        ray.get([worker.end.remote() for worker in workers])
        wait_until(lambda: seen.read() or seen.describe() == "")
        assert seen.ahead() == 16, "the bar went back before the result came"
        arrived.add("s/0")
        assert seen.ahead() == 0
        left = in_flight._prefix.encode()
    assert ray_private.list_keys(left) == []


def test_a_process_that_is_silent_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with InFlight() as in_flight:
        seen = in_flight.reports()
        key = f"{in_flight._prefix}dead".encode()
        ray_private.put_key(key, b'["abc", [["the encoder to load", "", 0, 7.0]]]')
        seen.read()
        assert seen.describe() == "the encoder to load (for 7 s, on node abc)"
        monkeypatch.setattr(module, "SILENT_S", 0.0)
        seen.read()
        assert seen.describe() == ""


def test_reports_that_are_lost_stop_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: object) -> None:
                raise ray.exceptions.RpcError("unavailable")

            return fail

    for client, problem in ((Gone(), "RpcError"), (None, "RaySystemError")):
        with monkeypatch.context() as patch:
            patch.setattr(
                ray_private.internal_kv, "internal_kv_get_gcs_client", lambda client=client: client
            )
            patch.setattr(module, "REPORT_S", 0.01)
            with InFlight() as in_flight, in_flight.doing("works", "a") as doing:
                doing.reach(3)
                time.sleep(0.1)
                seen = in_flight.reports()
                seen.read()
                assert seen.describe() == f"reports of the workers ({problem})"
