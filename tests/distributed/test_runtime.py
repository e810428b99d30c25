"""How work is shared out; Ray's answers about hardware that is not here are stood in for."""

from __future__ import annotations

import gc
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.experimental import internal_kv

from pds_ray import distributed
from pds_ray.config import Actors, ConfigError, RayConfig
from pds_ray.distributed import pools, process, session, tasks, watch
from pds_ray.errors import UserError
from pds_ray.telemetry import progress

pytestmark = pytest.mark.ray


def stand_in(monkeypatch: pytest.MonkeyPatch, *nodes: dict[str, float]) -> dict[str, float]:
    """A cluster of such nodes, and one that is gone; returns its resources."""
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr(
        ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 999.0}}]
    )
    total = {name: sum(node.get(name, 0) for node in nodes) for name in ("CPU", "GPU")}
    monkeypatch.setattr(
        ray, "cluster_resources", lambda: {name: value for name, value in total.items() if value}
    )
    return total


@pytest.mark.parametrize(
    ("nodes", "wish", "workers", "gpus_each"),
    [
        ([{"CPU": 2}], 0, 1, 0),
        ([{"CPU": 1}], 0, 1, 0),
        ([{"CPU": 64}], 0, 8, 0),
        ([{"CPU": 4}], 3, 3, 0),
        ([{"CPU": 32, "GPU": 4}], 0, 4, 1),
        ([{"CPU": 32, "GPU": 4}], 2, 2, 1),
        ([{"CPU": 32, "GPU": 2}], 4, 4, 0.5),
        ([{"CPU": 32, "GPU": 2}], 3, 3, 0.5),
        ([{"CPU": 1, "GPU": 1}], 0, 1, 1),
        ([{"CPU": 8, "GPU": 8}], 0, 8, 1),
        ([{"CPU": 1}], 20, 20, 0),
        ([{"CPU": 2}] * 10, 0, 10, 0),
        ([{"CPU": 4}] * 3, 0, 3, 0),
        ([{"CPU": 2}] * 3, 0, 3, 0),
        ([{"CPU": 5}] * 3, 0, 3, 0),
        ([{"CPU": 2}] * 10, 2, 2, 0),
        ([{"CPU": 5}] * 3, 1, 1, 0),
        ([{"CPU": 1}] * 7, 0, 7, 0),
        ([{"CPU": 16}, {"CPU": 2}, {"CPU": 2}], 0, 2, 0),
        ([{"CPU": 0}, {"CPU": 16, "GPU": 2}, {"CPU": 16, "GPU": 2}], 0, 4, 1),
    ],
)
def test_pools_fit_the_cluster(
    monkeypatch: pytest.MonkeyPatch,
    nodes: list[dict[str, float]],
    wish: int,
    workers: int,
    gpus_each: float,
) -> None:
    """Each actor is put on the first node that has room for it, as a scheduler would at worst."""
    total = stand_in(monkeypatch, *nodes)
    pool = pools.pool(Actors(wish, 1, None, {}))
    assert (pool.workers, pool.num_gpus) == (workers, gpus_each)
    assert pool.workers * pool.num_gpus <= total["GPU"]
    free = [dict(node) for node in nodes]
    for _ in range(pool.workers):
        room = [
            n
            for n in free
            if n["CPU"] + 1e-9 >= pool.num_cpus and n.get("GPU", 0) + 1e-9 >= pool.num_gpus
        ]
        assert room, "an actor fits on no node"
        room[0]["CPU"] -= pool.num_cpus
        room[0]["GPU"] = room[0].get("GPU", 0) - pool.num_gpus
    needed = min(pools.READ_CPUS, pools.DECODE_CPUS)
    assert max(node["CPU"] for node in free) >= needed, "nothing left to read and decode with"


@pytest.mark.parametrize(
    ("cluster", "wish", "workers", "gpus_each", "at_most"),
    [
        ({"CPU": 2}, Actors(16, 2, 1.0, {}), 16, 1, 16),  # GPUs that are yet to come
        ({"CPU": 2}, Actors(0, 4, 1.0, {}), 4, 1, None),
        ({"CPU": 32, "GPU": 4}, Actors(0, 1, 0.25, {}), 16, 0.25, None),
        ({"CPU": 32, "GPU": 4}, Actors(0, 1, 2.0, {}), 2, 2, None),
        ({"CPU": 32, "GPU": 4}, Actors(0, 1, 0.0, {}), 4, 0, 4),  # the CPUs alone
        ({"CPU": 32, "GPU": 4}, Actors(0, 6, None, {}), 6, 1, None),  # two of them must wait
        ({"CPU": 32, "GPU": 4}, Actors(2, 1, None, {}), 2, 1, 2),
        ({"CPU": 32}, Actors(0, 1, None, {}), 4, 0, 4),
    ],
)
def test_wishes_go_before_what_the_cluster_has(
    monkeypatch: pytest.MonkeyPatch,
    cluster: dict[str, float],
    wish: Actors,
    workers: int,
    gpus_each: float,
    at_most: int | None,
) -> None:
    stand_in(monkeypatch, cluster)
    pool = pools.pool(wish)
    assert (pool.min_workers, pool.workers, pool.num_gpus) == (wish.min_workers, workers, gpus_each)
    assert pool.max_workers == at_most, (
        "more GPUs that come are used, unless the number of actors was given"
    )
    assert 0 < pool.num_cpus <= cluster["CPU"]
    assert pools.precision("auto", pool, "bf16") == ("bf16" if gpus_each else "fp32")
    assert pools.pool(wish, on_gpu=False).num_gpus == 0


