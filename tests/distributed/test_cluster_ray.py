"""Clustering on Ray: resuming, labels, and vectors clustered at unit length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from pds_ray.config import ClusterConfig, RunConfig
from pds_ray.distributed import cluster as stage
from pds_ray.distributed import lloyd, pools
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.stage_run import do, stage_run
from tests.support.synthetic_store import Gathered, make_store

pytestmark = pytest.mark.ray
DIM, CLUSTERS = 8, 12
CONFIG = RunConfig(pairs=CLUSTERS, cluster=ClusterConfig(iterations=5))

Pruned = tuple[EmbeddingStore, Gathered, dict[str, Any]]


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pruned]:
    folder = tmp_path_factory.mktemp("pruned")
    store, data = make_store(folder / "store", [40, 1, 120, 39])
    return folder, (
        store,
        data,
        do(stage_run(store, RunFolder(Folder(str(folder / "run"))), CONFIG), "prune")["prune"],
    )


def new_run(
    pruned: tuple[Path, Pruned], folder: Path
) -> tuple[RunFolder, Callable[..., dict[str, Any]]]:
    """Return a run of its own on the pruned store, and a call that clusters it."""
    made, (store, _data, counts) = pruned
    folder.mkdir(exist_ok=True)
    (folder / "pruning").symlink_to(made / "run" / "pruning")
    run = RunFolder(Folder(str(folder)))

    def call(
        config: RunConfig = CONFIG, fingerprint: str = "one", **other_counts: int
    ) -> dict[str, Any]:
        on = stage_run(store, run, config, DIM)
        on.fingerprints["cluster"] = fingerprint
        on.manifest.stages["prune"] = {"counts": {**counts, **other_counts}}
        return do(on, "cluster")["cluster"]

    return run, call


def contents(run: RunFolder) -> dict[str, bytes]:
    root = Path(run.clusters.path)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def no_fit(*_: Any) -> None:
    raise AssertionError("a k-means was fitted again")


def times(run: RunFolder) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in Path(run.clusters.path).iterdir()}


def test_labels_that_are_there_are_kept(
    pruned: tuple[Path, Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, call = new_run(pruned, tmp_path)
    undisturbed = call()
    before, written = contents(run), times(run)
    lost = [f"{shard}.labels.parquet" for shard in pruned[1][1].shards[1:3]]
    for name in lost:
        run.clusters.delete(name)
    monkeypatch.setattr("pds_ray.distributed.tasks.run_kmeans", no_fit)
    assert call() == undisturbed
    assert contents(run) == before
    after = times(run)
    assert {name for name, at in after.items() if at != written[name]} == set(lost)


def test_a_fit_that_is_finished_is_kept(pruned: tuple[Path, Pruned], tmp_path: Path) -> None:
    """Stopped in the second k-means, a run has only that one and the labels left to do."""
    run, call = new_run(pruned, tmp_path)
    undisturbed = call()
    before, written = contents(run), times(run)
    fits = run.fits()
    del fits["fits"]["text"]
    run.save_fits(fits)
    run.clusters.delete("text.safetensors")
    for name in run.clusters.names(".labels.parquet"):
        run.clusters.delete(name)
    assert call() == undisturbed
    assert contents(run) == before
    assert times(run)["image.safetensors"] == written["image.safetensors"]


def test_k_means_of_several_nodes_run_side_by_side(
    pruned: tuple[Path, Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bytes of one after the other; a fit that is lost is made again by itself."""
    run, call = new_run(pruned, tmp_path / "one")
    undisturbed = call()
    other, call_other = new_run(pruned, tmp_path / "two")
    monkeypatch.setattr("pds_ray.distributed.tasks.kmeans_places", lambda: 2)
    assert call_other() == undisturbed
    assert contents(other) == contents(run)
    other.clusters.delete("image.safetensors")
    assert call_other() == undisturbed
    assert contents(other) == contents(run)


