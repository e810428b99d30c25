"""Sizes of pools; Ray's answers about hardware that is not here are stood in for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from pds_ray import distributed
from pds_ray.config import Actors
from pds_ray.distributed import optimise, pools, sizes
from tests.support.tiny_experts import wanted


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
def test_options_go_before_what_the_cluster_has(
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


@pytest.mark.parametrize(
    ("library", "kept"),
    [("glibc 2.36", True), ("glibc 2.35", False), ("glibc 3.0", True), (None, False)],
)
def test_freed_memory_is_kept_where_the_library_can(monkeypatch, library, kept):
    stand_in(monkeypatch, {"CPU": 2})
    monkeypatch.setattr(os, "confstr", lambda _: library)
    assert bool(distributed.malloc_env()) == kept
    actors = pools.pool(Actors(1, 1, None, {}), on_gpu=False)
    assert ("runtime_env" in actors.options()) == kept


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus"),
    [
        ([{"CPU": 1}], 1, 0),
        ([{"CPU": 2}, {"CPU": 1}], 2, 0),
        ([{"CPU": 64}], 4, 0),
        ([{"CPU": 1, "GPU": 1}], 1, 1),
    ],
)
def test_an_optimisation_fits_a_node(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    nodes: list[dict[str, float]],
    cpus: float,
    gpus: float,
) -> None:
    """The machine of the driver may have more CPUs: a task that asks for them waits for ever."""
    stand_in(monkeypatch, *nodes)
    place = optimise._place(wanted(tmp_path))
    assert (place.num_cpus, place.num_gpus) == (cpus, gpus)


@given(st.integers(1, 600), st.integers(1, 8), st.integers(1, 64))
def test_parts_of_a_pool_are_as_large_together(workers: int, least: int, count: int) -> None:
    whole = pools.Pool(least, workers, None, 1.0, 0.5, {"embed": 0.1})
    found = pools.parts(whole, count)
    assert len(found) == count
    assert sum(part.workers for part in found) == max(workers, count)
    assert all(1 <= part.min_workers <= max(1, least) for part in found)
    assert {part.max_workers - part.workers for part in found if part.max_workers} == {0}
    assert max(part.workers for part in found) - min(part.workers for part in found) <= 1
    assert {(part.num_cpus, part.num_gpus) for part in found} == {(1.0, 0.5)}


@given(st.integers(1, 10**6), st.integers(1, 64))
def test_groups_of_shards(shards: int, executions: int) -> None:
    groups = sizes.groups_each(shards, executions)
    share = shards / executions
    assert share / groups <= sizes.SHARDS_TOGETHER
    if share < sizes.FEW_SHARDS:
        assert groups == 1


@pytest.mark.parametrize(
    ("wish", "cpus", "actors", "shards", "executions"),
    [
        (0, 2, 1, 10, 1),
        (0, 256, 32, 40_000, 1),
        (0, 257, 32, 40_000, 2),
        (0, 4096, 512, 40_000, 16),
        (0, 4096, 512, 5, 5),
        (0, 4096, 3, 40_000, 3),
        (1, 4096, 512, 40_000, 1),
        (4, 2, 4, 40_000, 4),
    ],
)
def test_executions(wish: int, cpus: int, actors: int, shards: int, executions: int) -> None:
    assert sizes.executions(wish, cpus, actors, shards) == executions


def test_processes_without_cpus_are_spread_over_nodes_with_some(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, head, large, gone = (digit * 56 for digit in "1234")
    cpus = {small: 2.0, head: 0.0, large: 8.0, gone: 64.0}
    nodes = [
        {"NodeID": name, "Alive": name != gone, "Resources": {"CPU": count} if count else {}}
        for name, count in cpus.items()
    ]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    places = [pools.place(number).node_id for number in range(4)]
    assert places == [small, large, small, large]
    assert pools.place(0).soft, "it must find another place if the node is gone"
    for node in nodes:
        node["Alive"] = node["NodeID"] == head
    assert pools.place(1).node_id == head, "the others may be back soon"


@pytest.mark.parametrize(
    ("sizes", "free", "most", "places"),
    [
        ([16, 16], [16, 16], 16, 2),
        ([16, 16, 16], [16, 15, 1], 16, 1),
        ([16, 16, 4], [3, 3, 3], 3, 3),
        ([0, 16, 16, 4], [0, 16, 16, 4], 16, 2),
        ([2, 2], [0, 0], 0, 1),
        ([4, 4], [3.5, 3], 3, 2),
        ([], [], 0, 1),
    ],
)
def test_what_others_leave(
    monkeypatch: pytest.MonkeyPatch,
    sizes: list[float],
    free: list[float],
    most: int,
    places: int,
) -> None:
    """A k-means beside another has a node as free as any, or none."""
    nodes = [
        {"Alive": True, "NodeID": str(node), "Resources": {"CPU": size}}
        for node, size in enumerate(sizes)
    ]
    left = {str(node): {"CPU": amount} for node, amount in enumerate(free)}
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(pools.ray_private, "free_resources", lambda: left)
    monkeypatch.setattr(pools, "SETTLE_S", 0.0)
    assert pools.most_free("CPU") == most
    assert pools.most_cpus() == max(1, most)
    assert pools.places_as_free("CPU") == places


def test_cpus_that_are_told_late_to_be_free_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [{"Alive": True, "NodeID": name, "Resources": {"CPU": 8}} for name in "ab"]
    told = iter([{"a": {"CPU": 7}}, {"a": {"CPU": 8}}, {"a": {"CPU": 8}, "b": {"CPU": 8}}])
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(pools.ray_private, "free_resources", lambda: next(told))
    monkeypatch.setattr(pools, "SETTLE_S", 60.0)
    assert pools.most_free("CPU") == 8, "one node is enough"
    assert pools.places_as_free("CPU") == 2


@pytest.mark.parametrize(
    ("nodes", "together"),
    [
        ([{"CPU": 192, "GPU": 8}], 8),
        ([{"CPU": 32, "GPU": 8}], 4),
        ([{"CPU": 4, "GPU": 1}, {"CPU": 0}, {"CPU": 64}], 4),
        ([{"CPU": 100, "GPU": 16}, {"CPU": 64, "GPU": 4}], 6),
        ([{"CPU": 2, "GPU": 8}], 1),
        ([{"CPU": 2}], 8),
    ],
)
def test_no_gpu_is_without_products_where_there_are_cpus(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], together: int
) -> None:
    """With fewer CPUs, eight tasks on each GPU would leave the last GPUs without any."""
    stand_in(monkeypatch, *nodes)
    assert pools._together(80e9) == together
    for node in nodes:
        if cpus := int(node.get("GPU", 0)) and int(node["CPU"]):
            filled = min(node["GPU"], -(-cpus // together))
            assert filled == min(node["GPU"], cpus), "one after the other"


@pytest.mark.parametrize(("memory", "together"), [(80e9, 8), (15.8e9, 6), (6e9, 2), (2e9, 1)])
def test_tasks_on_a_gpu_fit_its_memory(
    monkeypatch: pytest.MonkeyPatch, memory: float, together: int
) -> None:
    """An H100 has room for all, a T4 of 16 GB for six."""
    stand_in(monkeypatch, {"CPU": 64, "GPU": 1})
    assert pools._together(memory) == together


@pytest.mark.parametrize(
    ("gpus", "share", "tasks", "each"),
    [
        (512, 1 / 8, 374, 1.0),
        (8, 1 / 8, 64, 1 / 8),
        (8, 1 / 8, 17, 1 / 3),
        (8, 1 / 4, 64, 1 / 4),  # no more on a GPU than there are CPUs for
        (0, 0.0, 3, 0.0),
    ],
)
def test_few_tasks_have_more_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, share: float, tasks: int, each: float
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": float(gpus)})
    device = "cuda" if gpus else "cpu"
    assert pools.of_few(pools.Share(share, device), tasks) == pools.Share(each, device)


@pytest.mark.parametrize(
    ("gpus", "share", "places"),
    [(1, 1 / 2, 2), (8, 1 / 6, 48), (8, 1 / 8, 64), (16, 1 / 8, 64), (8, 1.0, 8), (8, 0.0, 64)],
)
def test_places_of_a_share(
    monkeypatch: pytest.MonkeyPatch, gpus: int, share: float, places: int
) -> None:
    """As many on each GPU as share it, and no more than the 64 CPUs."""
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0, "GPU": float(gpus)})
    assert pools.Share(share, "cuda").places == places
