"""Work on the cluster: shared out, lost and tried again, in order."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.experimental import internal_kv
from tqdm import tqdm

from pds_ray import distributed
from pds_ray.config import Actors
from pds_ray.distributed import pools, ranges, tasks
from pds_ray.telemetry import progress
from tests.support.ray_script import output_of

pytestmark = pytest.mark.ray


def test_kmeans_takes_the_cpus_that_are_free() -> None:
    """Others of the node may stay taken by another job: waiting for all might not end."""

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


def test_kmeans_takes_all_cpus_right_after_other_tasks() -> None:
    """Ray tells late that CPUs are free; a k-means must not have one CPU for its whole length."""

    def cpus(_: object = None) -> float:
        return ray.get_runtime_context().get_assigned_resources()["CPU"]

    given = []
    for _ in range(4):
        list(tasks.map_in_order(cpus, range(20)))
        given += [tasks.run_kmeans(cpus, []), tasks.run_kmeans(cpus, [])]
        list(tasks.map_in_order(cpus, range(20)))
        given += tasks.stream(lambda: iter([cpus()]))
    assert given == [2] * 12


def test_kmeans_takes_what_is_left_when_its_node_dies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two CPUs of the first try may be gone with the node: the next asks for what is left."""
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


def test_work_that_always_kills_its_process_is_given_up(
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


def test_a_stream_that_breaks_off_is_continued(tmp_path: Path) -> None:
    broken = tmp_path / "broken"

    def count() -> Iterator[int]:
        for number in range(5):
            if number == 3 and not broken.exists():
                broken.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            yield number

    assert list(tasks.stream(count)) == [0, 1, 2, 3, 4]
    assert broken.exists()


def test_the_stall_watchdog_names_the_awaited_item(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """It names the item while its result is awaited, and no longer once all results are there."""
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


def test_results_come_in_the_order_of_the_items() -> None:
    def slow_square(item: int, shared: np.ndarray) -> int:
        time.sleep(0.02 * (item % 3))  # later items may end first
        return item * item + int(shared.sum())

    found = list(tasks.map_in_order(slow_square, range(20), np.arange(4)))
    assert found == [item * item + 6 for item in range(20)]


@pytest.mark.parametrize(("items", "count"), [(10, 3), (7, 7), (5, 1), (0, 1)])
def test_groups_are_even_and_in_order(items: int, count: int) -> None:
    found = tasks.groups(list(range(items)), count)
    assert len(found) == (count if items else 0)
    assert [item for group in found for item in group] == list(range(items))
    assert max(map(len, found), default=0) - min(map(len, found), default=0) <= 1


def test_what_changes_is_sent_again_with_each_window() -> None:
    """It is never newer than what was counted, nor older than a window."""
    seen = []

    def known(_: int, counted: int, never_changes: int) -> int:
        return counted + never_changes

    for value in tasks.map_in_order(known, range(40), tasks.Latest(lambda: len(seen)), 100):
        seen.append(value - 100)
    window = 4  # two CPUs
    assert seen == sorted(seen)
    assert seen[:window] == [0] * window
    for number, counted in enumerate(seen):
        assert max(0, number - 2 * window) <= counted <= number


def test_values_stay_in_the_object_stores() -> None:
    def parts(item: int) -> tuple[int, int, str]:
        return item, 10 * item, "small"

    first, second = 0, 0
    totals = [tasks.in_store(sum_of), tasks.in_store(sum_of)]
    for number, (one, ten, small) in enumerate(tasks.map_to_store(parts, range(6), results=3)):
        assert ray.get(small) == "small"
        totals = [tasks.in_store(sum_of, totals[0], one), tasks.in_store(sum_of, totals[1], ten)]
        first, second = first + number, second + 10 * number
    assert ray.get(totals) == [first, second]


@pytest.mark.parametrize("groups", [1, 2, 3, 8, 29])
def test_answers_are_added_up_in_their_order(monkeypatch: pytest.MonkeyPatch, groups: int) -> None:
    """Each task answers for two ranges; three neighbours at a time are joined, one task at once."""
    monkeypatch.setattr(ranges, "ADDED_TOGETHER", 3)
    monkeypatch.setattr(ranges, "additions_at_once", lambda _: 1)

    def parts(group: list[str], end: str) -> Iterator[list[str] | int]:
        yield [name + end for name in group]
        yield [name + end + end for name in group]
        yield len(group)

    def join(*neighbours: list[str]) -> list[str]:
        assert 2 <= len(neighbours) <= 3
        return [name for part in neighbours for name in part]

    items = [[f"{number}a", f"{number}b"] for number in range(groups)]
    with tqdm(disable=True) as bar:
        found = ranges.added_up(parts, items, "!", ranges=2, add=join, bar=bar)
    names = [name for group in items for name in group]
    assert ray.get(list(found)) == [[name + end for name in names] for end in ("!", "!!")]


def sum_of(*values: int) -> int:
    return sum(values)


def twice(value: int) -> int:
    return 2 * value


def sent() -> int:
    """Return how many functions this job has sent to the cluster."""
    job = ray.get_runtime_context().get_job_id().encode()
    return len(internal_kv._internal_kv_list(b"RemoteFunction:" + job, namespace=b"fun"))


def test_a_function_is_sent_to_the_cluster_once() -> None:
    """Its tasks may be many, started in several ways."""
    assert ray.get(tasks.in_store(twice, 1)) == 2
    before = sent()
    assert ray.get([tasks.in_store(twice, number) for number in range(5)]) == [0, 2, 4, 6, 8]
    for _ in range(3):
        assert list(tasks.map_in_order(twice, range(3))) == [0, 2, 4]
    assert sent() == before


def test_a_function_that_could_not_be_sent_is_sent_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray counts a function as sent before it is."""

    def failing(*_: object) -> None:
        raise ConnectionError("no answer")

    tasks._by_name.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(ray._private.worker.global_worker.function_actor_manager, "export", failing)
        with pytest.raises(ConnectionError):
            tasks.in_store(twice, 1)
    assert ray.get(tasks.in_store(twice, 1), timeout=60) == 2


def test_a_function_that_holds_a_value_is_sent_with_the_one_of_now() -> None:
    value = 1

    def held() -> int:
        return value

    found = [ray.get(tasks.in_store(held))]
    value = 2
    found.append(ray.get(tasks.in_store(held)))
    assert found == [1, 2]


SESSIONS = """
import ray
from pds_ray.distributed import pools, tasks
from tests.distributed.test_tasks import sent, twice

value = 1

def held():
    return value

for session in range(2):
    ray.init("local", num_cpus=1, num_gpus=1, object_store_memory=80 << 20)
    for share in (pools.ONE_CPU, pools.Share(1 / 2)):
        found = [tasks.in_store(twice, number, share=share) for number in range(3)]
        print(ray.get(found), sent())
    value = session
    print(ray.get(tasks.in_store(held)))
    ray.shutdown()
"""


def test_a_function_is_sent_anew_to_each_cluster() -> None:
    """One session of Ray after the other in a process; what a script holds is as it is then.

    Tasks on GPUs are all of one function of Ray, which calls theirs.
    """
    assert output_of(SESSIONS) == [
        "[0, 2, 4] 1",
        "[0, 2, 4] 2",
        "0",
        "[0, 2, 4] 1",
        "[0, 2, 4] 2",
        "1",
    ]


def test_a_model_on_cpus_keeps_freed_memory():
    actors = pools.pool(Actors(1, 1, None, {}), on_gpu=False)
    found = ray.get(pools.start_model(actors, lambda: dict(os.environ)))
    kept = distributed.malloc_env()
    assert kept.items() <= found.items()
    assert not kept.keys() & os.environ.keys()