@pytest.mark.parametrize("change", ["fingerprint", "pairs"])
def test_cluster_refits_when_its_input_changes(
    pruned: tuple[Path, Pruned], tmp_path: Path, change: str
) -> None:
    run, call = new_run(pruned, tmp_path)
    call()
    written = times(run)
    run.clusters.write_bytes("image.cells/000000.safetensors", b"of a fit that was stopped")
    call(**({"fingerprint": "two"} if change == "fingerprint" else {"pairs": 10**6}))
    after = times(run)
    assert after.keys() == written.keys()
    assert all(after[name] > written[name] for name in written)


@pytest.mark.parametrize("tasks", [1, 3])
def test_shards_may_be_sampled_together(
    pruned: tuple[Path, Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tasks: int
) -> None:
    run, call = new_run(pruned, tmp_path / "each")
    each = call()
    together, call = new_run(pruned, tmp_path / "together")
    monkeypatch.setattr(stage, "SAMPLE_TASKS", tasks)
    assert call() == each
    assert contents(together) == contents(run)


def in_reverse(
    function: Callable[..., Any],
    items: Iterable[Any],
    *shared: Any,
    share: pools.Share,  # noqa: ARG001
) -> Iterator[Any]:
    """Do as `map_in_order`, but run the last task first."""
    return reversed([function(item, *shared) for item in reversed(list(items))])


def test_labels_are_of_the_nearest_centroid(
    pruned: tuple[Path, Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, (_, data, _) = pruned
    run, call = new_run(pruned, tmp_path / "run")
    counts = call()
    kept = np.concatenate([run.keep(shard) for shard in data.shards])
    labels = [
        np.concatenate(column)
        for column in zip(*(run.labels(shard) for shard in data.shards), strict=True)
    ]
    for space, rows, found in zip(("image", "text"), (data.image, data.text), labels, strict=True):
        centroids = run.centroids(space)
        assert centroids.shape == (CLUSTERS, DIM)
        distances = ((rows[:, None] - centroids[None]) ** 2).sum(axis=2)
        np.testing.assert_array_equal(found[kept], distances[kept].argmin(axis=1))
        assert (found[~kept] == -1).all()
        reached = distances[np.flatnonzero(kept), found[kept]].sum()
        assert counts[space]["objective"] == pytest.approx(reached, rel=1e-3)
        images = len({data.keys[pair] for pair in np.flatnonzero(kept)})
        assert counts[space]["rows"] == (images if space == "image" else kept.sum())

    again, call = new_run(pruned, tmp_path / "again")
    monkeypatch.setattr(stage.tasks, "map_in_order", in_reverse)
    assert call() == counts
    assert contents(again) == contents(run), "whatever the order of the tasks"


def test_normalize_clusters_unit_vectors(pruned: tuple[Path, Pruned], tmp_path: Path) -> None:
    _, (_, data, _) = pruned
    run, call = new_run(pruned, tmp_path)
    call(
        RunConfig(
            pairs=CLUSTERS, cluster=ClusterConfig(iterations=100, tolerance=0, normalize=True)
        )
    )
    kept = np.concatenate([run.keep(shard) for shard in data.shards])
    found = np.concatenate([run.labels(shard)[1] for shard in data.shards])
    rows = data.text / np.linalg.norm(data.text, axis=1, keepdims=True)
    centroids = run.centroids("text")
    distances = ((rows[:, None] - centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(found[kept], distances.argmin(axis=1)[kept])
    for label in range(CLUSTERS):  # run to convergence
        np.testing.assert_allclose(
            centroids[label], rows[found == label].mean(axis=0), rtol=1e-4, atol=1e-5
        )


SHARED_OUT = RunConfig(pairs=CLUSTERS, cluster=ClusterConfig(solver="distributed", iterations=5))


@pytest.mark.parametrize("most_seeds", [0, CLUSTERS], ids=["drawn in rounds", "greedy seeds"])
def test_a_k_means_over_all_nodes_is_the_same_for_any_grouping(
    pruned: tuple[Path, Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_seeds: int
) -> None:
    """One task or several, in few or many ranges of clusters, give the same bytes."""
    monkeypatch.setattr(stage.core, "SEED_LIMIT", most_seeds)
    made = []
    for tasks, ranges in ((1, 1), (3, 2)):
        monkeypatch.setattr(lloyd, "fit_tasks", lambda *_, tasks=tasks: tasks)
        monkeypatch.setattr(lloyd, "cluster_ranges", lambda *_, ranges=ranges: ranges)
        run, call = new_run(pruned, tmp_path / str(tasks))
        made.append((call(SHARED_OUT), contents(run)))
    assert made[0] == made[1]


def test_a_k_means_over_all_nodes_ends_as_in_one_process(
    pruned: tuple[Path, Pruned], tmp_path: Path
) -> None:
    """From the same seeds; brute force reaches the same objective within rounding."""
    _, (store, data, _) = pruned
    run, call = new_run(pruned, tmp_path)
    counts = call(SHARED_OUT)
    for space in ("image", "text"):
        rows, weights = stage.sampled(data.shards, space, store, run, 1.0, SHARED_OUT)
        centroids = stage.core.seeds(rows, weights, CLUSTERS, np.random.default_rng([0, 0]))
        for _ in range(5):
            distances = ((rows.astype(np.float64)[:, None] - centroids[None]) ** 2).sum(axis=2)
            labels = distances.argmin(axis=1)
            centroids = np.stack(
                [
                    np.average(rows[labels == label], axis=0, weights=weights[labels == label])
                    for label in range(CLUSTERS)
                ]
            )
        np.testing.assert_allclose(run.centroids(space), centroids, rtol=1e-5, atol=1e-6)
        distances = ((rows.astype(np.float64)[:, None] - centroids[None]) ** 2).sum(axis=2)
        expected = (distances.min(axis=1) * weights).sum()
        assert counts[space]["objective"] == pytest.approx(expected, rel=1e-5)
        assert counts[space]["rows"] == len(rows)


@pytest.mark.parametrize("most_seeds", [0, CLUSTERS], ids=["drawn in rounds", "greedy seeds"])
@pytest.mark.parametrize("step", ["_start", "_iterate", "_objective", "_count_distinct"])
def test_a_step_that_is_lost_is_made_again(
    pruned: tuple[Path, Pruned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    most_seeds: int,
) -> None:
    """Lost when it was done already, and twice; with the same bytes, by tasks of a CPU each."""
    monkeypatch.setattr(stage.core, "SEED_LIMIT", most_seeds)
    run, call = new_run(pruned, tmp_path / "one")
    undisturbed = call(SHARED_OUT)
    lost, made = iter([True, True, False, True]), getattr(lloyd, step)

    def lose_some(*given: Any) -> Any:
        found = made(*given)
        if next(lost, False):
            raise ray.exceptions.ObjectLostError("", None, "")
        return found

    monkeypatch.setattr(lloyd, step, lose_some)
    monkeypatch.setattr("pds_ray.distributed.tasks.run_kmeans", no_fit)
    other, call_other = new_run(pruned, tmp_path / "two")
    assert call_other(SHARED_OUT) == undisturbed
    assert contents(other) == contents(run)
    assert next(lost, None) is None


def test_a_step_that_crashes_is_not_tried_again_twice(
    pruned: tuple[Path, Pruned], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray has tried it again already."""
    tries = []

    def crash(*_: Any) -> Any:
        tries.append(1)
        raise ray.exceptions.WorkerCrashedError

    monkeypatch.setattr(lloyd, "_iterate", crash)
    _, call = new_run(pruned, tmp_path)
    with pytest.raises(ray.exceptions.WorkerCrashedError):
        call(SHARED_OUT)
    assert len(tries) == 1


def test_restarts_and_tolerance_of_a_k_means_over_all_nodes(
    pruned: tuple[Path, Pruned], tmp_path: Path
) -> None:
    found = []
    for number, changes in enumerate(
        ({"iterations": 2}, {"iterations": 9, "tolerance": 0.9}, {"iterations": 2, "restarts": 3})
    ):
        _, call = new_run(pruned, tmp_path / str(number))
        config = ClusterConfig(solver="distributed", **{"tolerance": 0, **changes})
        found.append(call(RunConfig(pairs=CLUSTERS, cluster=config)))
    two, at_rest, best = found
    assert two == at_rest, "at 0.9 the first change is small enough"
    for space in ("image", "text"):
        assert best[space]["objective"] <= two[space]["objective"]
    assert best != two
