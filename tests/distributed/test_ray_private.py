"""Ray's private hooks: each does what the package counts on, so that a new release fails here."""

from __future__ import annotations

import logging
import os
import time
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest
import ray

from pds_ray.distributed import ray_private

pytestmark = pytest.mark.ray


def test_the_session_folder_holds_the_files_of_this_ray() -> None:
    folder = Path(ray_private.session_folder())
    assert {"logs", "sockets"} <= {path.name for path in folder.iterdir()}
    log = folder / "logs" / f"worker-{ray.get(ray.remote(ray_worker).remote())}"
    assert list(log.parent.glob(f"{log.name}*")), "a worker of this Ray logs elsewhere"


def ray_worker() -> str:
    return ray.get_runtime_context().get_worker_id()


def test_workers_import_from_where_the_driver_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray adds the folder of the script and, whatever the driver does, the current one."""
    added = ray_private.job_config()._py_driver_sys_path
    monkeypatch.setattr("sys.path", ["/of/script", ""])
    added.extend(["/of/script", str(tmp_path), os.getcwd()])
    assert added == ["/of/script", os.getcwd()]


def test_free_resources_are_reported_node_by_node() -> None:
    """While an actor holds a CPU, it is not free on its node."""

    @ray.remote(num_cpus=1)
    class Holder:
        def free(self) -> dict[str, dict[str, float]]:
            return ray_private.free_resources()

    (node,) = [node for node in ray.nodes() if node["Alive"]]
    holder = Holder.remote()
    free = ray.get(holder.free.remote())
    assert free.keys() == {node["NodeID"]}
    assert free[node["NodeID"]].get("CPU", 0) <= node["Resources"]["CPU"] - 1
    ray.kill(holder)


class Rows:
    """An actor that tells what a block looks like to it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, block: pa.Table) -> pa.Table:
        assert isinstance(block, pa.Table)
        return pa.table({"rows": [block.num_rows], "by": [f"{self.name} {os.getpid()}"]})


def test_blocks_reach_actors_whole() -> None:
    blocks = ray.data.range(1000, override_num_blocks=4)
    mapped = ray_private.map_whole_blocks(
        blocks, Rows, ("actor",), compute=ray.data.ActorPoolStrategy(size=1), num_cpus=0.5
    )
    found = mapped.take_all()
    assert [row["rows"] for row in found] == [250] * 4
    assert len({row["by"] for row in found}) == 1


def test_blocks_may_be_whole_where_actors_have_gpus() -> None:
    """`Dataset.map_batches` refuses this; a plan is made, nothing runs: there is no GPU here."""
    blocks = ray.data.range(4)
    actors = {"compute": ray.data.ActorPoolStrategy(size=1), "num_gpus": 1}
    with pytest.raises(ValueError, match="batch_size"):
        blocks.map_batches(Rows, fn_constructor_args=("actor",), batch_size=None, **actors)
    assert isinstance(
        ray_private.map_whole_blocks(blocks, Rows, ("actor",), **actors), ray.data.Dataset
    )


def test_keys_are_put_listed_read_and_deleted() -> None:
    """By any process; a key that is put again is replaced."""
    ray_private.put_key(b"one/a", b"1")
    ray_private.put_key(b"one/a", b"2")
    ray.get(ray.remote(ray_private.put_key).remote(b"one/b", b"3"))
    ray_private.put_key(b"other", b"4")
    assert sorted(ray_private.list_keys(b"one/")) == [b"one/a", b"one/b"]
    assert ray_private.get_keys([b"one/a", b"one/b", b"none"]) == {b"one/a": b"2", b"one/b": b"3"}
    ray_private.delete_keys(b"one/")
    assert ray_private.list_keys(b"one/") == []
    assert ray_private.get_keys([b"other"]) == {b"other": b"4"}
    ray_private.delete_keys(b"other")


def test_without_a_connection_keys_are_an_error_of_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_private.internal_kv, "internal_kv_get_gcs_client", lambda: None)
    with pytest.raises(ray.exceptions.RaySystemError, match="no connection"):
        ray_private.list_keys(b"one/")


def test_the_log_of_lost_blocks_has_this_name() -> None:
    """That it is written when a block is lost, test_watch.py shows."""
    from ray.data._internal.execution import streaming_executor_state

    assert streaming_executor_state.logger is logging.getLogger(ray_private.DATA_LOG)


def test_data_sets_take_the_share_that_they_are_given() -> None:
    """Half of two CPUs: tasks that take one each run one after the other, and begin at all."""

    def span(_: pa.Table) -> pa.Table:
        began = time.monotonic()
        time.sleep(0.3)
        return pa.table({"began": [began], "ended": [time.monotonic()]})

    with ray_private.share_of_cluster(0.5):
        blocks = ray.data.range(4, override_num_blocks=4).map_batches(
            span, batch_size=None, batch_format="pyarrow", num_cpus=1
        )
        spans = sorted((row["began"], row["ended"]) for row in blocks.take_all())
    assert len(spans) == 4
    assert all(end <= begin for (_, end), (begin, _) in pairwise(spans))
