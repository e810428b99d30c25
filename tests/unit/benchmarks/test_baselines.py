"""The baselines give the same results as brute force and as the package, on small data."""

from __future__ import annotations

import io
import json
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from benchmarks.baselines import bare_loop, evaluation, pds
from benchmarks.data import write_flickr, write_shards
from pds_ray.config import EmbedConfig, MatchConfig, ProtocolConfig, ReadConfig
from pds_ray.encoders.open_clip import OpenClipEncoder
from pds_ray.sources.base import Sample
from pds_ray.sources.karpathy import KarpathySource
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.stages import assign, match, products, prototypes, prune
from pds_ray.stages.embed import cosine, embed_shard
from pds_ray.stages.trial import TextInput, Trial, TrialData, run_trial
from pds_ray.store.schemas import embeddings
from pds_ray.training import recall as retrieval
from pds_ray.training.data import Gallery, Pixels, TrainingPairs

pytestmark = pytest.mark.long
CLUSTERS, DIM, ROWS = 6, 8, 240


@pytest.fixture
def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return vectors and clusters of both sides. Cluster 5 is empty on one side, 2 on the other."""
    rng = np.random.default_rng(0)
    image_labels = rng.choice([0, 1, 2, 3, 4], ROWS).astype(np.int32)
    text_labels = np.where(rng.random(ROWS) < 0.7, image_labels, rng.choice([0, 1, 3, 4, 5], ROWS))
    text_labels = np.where(text_labels == 2, 0, text_labels).astype(np.int32)
    centres = 3 * rng.standard_normal((2, CLUSTERS, DIM))
    image = centres[0, image_labels] + rng.standard_normal((ROWS, DIM))
    text = centres[1, text_labels] + rng.standard_normal((ROWS, DIM))
    return image.astype(np.float32), text.astype(np.float32), image_labels, text_labels


def test_the_rows_of_lowest_cosine_go(pairs):
    image, text, *_ = pairs
    kept = pds.prune(pds.pair_similarity(image, text), 0.25)
    similarity = 1 - cdist(image, text, "cosine").diagonal()
    assert kept.tolist() == sorted(np.argsort(similarity)[60:].tolist())


def test_pruning_is_that_of_the_package(pairs):
    image, text, *_ = pairs
    similarity = cosine(image, text)
    drop = prune.drop_count(0.2, ROWS)
    high, before = prune.find_bucket(prune.histogram(similarity), drop - 1)
    low, before_low = prune.find_bucket(prune.histogram(similarity, high), drop - 1 - before)
    threshold = prune.Threshold((high << 16) | low, drop - before - before_low)
    assert (
        pds.prune(similarity).tolist()
        == np.flatnonzero(prune.keep_mask(similarity, threshold, 0)).tolist()
    )


def test_the_table_counts_and_keeps_empty_clusters(pairs):
    _, _, image_labels, text_labels = pairs
    table = pds.contingency(image_labels, text_labels, CLUSTERS)
    counted = Counter(zip(image_labels.tolist(), text_labels.tolist(), strict=True))
    assert {(i, j): int(table[i, j]) for i, j in np.ndindex(table.shape) if table[i, j]} == counted
    assert table.shape == (CLUSTERS, CLUSTERS)
    cells, counts = match.count_pairs(image_labels, text_labels, CLUSTERS)
    assert table.ravel()[cells].tolist() == counts.tolist()
    assert table.sum() == counts.sum()


def test_no_assignment_shares_more(pairs):
    _, _, image_labels, text_labels = pairs
    table = pds.contingency(image_labels, text_labels, CLUSTERS)
    total = sum(table[clusters] for clusters in pds.match(table))
    assert total == max(
        sum(table[range(CLUSTERS), columns]) for columns in permutations(range(CLUSTERS))
    )
    counted = match.count_pairs(image_labels, text_labels, CLUSTERS)
    ours, _ = assign.assign_clusters(match.table_of([counted], CLUSTERS))
    assert total == table[range(CLUSTERS), ours].sum()


def test_prototypes_are_those_of_the_package(pairs):
    image, text, image_labels, text_labels = pairs
    counted = match.count_pairs(image_labels, text_labels, CLUSTERS)
    text_of, shared = assign.assign_clusters(match.table_of([counted], CLUSTERS))
    cosines = match.matched_cosines(image_labels, text_labels, cosine(image, text), text_of)
    found = match.matched_clusters(text_of, shared, cosines, CLUSTERS, MatchConfig())
    matches = prototypes.Matches(found["image_cluster"], found["text_cluster"], found["pairless"])
    keys = [str(row) for row in range(ROWS)]
    ours = prototypes.means(
        prototypes.shard_sums(
            prototypes.ShardPairs(
                "s", keys, image, np.arange(len(keys)), text, image_labels, text_labels
            ),
            matches,
            CLUSTERS,
        )
    )
    theirs = pds.prototypes(
        image, text, image_labels, text_labels, list(enumerate(text_of.tolist()))
    )
    assert theirs.matched == [
        (matches.image_cluster[number], matches.text_cluster[number])
        for number in ours.match.tolist()
    ]
    np.testing.assert_allclose(theirs.image, ours.image, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(theirs.text, ours.text, rtol=1e-4, atol=1e-5)


def test_prototypes_average_the_shared_pairs(pairs):
    image, text, image_labels, text_labels = pairs
    found = pds.prototypes(image, text, image_labels, text_labels, [(0, 0), (1, 1), (3, 4)])
    for prototype, words, (i, j) in zip(found.image, found.text, found.matched, strict=True):
        rows = [row for row in range(ROWS) if image_labels[row] == i and text_labels[row] == j]
        np.testing.assert_allclose(
            prototype, sum(image[row] for row in rows) / len(rows), rtol=1e-4, atol=1e-5
        )
        np.testing.assert_allclose(
            words, sum(text[row] for row in rows) / len(rows), rtol=1e-4, atol=1e-5
        )
    cosines = 1 - cdist(found.image, found.text, "cosine").diagonal()
    assert (np.diff(cosines) <= 1e-6).all()


def test_an_empty_match_is_two_centres_in_small_sets_and_nothing_in_large_ones():
    image = np.array([[1.0, 0], [0, 1]], np.float32)
    labels = np.array([0, 1])
    found = pds.prototypes(image, image, labels, labels, [(0, 1), (1, 0)])
    assert sorted(found.image.tolist()) == [[0, 1], [1, 0]]
    assert np.array_equal(found.text, 1 - found.image)
    many = [(0, 0), *((number, number + 1) for number in range(1, 301))]
    assert len(pds.prototypes(image, image, labels, labels, many).matched) == 1


def test_the_nearest_caption_is_that_of_the_package(pairs):
    image, text, *_ = pairs
    queries = image[:20]
    expected = cdist(queries, text, "cosine").argmin(axis=1).tolist()
    assert pds.nearest_captions(queries, text).tolist() == expected
    assert products.nearest_rows(queries, text)[1].tolist() == expected


def test_mini_batch_kmeans_gives_labels_of_its_centroids(pairs):
    image, *_ = pairs
    centroids, labels = pds.cluster(image, 4)
    assert labels.tolist() == cdist(image, centroids).argmin(axis=1).tolist()
    assert products.assign(image, centroids.astype(np.float32)).tolist() == labels.tolist()


@pytest.mark.parametrize("seed", range(5))
def test_recalls_are_counted_ranks_and_those_of_the_package(seed):
    """Products of small integers are exact in any order; the earlier of equal scores is first."""
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(150), rng.integers(1, 7, 150))
    image = rng.integers(-9, 10, (150, 6))
    text = image[owner] + rng.integers(-6, 7, (len(owner), 6))
    scores = image @ text.T
    places = np.arange(len(owner))

    def rank(scores: np.ndarray, own: int) -> int:
        before = np.arange(len(scores)) < own
        return int((scores > scores[own]).sum() + ((scores == scores[own]) & before).sum())

    of_images = [min(rank(scores[row], own) for own in places[owner == row]) for row in range(150)]
    of_captions = [rank(scores[:, place], owner[place]) for place in places]
    both = torch.from_numpy(image.astype(np.float32)), torch.from_numpy(text.astype(np.float32))
    found = evaluation.recalls(*both, owner, kind="stable")
    for k in (1, 5, 10):
        assert found[f"tr@{k}"] == pytest.approx(100 * np.mean(np.array(of_images) < k))
        assert found[f"ir@{k}"] == pytest.approx(100 * np.mean(np.array(of_captions) < k))
    assert found == pytest.approx(retrieval.recalls(*both, torch.from_numpy(owner)))


def test_without_equal_scores_any_sort_will_do():
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(150), 4)
    image = rng.standard_normal((150, 6)).astype(np.float32)
    text = (image[owner] + rng.standard_normal((600, 6))).astype(np.float32)
    both = torch.from_numpy(image), torch.from_numpy(text)
    assert evaluation.recalls(*both, owner) == pytest.approx(
        retrieval.recalls(*both, torch.from_numpy(owner))
    )


def test_a_gallery_below_128_is_no_trouble():
    unit = torch.eye(3)
    assert set(evaluation.recalls(unit, unit, np.arange(3)).values()) == {100.0}


def test_an_epoch_with_features_recomputed_gives_the_recalls_of_features_kept():
    """With a frozen backbone nothing changes between epochs."""
    from pds_ray.backbones import small

    info = small.describe("small_mixer")
    draw = torch.Generator().manual_seed(0)

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=draw)

    pairs = TrainingPairs(images(10), torch.randn(10, 12, generator=draw))
    owner = torch.arange(12).repeat_interleave(2)
    test = Gallery(images(12), torch.randn(24, 12, generator=draw), owner)
    protocol = ProtocolConfig(
        train="text_head",
        augment=False,
        epochs=7,
        batch_size=4,
        evaluate_every=3,
        select="test",
        sampling="independent",
    )
    trial = Trial("", "", info, 16, 3, protocol, TextInput("captions", "", "basic"), 10)
    ours = run_trial(trial, TrialData(pairs, None, test), small.build)
    torch.manual_seed(3)
    backbone = small.build(info, 16)
    theirs = evaluation.train_on_frozen(
        backbone, 64, pairs, test, Pixels(info.mean, info.std), protocol, 3
    )
    assert theirs == pytest.approx(ours["recalls"])


def _jpegs(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    encoded = []
    for number in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 32 + number, 3), np.uint8)).save(file, "PNG")
        encoded.append(file.getvalue())
    return encoded


@pytest.fixture
def flickr(tmp_path: Path) -> Path:
    captions = [
        ["a red dog", "a dog that runs"],
        ["b", "a long caption of many words about nothing at all", "c"],
        ["d"],
    ]
    assert write_flickr(zip(_jpegs(3), captions, strict=True), tmp_path) == 3
    return tmp_path


def test_flickr_folders_are_read_by_the_package(flickr):
    source = KarpathySource(f"flickr30k:{flickr}")
    samples = [sample for shard in source.shards() for sample in source.read(shard)]
    assert [isinstance(sample, Sample) and len(sample.captions) for sample in samples] == [2, 3, 1]
    paths, captions = pds.expand_pairs(flickr)
    assert [path.name for path in paths] == [f"{number:07d}.jpg" for number in (0, 0, 1, 1, 1, 2)]
    assert captions == [caption for sample in samples for caption in sample.captions]


def test_embedding_once_a_caption_gives_the_embeddings_of_once_an_image(
    flickr, clip: OpenClipEncoder, clip_info
):
    source = KarpathySource(f"flickr30k:{flickr}")
    config = EmbedConfig(store_dtype="float32", batch_size=16)
    (shard,) = source.shards()
    images, captions, _ = embed_shard(
        source, shard, clip, clip_info.preprocess, ReadConfig(), config
    )
    preprocess = open_clip.image_transform(32, is_train=False)
    paths, texts = pds.expand_pairs(flickr)
    image = pds.embed_images(paths, clip.model, preprocess, workers=0)
    rows = captions.column("image_row").to_numpy()
    np.testing.assert_allclose(image, embeddings(images)[rows], rtol=1e-3, atol=1e-4)
    text = pds.embed_captions(texts, clip.model, clip.tokenizer)
    np.testing.assert_allclose(text, embeddings(captions), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("encode_captions", [bare_loop.encode_cut, open_clip.CLIP.encode_text])
def test_the_bare_loop_gives_the_embeddings_of_the_package(
    tmp_path, clip: OpenClipEncoder, clip_folder, clip_info, encode_captions
):
    captions = [["a red dog", "a dog"], ["b " * 30], ["c " * 200, "d " * 14, "e " * 15]]
    metadata = [json.dumps({"captions": some}).encode() for some in captions]
    samples = [
        {"jpg": image, "json": words} for image, words in zip(_jpegs(3), metadata, strict=True)
    ]
    shards = write_shards(samples, tmp_path / "shards", per_shard=2)
    out = tmp_path / "found.npz"
    found = bare_loop.embed(
        shards, f"local-dir:{clip_folder}", bare_loop.Tuning(2, 1, 0), encode_captions, out
    )
    assert (found["images"], found["pairs"]) == (3, 6)
    source = WebDatasetSource(" ".join(shards))
    config = EmbedConfig(store_dtype="float32", batch_size=16)
    tables = [
        embed_shard(source, shard, clip, clip_info.preprocess, ReadConfig(), config)
        for shard in source.shards()
    ]
    with np.load(out) as theirs:
        assert theirs["captions"].tolist() == [2, 1, 3]
        for name, side in (("image", 0), ("text", 1)):
            mine = np.concatenate([embeddings(shard[side]) for shard in tables])
            np.testing.assert_allclose(theirs[name].astype(np.float32), mine, rtol=5e-3, atol=5e-3)