def test_limits_are_in_force_and_told() -> None:
    """Of nodes, by the environment of the raylet that runs; of Ray Data, by its context."""
    told = session.start(RayConfig())
    raylets = [p for p in psutil.Process().children(recursive=True) if p.name() == "raylet"]
    environment = raylets[0].environ()
    for name, (value, why) in {**distributed.DRIVER, **distributed.NODES}.items():
        assert environment[f"RAY_{name}"] == os.environ[f"RAY_{name}"] == told[name]
        assert value == told[name], "set otherwise by whoever runs the tests"
        assert why
    for name, (value, why) in distributed.TRAIN.items():
        assert environment[f"RAY_{name}"] == value
        assert why
    context = ray.data.DataContext.get_current()
    for name, (value, why) in distributed.DATA.items():
        assert getattr(context, name) == value
        assert name in told
        assert why
    assert Path(told["object_spilling_directory"]).is_dir()


def test_kmeans_takes_the_cpus_that_are_free() -> None:
    """Those of another job on the same node may stay taken: all of the node's would be waited for without end."""

    @ray.remote(num_cpus=1)
    class Other:
        def here(self) -> None:
            pass

    other = Other.remote()
    ray.get(other.here.remote())
    assert (
        tasks.run_kmeans(lambda _: ray.get_runtime_context().get_assigned_resources()["CPU"], [])
        == 1
    )
    ray.kill(other)


def test_a_kmeans_takes_all_cpus_though_tasks_have_only_just_ended() -> None:
    """What they gave back is told late, and the next k-means must not have one CPU for its whole length."""

    def cpus(_: object = None) -> float:
        return ray.get_runtime_context().get_assigned_resources()["CPU"]

    given = []
    for _ in range(4):
        list(tasks.map_in_order(cpus, range(20)))
        given += [tasks.run_kmeans(cpus, []), tasks.run_kmeans(cpus, [])]
        list(tasks.map_in_order(cpus, range(20)))
        given += tasks.stream(lambda: iter([cpus()]))
    assert given == [2] * 12


def test_a_kmeans_whose_node_dies_takes_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two CPUs asked for at first may have gone with the node: the next try asks anew."""
    tries, most = tmp_path / "tries", iter([2, 1])

    def die_once(_: object) -> float:
        with tries.open("a") as file:
            file.write("x")
        if tries.read_text() == "x":
            os.kill(os.getpid(), signal.SIGKILL)
        return ray.get_runtime_context().get_assigned_resources()["CPU"]

    monkeypatch.setattr(tasks, "most_cpus", lambda: next(most))
    assert tasks.run_kmeans(die_once, []) == 1
    assert tries.read_text() == "xx"


def test_what_always_kills_is_not_tried_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"

    def die(_: object) -> None:
        with tries.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(tasks, "TASK_RETRIES", 1)
    with pytest.raises(tasks.LOST):
        tasks.run_kmeans(die, [])
    assert tries.read_text() == "xx"


def test_lost_machines_are_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash may be the work's own doing, a machine that goes is not: spot machines go all the time."""
    monkeypatch.setattr(tasks, "TASK_RETRIES", 2)
    monkeypatch.setattr(tasks, "MACHINES_LOST", 5)
    crash, gone = ray.exceptions.WorkerCrashedError(), ray.exceptions.NodeDiedError("")
    late = ray.exceptions.GetTimeoutError("what was on the machine has to be made anew")
    deaths = tasks.Deaths()
    assert [deaths.survived(error) for error in [gone] * 4 + [late] + [crash] * 3] == [True] * 7 + [
        False
    ]
    assert str(deaths) == "processes lost: 3, machines lost: 5"
    deaths = tasks.Deaths()
    assert [deaths.survived(gone) for _ in range(6)] == [True] * 5 + [False]


