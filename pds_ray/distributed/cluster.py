"""Clustering: shards are sampled, a k-means is fitted on the sample, shards are labelled.

The fit is one heavy task on one node, FAISS's, or shared out over all nodes (`lloyd`).

A finished k-means and the labels of a shard are kept as long as they belong to the same
configuration and the same pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from pds_ray.config import ConfigError, RunConfig
from pds_ray.distributed import lloyd, pools, tasks
from pds_ray.distributed.in_flight import InFlight
from pds_ray.distributed.sample import Parts, gathered
from pds_ray.distributed.sizes import product_seconds, task_count
from pds_ray.methods.base import Counts, Run
from pds_ray.stages import cluster as core
from pds_ray.stages import products, vectors
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import fingerprint
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import embeddings
from pds_ray.store.storage import side_by_side
from pds_ray.telemetry.progress import progress_bar

SAMPLE_TASKS = 1_000  # at most, as Ray keeps results below 100 KB in the driver


def sampled(
    shards: list[str],
    space: str,
    store: EmbeddingStore,
    folder: RunFolder,
    share: float,
    config: RunConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the training vectors of some shards in one space, in shard order, and their weights.

    They are float32 [n, width] and [n]. A row is an image in the space "image", a pair in "text"
    and "joint".
    """
    found, weights = [], []
    for shard in shards:
        weight = folder.keep(shard).astype(np.float32)
        if space == "image":
            weight = np.bincount(_owner(shard, store), weight).astype(np.float32)
        candidates = np.flatnonzero(weight)
        rows = candidates[core.sample_rows(len(candidates), share, config.seed, f"{space}/{shard}")]
        found.append(_vectors(space, shard, store, config.cluster.normalize, rows))
        weights.append(weight[rows])
    return (found[0] if len(found) == 1 else np.concatenate(found)), np.concatenate(weights)


def _sample(
    space: str,
    shards: list[str],
    store: EmbeddingStore,
    folder: RunFolder,
    share: float,
    config: RunConfig,
) -> list[Parts]:
    """Sample all shards over the cluster, whose object stores hold the samples."""
    parts_count = min(len(shards), SAMPLE_TASKS)
    bounds = np.linspace(0, len(shards), parts_count + 1).astype(int)
    groups = [shards[start:end] for start, end in pairwise(bounds)]
    parts: list[Parts] = []
    with progress_bar("cluster", len(shards), "shards") as bar:
        bar.set_postfix_str(
            f"{share:.3%} of {space} vectors" if share < 1 else f"{space} vectors", refresh=False
        )
        for group, (sample, weights) in zip(
            groups,
            tasks.map_to_store(sampled, groups, space, store, folder, share, config),
            strict=True,
        ):
            bar.update(len(group))
            parts.append((sample, weights))
    return parts


def _owner(shard: str, store: EmbeddingStore) -> np.ndarray:
    """Return the image row of each pair, int32 [pairs]."""
    return store.captions(shard, ["image_row"]).column("image_row").to_numpy()


def _vectors(
    space: str,
    shard: str,
    store: EmbeddingStore,
    normalize: bool,
    rows: np.ndarray | slice = slice(None),
) -> np.ndarray:
    """Return rows of a shard as they are clustered, float32 [rows, d], or [rows, 2d] if joint."""
    side = (
        store.images(shard, ["embedding"])
        if space == "image"
        else store.captions(shard, ["embedding"])
    )
    found = embeddings(side)[rows]
    if space == "joint":
        images = embeddings(store.images(shard, ["embedding"]))
        found = vectors.joined(images[_owner(shard, store)[rows]], found)
    return vectors.normalized(found) if normalize else found


