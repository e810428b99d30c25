"""Watching work: lost blocks and items in flight."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import numpy as np
import pytest
import ray

from pds_ray.distributed import ray_private, watch

pytestmark = pytest.mark.ray


def test_lost_blocks_are_counted_by_cause(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def lost(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        match rows["id"][0]:
            case 1:
                os.kill(os.getpid(), signal.SIGKILL)
            case 2 | 3:
                raise ValueError("ours")
        return rows

    with watch.lost_blocks_allowed():
        blocks = ray.data.range(5, override_num_blocks=5).map_batches(lost, max_retries=0)
    log = watch.LostBlocks._LOG
    before = log.level, log.propagate, list(log.handlers)
    with watch.LostBlocks() as lost_blocks:
        left = [
            number
            for batch in blocks.iter_batches(batch_size=None)
            for number in batch["id"].tolist()
        ]
    assert sorted(left) == [0, 4]
    assert lost_blocks.kinds == {"WorkerCrashedError": 1, "UserCodeException": 2}
    assert "Ignoring" not in capfd.readouterr().err
    lost_blocks.check_space()
    assert (log.level, log.propagate, log.handlers) == before
    assert ray.data.DataContext.get_current().max_errored_blocks == 0


def test_items_in_flight_are_named_until_they_end() -> None:
    here = ray.get_runtime_context().get_node_id()[:8]
    with watch.InFlight() as in_flight, watch.InFlight() as another:
        another.begin("of another")
        for name in ("b", "a/é"):  # told by other processes
            ray.get(ray.remote(lambda told=name: in_flight.begin(told)).remote())
        assert re.fullmatch(
            rf"b \(for \d+ s, on node {here}\), a/é \(.*\)", in_flight.describe(set())
        )
        in_flight.begin("b")  # once more, as after a death
        assert in_flight.describe(set()).startswith("a/é ")
        assert in_flight.describe({"a/é"}).startswith("b ")
        assert in_flight.describe({"a/é", "b"}) == "none"
    assert in_flight.describe(set()) == "none"


def test_a_report_that_is_lost_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: object) -> None:
                raise ray.exceptions.RpcError("unavailable")

            return fail

    for client, problem in ((Gone(), "RpcError"), (None, "RaySystemError")):
        monkeypatch.setattr(
            ray_private.internal_kv, "internal_kv_get_gcs_client", lambda client=client: client
        )
        with watch.InFlight() as in_flight:
            in_flight.begin("a")
            assert in_flight.describe(set()) == f"unknown ({problem})"