def test_lost_blocks_are_counted_by_what_they_were_lost_to(
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


def test_the_node_that_is_full_is_the_one_where_it_happened() -> None:
    """What waits for a value of another task is told first."""

    class Nested(ray.exceptions.OutOfDiskError):
        def __str__(self) -> str:
            return "ray::count() (pid=1, ip=10.0.0.1)\n  ray::encode() (pid=2, ip=10.0.0.2)\nLocal disk is full"

    assert "full on node 10.0.0.2;" in watch.no_space(Nested(""))
    assert "full here;" in watch.no_space(ray.exceptions.ObjectStoreFullError("no space"))
    assert watch.no_space(OSError("ip=10.0.0.1")) == ""


def test_a_stream_that_breaks_off_is_taken_up(tmp_path: Path) -> None:
    broken = tmp_path / "broken"

    def count() -> Iterator[int]:
        for number in range(5):
            if number == 3 and not broken.exists():
                broken.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield number

    assert list(tasks.stream(count)) == [0, 1, 2, 3, 4]
    assert broken.exists()


def test_the_watchdog_names_what_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """The item while its result is awaited, and no longer once all of them are there."""
    monkeypatch.setattr(progress, "STALL_S", 0.4)

    def slow(item: str) -> str:
        time.sleep(2 if item == "00007" else 0)
        return item

    with progress.progress_bar("prune", 2, "shards") as bar:
        for _ in tasks.map_in_order(slow, ["00006", "00007"]):
            bar.update()
        awaited = capsys.readouterr().err
        bar.set_postfix_str("the assignment", refresh=False)
        time.sleep(1.5)
    solved = capsys.readouterr().err
    assert "prune: nothing finished for" in awaited
    assert "waiting for 00007" in awaited
    assert "waiting for the assignment" in solved
    assert "00007" not in solved


def test_who_begins_something_is_told_until_it_ends() -> None:
    here = ray.get_runtime_context().get_node_id()[:8]
    with watch.UnderWay() as under_way, watch.UnderWay() as another:
        another.begin("of another")
        for name in ("b", "a/é"):  # told by other processes
            ray.get(ray.remote(lambda told=name: under_way.begin(told)).remote())
        assert re.fullmatch(
            rf"b \(for \d+ s, on node {here}\), a/é \(.*\)", under_way.describe(set())
        )
        under_way.begin("b")  # once more, as after a death
        assert under_way.describe(set()).startswith("a/é ")
        assert under_way.describe({"a/é"}).startswith("b ")
        assert under_way.describe({"a/é", "b"}) == "none"
    assert under_way.describe(set()) == "none"


def test_what_cannot_be_told_stops_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def __getattr__(self, name: str) -> Any:
            def fail(*_: object) -> None:
                raise ray.exceptions.RpcError("unavailable")

            return fail

    for client, problem in ((Gone(), "RpcError"), (None, "RaySystemError")):
        monkeypatch.setattr(internal_kv, "internal_kv_get_gcs_client", lambda client=client: client)
        with watch.UnderWay() as under_way:
            under_way.begin("a")
            assert under_way.describe(set()) == f"unknown ({problem})"


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_square(item: int, shared: np.ndarray) -> int:
        time.sleep(0.02 * (item % 3))  # later items may end first
        return item * item + int(shared.sum())

    found = list(tasks.map_in_order(slow_square, range(20), np.arange(4)))
    assert found == [item * item + 6 for item in range(20)]


def test_only_user_errors_are_unwrapped() -> None:
    def refuse(_: int) -> None:
        raise ConfigError("no such thing; name another")

    def fail(_: int) -> None:
        raise ZeroDivisionError("ours")

    with (
        pytest.raises(UserError, match=r"^no such thing; name another$"),
        session.unwrapped_errors(),
    ):
        list(tasks.map_in_order(refuse, [0]))
    with pytest.raises(ZeroDivisionError), session.unwrapped_errors():
        list(tasks.map_in_order(fail, [0]))


def test_an_address_without_a_cluster_is_told_at_once() -> None:
    import socket

    with socket.socket() as free:  # bound, not listening: nothing answers there
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConfigError, match="nothing answers at --address"):
            session._connect(f"127.0.0.1:{free.getsockname()[1]}")


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 2), (4, 4), (64, 4)])
def test_a_model_has_no_more_threads_than_cores(monkeypatch, cores, threads):
    import torch

    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    before = torch.get_num_threads()
    try:
        assert process.load_model(lambda model: (model, torch.get_num_threads()), "model") == (
            "model",
            threads,
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("collecting", [True, False])
def test_garbage_is_collected_as_before_when_a_model_is_loaded_or_cannot_be(collecting):
    import torch

    threads = torch.get_num_threads()
    if not collecting:
        gc.disable()
    try:
        assert not process.load_model(gc.isenabled)
        assert gc.isenabled() == collecting
        with pytest.raises(ZeroDivisionError):
            process.load_model(divmod, 1, 0)
        assert gc.isenabled() == collecting
    finally:
        gc.enable()
        torch.set_num_threads(threads)


def test_a_model_on_cpus_keeps_its_memory():
    actors = pools.pool(Actors(1, 1, None, {}), on_gpu=False)
    found = ray.get(pools.start_model(actors, lambda: dict(os.environ)))
    kept = distributed.keeping_memory()
    assert kept.items() <= found.items()
    assert not kept.keys() & os.environ.keys()


@pytest.mark.parametrize(
    ("library", "kept"),
    [("glibc 2.36", True), ("glibc 2.35", False), ("glibc 3.0", True), (None, False)],
)
def test_memory_is_kept_where_the_library_is_known_to_do_it(monkeypatch, library, kept):
    monkeypatch.setattr(os, "confstr", lambda _: library)
    assert bool(distributed.keeping_memory()) == kept
    actors = pools.pool(Actors(1, 1, None, {}), on_gpu=False)
    assert ("runtime_env" in actors.options()) == kept