def label_shards(
    group: list[tuple[str, bool]],
    store: EmbeddingStore,
    folder: RunFolder,
    centroids: dict[str, np.ndarray],
    normalize: bool,
    device: str,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Save the labels of the pairs of shards, each given with whether they exist already.

    `centroids` are float32 [K, d], by space. Returns for each space the clusters that have pairs
    and how many each has.
    """
    clusters = len(next(iter(centroids.values())))
    sizes = np.zeros((len(centroids), clusters), np.int64)
    prepared = {space: products.as_centroids(fitted, device) for space, fitted in centroids.items()}
    for shard, done in group:
        if not done:
            _label(shard, store, folder, prepared, normalize)
        for space, labels in enumerate(folder.labels(shard)[: len(centroids)]):
            sizes[space] += np.bincount(labels[labels >= 0], minlength=clusters)
    return [(np.flatnonzero(size), size[size > 0]) for size in sizes]


def _label(
    shard: str,
    store: EmbeddingStore,
    folder: RunFolder,
    centroids: dict[str, products.Vectors],
    normalize: bool,
) -> None:
    kept, owner = folder.keep(shard), _owner(shard, store)
    labels = []
    for space, fitted in centroids.items():
        found = products.assign(_vectors(space, shard, store, normalize), fitted)
        labels.append(
            np.where(kept, found[owner] if space == "image" else found, -1).astype(np.int32)
        )
    folder.save_labels(shard, labels[0], labels[-1])  # one k-means alone labels both sides


def _begin(run: Run) -> dict[str, Any]:
    """Return the record of the fits; clusters of other data or another configuration are removed.

    They belong to the pairs that pruning left and to all that the clusters depend on.
    """
    folder, counts = run.folder, run.counts("prune")
    made_from = {
        "fingerprint": fingerprint(run.fingerprints["cluster"], run.manifest.data["store_content"]),
        **{name: counts[name] for name in ("pairs", "kept", "images_kept")},
    }
    found = folder.fits()
    if found.get("made_from") == made_from:
        return found
    folder.save_fits({})  # first, lest a removal that is cut short looks whole
    folder.clusters.delete_all()
    begun = {"made_from": made_from, "fits": {}}
    folder.save_fits(begun)
    return begun


def cluster(run: Run) -> Counts:
    """Fit each k-means and label every pair. Return sizes and objectives.

    Raises ConfigError if pruning leaves fewer pairs or images than clusters.
    """
    shards, config, counts = run.shard_names, run.config, run.counts("prune")
    if min(counts["images_kept"], counts["kept"]) < config.pairs:
        raise ConfigError(
            f"{config.pairs:,} clusters asked for, but pruning leaves {counts['kept']:,} pairs of "
            f"{counts['images_kept']:,} images; lower --pairs or --prune.ratio"
        )
    begun, spaces = _begin(run), config.cluster.spaces
    fitted = {space for space in spaces if _is_fitted(run, begun, space)}
    todo = [space for space in spaces if space not in fitted]
    places = tasks.kmeans_places() if config.cluster.solver == "faiss" else 1
    for start in range(0, len(todo), places):
        _fit_spaces(run, begun, todo[start : start + places], fitted)
    sizes = _label_shards(run, shards)
    return {
        space: {**begun["fits"][space], **_spread(size)}
        for space, size in zip(spaces, sizes, strict=True)
    }


def _is_fitted(run: Run, begun: dict[str, Any], space: str) -> bool:
    """Return whether the k-means of a space is there; if it is gone, labels by it are removed."""
    if space not in begun["fits"]:
        return False
    there = run.folder.has_centroids(space)
    if not there:  # new centroids may differ from those that are gone in their last bits
        run.folder.delete_labels()
    return there


def _fit_spaces(run: Run, begun: dict[str, Any], spaces: list[str], fitted: set[str]) -> None:
    """Fit the k-means of some spaces, each on a node of its own or one on all of them.

    They are recorded in `begun`. `fitted` are the spaces that have a k-means; these are added.
    """
    config, rounds = run.config, run.config.cluster.restarts * run.config.cluster.iterations
    samples = {
        space: _sample(
            space, run.shard_names, run.store, run.folder, _sample_share(run, space), config
        )
        for space in spaces
    }
    done, total = len(fitted) * rounds, len(config.cluster.spaces) * rounds
    with InFlight() as in_flight, progress_bar("cluster", total, "iterations", done) as bar:
        bar.set_postfix_str(f"{' and '.join(spaces)}, K = {config.pairs:,}", refresh=False)
        bar.follow(in_flight.reports(fitted.__contains__))

        def fit(space: str) -> dict[str, Any]:
            if config.cluster.solver == "distributed":
                return _fit_shared_out(run, samples[space], space, in_flight, reach)
            return _fit_space(samples[space], space, run.folder, config, in_flight)

        def reach(iterations: int) -> None:
            bar.update(len(fitted) * rounds + iterations - bar.finished)

        # in threads, which an interrupt would not reach, only where there are several
        fits = (side_by_side if len(spaces) > 1 else map)(fit, spaces)
        for space, found in zip(spaces, fits, strict=True):
            begun["fits"][space] = found
            run.folder.save_fits(begun)
            fitted.add(space)
            reach(0)


def _sample_share(run: Run, space: str) -> float:
    """Return the share of the rows of `space` that its k-means is fitted on."""
    counts, config = run.counts("prune"), run.config
    rows = counts["images_kept"] if space == "image" else counts["kept"]
    return core.sample_share(rows, _width(run, space), config.cluster, config.pairs)


def _width(run: Run, space: str) -> int:
    return 2 * run.encoder.dim if space == "joint" else run.encoder.dim


def _fit(
    parts: list[Parts], space: str, folder: RunFolder, config: RunConfig, in_flight: InFlight
) -> dict[str, Any]:
    with in_flight.doing(f"the {space} vectors to be gathered", space) as doing:

        def tell(what: str, iterations: int) -> None:
            if iterations != doing.done or what != doing.what:
                doing.now(what)
                doing.reach(iterations)

        fitted = core.fit(*gathered(parts), config.pairs, config.seed, config.cluster, tell)
    return _save(fitted, space, folder)


def _save(fitted: core.Fit, space: str, folder: RunFolder) -> dict[str, Any]:
    """Save centroids; return the record of the fit."""
    folder.save_centroids(space, fitted.centroids)
    few = {"distinct": fitted.distinct} if fitted.distinct < len(fitted.centroids) else {}
    return {"rows": fitted.rows, "objective": fitted.objective, **few}


def _fit_shared_out(
    run: Run,
    parts: list[Parts],
    space: str,
    in_flight: InFlight,
    reach: Callable[[int], object],
) -> dict[str, Any]:
    """Fit a k-means over all nodes on a sample, which is dropped."""
    config = run.config
    work = lloyd.share_out(parts, space, config.pairs, _width(run, space), in_flight)
    fitted = lloyd.fit(work, config.seed, config.cluster, reach)
    parts.clear()
    return _save(fitted, space, run.folder)


def _fit_space(
    parts: list[Parts], space: str, folder: RunFolder, config: RunConfig, in_flight: InFlight
) -> dict[str, Any]:
    """Fit a k-means on a sample, which is dropped: object stores hold none longer than needed."""
    fitted = tasks.run_kmeans(_fit, parts, space, folder, config, in_flight)
    parts.clear()
    return fitted


def _label_shards(run: Run, shards: list[str]) -> np.ndarray:
    """Label all pairs; return how many each cluster has, int64 [spaces, K]."""
    folder, config = run.folder, run.config
    centroids = {space: folder.centroids(space) for space in config.cluster.spaces}
    sizes = np.zeros((len(centroids), config.pairs), np.int64)
    share, counts = pools.products(), run.counts("embed")
    rows, each = counts["images"] + counts["pairs"], max(1, len(shards))
    shard_s = product_seconds(rows / each, config.pairs, run.encoder.dim, share.device)
    done = folder.labelled()
    groups = tasks.groups(
        [(shard, shard in done) for shard in shards], task_count(len(shards), shard_s)
    )
    shared = (run.store, folder, centroids, config.cluster.normalize, share.device)
    with progress_bar("cluster", len(shards), "shards") as bar:
        labelled = tasks.map_in_order(label_shards, groups, *shared, share=share)
        for group, parts in zip(groups, labelled, strict=True):
            for total, (labels, found) in zip(sizes, parts, strict=True):
                total[labels] += found
            bar.update(len(group))
    return sizes


def _spread(size: np.ndarray) -> dict[str, Any]:
    """Return how unlike the sizes of clusters are."""
    return {
        "empty": int((size == 0).sum()),
        "smallest": int(size.min()),
        "median": float(np.median(size)),
        "largest": int(size.max()),
    }
