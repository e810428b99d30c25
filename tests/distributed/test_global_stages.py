"""Prune to prototypes on Ray, against brute force on the gathered arrays."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from pds_ray.config import ClusterConfig, MatchConfig, RunConfig, replace
from pds_ray.decoders.base import DecoderInfo
from pds_ray.distributed import (
    cluster,
    match,
    materialize,
    nearest,
    prototypes,
    prune,
    tasks,
)
from pds_ray.distributed.cluster import sampled
from pds_ray.distributed.tasks import map_in_order
from pds_ray.stages import assign
from pds_ray.stages.embed import cosine
from pds_ray.stages.match import NO_CELLS, Table, count_pairs, table_of
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import MEMBER_SAMPLE, vectors
from pds_ray.store.storage import Folder
from tests.support.stage_run import do, stage_run
from tests.support.synthetic_store import Gathered, make_store

pytestmark = pytest.mark.ray
CLUSTERS, DIM = 9, 8
CONFIG = RunConfig(
    pairs=CLUSTERS, cluster=ClusterConfig(iterations=5), match=MatchConfig(pairless="drop")
)


def pair_labels(run: RunFolder, data: Gathered) -> tuple[np.ndarray, np.ndarray]:
    """Return the image and the text cluster of all pairs."""
    labels = [run.labels(shard) for shard in data.shards]
    return np.concatenate([pair[0] for pair in labels]), np.concatenate(
        [pair[1] for pair in labels]
    )


def run_stages(
    folder: Path, rows_per_shard: list[int], config: RunConfig = CONFIG, **data_of: Any
) -> tuple[RunFolder, Gathered, dict]:
    store, data = make_store(folder / "store", rows_per_shard, **data_of)
    run = RunFolder(Folder(str(folder / "run")))
    stages = ("prune", "cluster", "match", "prototypes")
    counts = do(stage_run(store, run, config, DIM), *stages)
    return run, data, {**counts.pop("prune"), **counts}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Gathered, dict]:
    return run_stages(tmp_path_factory.mktemp("stages"), [40, 1, 120, 39])


def test_prune_drops_exactly_the_lowest(finished: tuple[RunFolder, Gathered, dict]) -> None:
    run, data, counts = finished
    kept = np.concatenate([run.keep(shard) for shard in data.shards])
    drop = int(0.2 * len(data.keys))
    assert counts["dropped"] == drop
    expected = np.ones(len(data.keys), bool)
    expected[np.argsort(data.similarity, kind="stable")[:drop]] = False
    np.testing.assert_array_equal(kept, expected)


def test_labels_are_nearest_centroids(finished: tuple[RunFolder, Gathered, dict]) -> None:
    run, data, _ = finished
    kept = np.concatenate([run.keep(shard) for shard in data.shards])
    image, text = pair_labels(run, data)
    for modality, rows, found in (("image", data.image, image), ("text", data.text, text)):
        distances = ((rows[:, None] - run.centroids(modality)[None]) ** 2).sum(axis=2)
        np.testing.assert_array_equal(found[kept], distances.argmin(axis=1)[kept])
        assert (found[~kept] == -1).all()


def test_training_vectors_are_weighted_images(tmp_path: Path) -> None:
    store, data = make_store(tmp_path / "store", [30, 20])
    run = RunFolder(Folder(str(tmp_path / "run")))
    do(stage_run(store, run, replace(CONFIG, {"prune.ratio": 0.3})), "prune")
    kept = np.concatenate([run.keep(shard) for shard in data.shards])
    rows, weights = sampled(data.shards, "image", store, run, 1.0, CONFIG)
    copies = data.image[kept]  # the authors' way: an image once per kept caption
    assert weights.sum() == len(copies)
    np.testing.assert_allclose((rows * weights[:, None]).sum(axis=0), copies.sum(axis=0), rtol=1e-5)
    assert len(rows) == len({data.keys[pair] for pair in np.flatnonzero(kept)})


def test_matches_are_a_best_assignment(finished: tuple[RunFolder, Gathered, dict]) -> None:
    run, data, counts = finished
    image, text = pair_labels(run, data)
    table = np.zeros((CLUSTERS, CLUSTERS), np.int64)
    np.add.at(table, (image[image >= 0], text[image >= 0]), 1)
    best = table[linear_sum_assignment(-table)].sum()
    couples = run.couples().to_pydict()
    assert sum(couples["shared"]) == best == counts["match"]["shared_pairs"]
    for i, j, shared, mean in zip(
        couples["image_cluster"],
        couples["text_cluster"],
        couples["shared"],
        couples["mean_cosine"],
        strict=True,
    ):
        assert table[i, j] == shared > 0
        assert mean == pytest.approx(data.similarity[(image == i) & (text == j)].mean(), rel=1e-5)


@pytest.mark.parametrize("count", [1, 4])
def test_a_core_of_a_large_table_grows_in_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """However many ranges, with the answer of one in this process; the table itself stays away."""
    monkeypatch.setattr(match, "table_ranges", lambda *_: count)
    monkeypatch.setattr(assign, "CORE_LIMIT", 0)  # a cell per image cluster each time
    solved = []

    def solve(core: Table, graph: Any = assign._graph) -> Any:
        solved.append(core.cells)
        return graph(core)

    monkeypatch.setattr(assign, "_graph", solve)
    config = replace(CONFIG, {"match.solver": "sparse"})
    run, data, counts = run_stages(tmp_path, [40, 1, 120, 39], config)
    image, text = pair_labels(run, data)
    table = np.zeros((CLUSTERS, CLUSTERS), np.int64)
    np.add.at(table, (image[image >= 0], text[image >= 0]), 1)
    assert len(solved) > 1, "the core of heavy cells must not be enough"
    assert solved[-1] < counts["match"]["cells"] == (table > 0).sum()
    best = table[linear_sum_assignment(-table)].sum()
    assert counts["match"]["shared_pairs"] == best

    whole, cores = count_pairs(image, text, CLUSTERS), [NO_CELLS]

    def grow(prices: assign.Prices, most: int) -> Table:
        cores.append(assign.grown(cores[-1], whole, prices, most))
        return table_of(cores[-1:], CLUSTERS)

    text_of, _ = assign.assign_by_core(CLUSTERS, grow)
    couples = run.couples().to_pydict()
    assert couples["text_cluster"] == text_of[couples["image_cluster"]].tolist()


def test_prototypes_are_means_of_shared_pairs(finished: tuple[RunFolder, Gathered, dict]) -> None:
    run, data, _ = finished
    image, text = pair_labels(run, data)
    table = run.prototypes()
    rows = table.to_pylist()
    assert all(a["cosine"] >= b["cosine"] for a, b in pairwise(rows))
    for row, image_prototype, text_prototype in zip(
        rows, vectors(table, "image_prototype"), vectors(table, "text_prototype"), strict=True
    ):
        shared = (image == row["image_cluster"]) & (text == row["text_cluster"])
        np.testing.assert_allclose(
            image_prototype, data.image[shared].mean(axis=0), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            text_prototype, data.text[shared].mean(axis=0), rtol=1e-4, atol=1e-6
        )
        assert row["shared"] == shared.sum()
        similarity = (
            (data.text @ text_prototype)
            / np.linalg.norm(data.text, axis=1)
            / np.linalg.norm(text_prototype)
        )
        best = int(similarity.argmax())  # over all captions, pruned ones too
        assert (row["caption"], row["caption_key"]) == (data.captions[best], data.keys[best])
        assert row["caption_cosine"] == pytest.approx(similarity[best], abs=1e-5)
        similarity = (
            (data.image @ image_prototype)
            / np.linalg.norm(data.image, axis=1)
            / np.linalg.norm(image_prototype)
        )
        assert row["nearest_key"] == data.keys[int(similarity.argmax())]


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_cutting_the_data_in_other_shards_changes_nothing(
    finished: tuple[RunFolder, Gathered, dict], tmp_path: Path, solver: str
) -> None:
    config = RunConfig(
        pairs=CLUSTERS, cluster=CONFIG.cluster, match=MatchConfig(pairless="drop", solver=solver)
    )
    other, _, _ = run_stages(tmp_path, [200], config)
    columns = ["cosine", "shared", "caption", "nearest_key", "image_cluster"]
    whole, cut = (
        other.prototypes().select(columns).to_pydict(),
        finished[0].prototypes().select(columns).to_pydict(),
    )
    np.testing.assert_allclose(whole.pop("cosine"), cut.pop("cosine"), rtol=1e-9)
    assert whole == cut


@pytest.mark.parametrize("count", [1, 2])
def test_shards_of_one_task_find_the_same(
    finished: tuple[RunFolder, Gathered, dict],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
) -> None:
    """Each shard is a task of its own in `finished`; here all four are one, or two are."""
    for module in (prune, cluster, match, prototypes, nearest):
        name = "sum_task_count" if module is prototypes else "task_count"
        monkeypatch.setattr(module, name, lambda *_: count)
    answers = []

    def counted(function: Any, *args: Any, **share: Any) -> Iterator[Any]:
        for answer in map_in_order(function, *args, **share):
            answers.append(function)
            yield answer

    monkeypatch.setattr(tasks, "map_in_order", counted)
    run, _, counts = finished
    other, _, found = run_stages(tmp_path, [40, 1, 120, 39])
    assert found == counts
    assert contents(other) == contents(run)
    assert answers.count(nearest.search_shards) == count, "captions and images in one pass"
    assert answers.count(prune.write_masks) == answers.count(cluster.label_shards) == count


def contents(run: RunFolder) -> dict[str, bytes]:
    root = Path(run.folder.path)
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def clustered_rows(modality: str, data: Gathered) -> np.ndarray:
    """Return what a single k-means is fitted on, one row per pair."""
    if modality == "joint":
        sides = [
            rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (data.image, data.text)
        ]
        return np.concatenate(sides, axis=1) / np.sqrt(2)
    return {"image": data.image, "text": data.text}[modality]


@pytest.mark.parametrize("modality", ["joint", "image", "text"])
def test_one_kmeans_alone_labels_both_sides(tmp_path: Path, modality: str) -> None:
    fit = ClusterConfig(modality=modality, iterations=100, tolerance=0)
    config = RunConfig(pairs=CLUSTERS, cluster=fit, match=CONFIG.match)
    run, data, counts = run_stages(tmp_path, [40, 1, 120, 39], config)
    kept = np.concatenate([run.keep(shard) for shard in data.shards])
    image, text = pair_labels(run, data)
    np.testing.assert_array_equal(image, text)
    np.testing.assert_array_equal(image == -1, ~kept)
    assert run.clusters.names(".safetensors") == [f"{modality}.safetensors"]
    centroids, rows = run.centroids(modality), clustered_rows(modality, data)
    assert centroids.shape == (CLUSTERS, rows.shape[1])
    distances = ((rows[:, None] - centroids[None]) ** 2).sum(axis=2)
    np.testing.assert_array_equal(image[kept], distances.argmin(axis=1)[kept])
    sizes = np.bincount(image[kept], minlength=CLUSTERS)
    assert list(counts["cluster"]) == [modality]
    assert counts["cluster"][modality]["smallest"] == sizes.min() > 0
    for label in range(CLUSTERS):  # run to convergence, an image counts once per kept caption
        np.testing.assert_allclose(
            centroids[label], rows[image == label].mean(axis=0), rtol=1e-4, atol=1e-5
        )
    if modality == "image":
        of_image = {(data.keys[pair], image[pair]) for pair in np.flatnonzero(kept)}
        assert len(of_image) == len({key for key, _ in of_image})

    couples = run.couples().to_pydict()
    assert couples["image_cluster"] == couples["text_cluster"] == list(range(CLUSTERS))
    assert couples["shared"] == sizes.tolist()
    table = run.prototypes()
    for row, found_image, found_text in zip(
        table.to_pylist(),
        vectors(table, "image_prototype"),
        vectors(table, "text_prototype"),
        strict=True,
    ):
        mine = image == row["image_cluster"]
        np.testing.assert_allclose(found_image, data.image[mine].mean(axis=0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(found_text, data.text[mine].mean(axis=0), rtol=1e-4, atol=1e-6)


def test_joint_rows_are_drawn_by_their_double_width(tmp_path: Path) -> None:
    """The budget is 400 vectors of width 2d; a shard's rows do not depend on other shards."""
    store, data = make_store(tmp_path / "store", [300, 300])
    run = RunFolder(Folder(str(tmp_path / "run")))
    counts = do(stage_run(store, run, CONFIG), "prune")["prune"]
    assert counts["kept"] > 800, "without the double width, all would fit"
    budget = ClusterConfig(modality="joint", memory_gib=400 * 2 * 4 * 2 * DIM / 2**30)
    config = RunConfig(pairs=5, cluster=budget)
    run.save_centroids("image", np.zeros((5, DIM), np.float32))
    run.save_labels("left over", np.zeros(1, np.int32), np.zeros(1, np.int32))
    on = stage_run(store, run, config, DIM)
    on.manifest.stages["prune"] = {"counts": counts}
    found = [do(on, "cluster")["cluster"]["joint"] for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["rows"] == pytest.approx(400, rel=0.2)
    assert run.clusters.names(".safetensors") == ["joint.safetensors"], (
        "what a run before it left is gone"
    )
    assert run.labelled() == set(data.shards)

    rows, weights = sampled(data.shards, "joint", store, run, 0.4, CONFIG)
    alone = [sampled([shard], "joint", store, run, 0.4, CONFIG)[0] for shard in data.shards]
    np.testing.assert_array_equal(rows, np.concatenate(alone))
    assert (weights == 1).all()
    kept = np.concatenate([run.keep(shard) for shard in data.shards])
    distances = np.abs(rows[:, None] - clustered_rows("joint", data)[None]).max(axis=2)
    assert (distances.min(axis=1) < 1e-6).all()
    assert kept[distances.argmin(axis=1)].all()


def test_without_filter_prototypes_are_means_of_whole_clusters(
    finished: tuple[RunFolder, Gathered, dict], tmp_path: Path
) -> None:
    match_config = MatchConfig(pairless="drop", filter=False)
    run, data, _ = run_stages(
        tmp_path,
        [40, 1, 120, 39],
        RunConfig(pairs=CLUSTERS, cluster=CONFIG.cluster, match=match_config),
    )
    assert run.couples().equals(finished[0].couples())
    image, text = pair_labels(run, data)
    table = run.prototypes()
    whole = 0
    for row, found_image, found_text in zip(
        table.to_pylist(),
        vectors(table, "image_prototype"),
        vectors(table, "text_prototype"),
        strict=True,
    ):
        on_image, on_text = image == row["image_cluster"], text == row["text_cluster"]
        np.testing.assert_allclose(
            found_image, data.image[on_image].mean(axis=0), rtol=1e-4, atol=1e-6
        )
        np.testing.assert_allclose(
            found_text, data.text[on_text].mean(axis=0), rtol=1e-4, atol=1e-6
        )
        assert row["shared"] == (on_image & on_text).sum()
        norms = np.linalg.norm(data.image[on_image], axis=1)
        assert row["member_norm"] == pytest.approx(norms.mean(), rel=1e-5)
        whole += on_image.sum() > row["shared"] or on_text.sum() > row["shared"]
    assert whole > 0, "some match must have pairs that it does not share"


@pytest.mark.parametrize(
    ("modality", "filtered", "center"),
    [("separate", True, "mean"), ("separate", False, "medoid"), ("joint", True, "medoid")],
)
def test_matches_of_empty_clusters_are_left_out(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    modality: str,
    filtered: bool,
    center: str,
) -> None:
    """More clusters than different vectors: matches without any pair lie between the others."""
    monkeypatch.setattr(prototypes, "match_ranges", lambda *_: 2)
    changes = {
        "cluster.modality": modality,
        "match.pairless": "keep",
        "match.filter": filtered,
        "prototypes.center": center,
    }
    sizes = [20, 1, 9]
    run, data, counts = run_stages(tmp_path, sizes, replace(CONFIG, changes), distinct=(3, 6))
    image, text = pair_labels(run, data)
    shard = np.searchsorted(np.cumsum(sizes), [int(key[1:]) for key in data.keys], side="right")
    expected, untouched = {}, 0
    for couple in run.couples().to_pylist():
        on_image, on_text = image == couple["image_cluster"], text == couple["text_cluster"]
        untouched += not on_image.any() and not on_text.any()
        if filtered and (on_image & on_text).any():
            on_image = on_text = on_image & on_text
        if on_image.any() and on_text.any():
            expected[couple["image_cluster"]] = on_image, on_text
    assert untouched, "some match must have no pair on either side"
    table = run.prototypes()
    assert sorted(table.column("image_cluster").to_pylist()) == sorted(expected)
    assert counts["match"]["couples"] == CLUSTERS
    assert counts["prototypes"]["empty_couples"] == CLUSTERS - len(expected)
    assert f"{CLUSTERS - len(expected)} matches have an empty" in counts["prototypes"]["fewer"]
    for row, *found in zip(
        table.to_pylist(),
        vectors(table, "image_prototype"),
        vectors(table, "text_prototype"),
        strict=True,
    ):
        on_image, on_text = expected[row["image_cluster"]]
        centers = data.image[on_image].mean(axis=0), data.text[on_text].mean(axis=0)
        if center == "medoid":
            pairs = np.flatnonzero(on_image | on_text)
            near = cosine(data.image, centers[0][None]) + cosine(data.text, centers[1][None])
            best = pairs[near[pairs].argmax()]
            centers = data.image[best], data.text[best]
        for own, mean in zip(found, centers, strict=True):
            np.testing.assert_allclose(own, mean, rtol=1e-4, atol=1e-6)
        norms = np.linalg.norm(data.image[on_image], axis=1)
        assert row["member_norm"] == pytest.approx(norms.mean(), rel=1e-5)
        first = np.flatnonzero(on_image)[: len(row["members"])]
        assert len(first) == min(MEMBER_SAMPLE, on_image.sum())
        assert row["members"] == [f"{data.shards[shard[n]]}/{data.keys[n]}" for n in first]


def test_further_captions_and_soft_targets(finished: tuple[RunFolder, Gathered, dict]) -> None:
    """Made images have those of members, real ones their own; counted for targets."""
    folder, data, _ = finished
    store = EmbeddingStore(Folder(f"{folder.folder.path}/../store"))
    config = replace(CONFIG, {"extras.captions": 3, "extras.similarity": "table"})
    table = folder.prototypes()
    own = table.column("caption").to_pylist()
    folder.save_captions(table.select(["pair", "caption"]))
    made = DecoderInfo("made", DIM, "made")
    run = stage_run(store, folder, config, DIM, decoder=made)
    image, text = pair_labels(folder, data)
    unit = data.text / np.linalg.norm(data.text, axis=1, keepdims=True)
    clusters = [table.column(f"{side}_cluster").to_numpy() for side in ("image", "text")]
    for pair, found in enumerate(materialize._captions(run)):
        members = np.flatnonzero((image == clusters[0][pair]) & (text == clusters[1][pair]))
        cosine = unit[members] @ vectors(table, "text_prototype")[pair]
        best = [data.captions[row] for row in members[np.argsort(-cosine, kind="stable")]]
        assert found == [caption for caption in best if caption != own[pair]][:3]
    kept = np.concatenate([folder.keep(shard) for shard in data.shards])
    keys = table.column("nearest_key").to_pylist()
    real = stage_run(store, folder, config, DIM)
    for pair, found in enumerate(materialize._captions(real)):
        mine = [row for row in np.flatnonzero(kept) if data.keys[row] == keys[pair]]
        best = [data.captions[row] for row in sorted(mine, key=lambda r: -data.similarity[r])]
        assert found == [caption for caption in best if caption != own[pair]][:3]
    fallen_back = replace(config, {"decode.real_fallback": True})
    for pair in range(len(own)):
        scores = dict.fromkeys(("image_cosine", "text_cosine", "score"), 0.5)
        origin = {"pair": pair, "origin": "synthetic" if pair % 2 else "real"}
        folder.save_choice({**origin, "candidate": 0, "noise_level": 0, **scores})
    folder.gather_choices(len(own))
    mixed = materialize._captions(stage_run(store, folder, fallen_back, DIM, decoder=made))
    of_both = [materialize._captions(real), materialize._captions(run)]
    assert mixed == [of_both[pair % 2][pair] for pair in range(len(own))], "each as its image"
    shared = [[sum((image == i) & (text == j)) for j in clusters[1]] for i in clusters[0]]
    expected = np.array(shared) / np.sum(shared, axis=1, keepdims=True)
    share = config.extras.share
    np.testing.assert_allclose(
        materialize._similarity(run), (1 - share) * np.eye(len(own)) + share * expected, atol=1e-6
    )
