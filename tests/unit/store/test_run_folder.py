"""The files of a run: what is saved comes back, bit for bit."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from pds_ray.store import schemas
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import vector_array
from pds_ray.store.storage import Folder, StorageError


@pytest.fixture
def run(tmp_path):
    return RunFolder(Folder(str(tmp_path)))


@pytest.mark.parametrize("own", ["distilled/a/thesis.txt", "images/holiday.jpg", "clusters/x"])
def test_what_a_run_would_delete_is_not_taken_from_a_folder_of_the_user(run, tmp_path, own):
    run.check_ours()
    (tmp_path / own).parent.mkdir(parents=True)
    (tmp_path / own).write_text("mine")
    with pytest.raises(StorageError, match=f"no run folder, .* {own.split('/')[0]} in it"):
        run.check_ours()
    run.folder.write_json(run.MANIFEST, {})
    run.check_ours()


def test_centroids(run):
    centroids = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    for modality in schemas.MODALITIES:
        assert not run.has_centroids(modality)
        run.save_centroids(modality, centroids)
        assert run.has_centroids(modality)
        found = run.centroids(modality)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, centroids)


def test_what_is_clustered_already(run):
    assert run.fits() == {}
    assert run.labelled() == set()
    run.save_fits({"made_from": 1})
    assert run.fits() == {"made_from": 1}
    run.save_labels("a.b", np.zeros(2, np.int32), np.ones(2, np.int32))
    assert run.labelled() == {"a.b"}


@pytest.mark.parametrize("rows", [0, 1, 13])
def test_masks_and_labels(run, rows):
    rng = np.random.default_rng(rows)
    kept = rng.random(rows) < 0.5
    image, text = rng.integers(-1, 9, (2, rows)).astype(np.int32)
    run.save_keep("a.b", kept)
    run.save_labels("a.b", image, text)
    assert run.keep("a.b").dtype == bool
    np.testing.assert_array_equal(run.keep("a.b"), kept)
    np.testing.assert_array_equal(run.labels("a.b")[0], image)
    np.testing.assert_array_equal(run.labels("a.b")[1], text)
    assert run.labels("a.b")[0].dtype == np.int32


def test_couples_and_prototypes(run):
    couples = pa.table(
        {
            "image_cluster": [0],
            "text_cluster": [2],
            "shared": [7],
            "pairless": [False],
            "mean_cosine": [math.pi],
        },
        schema=schemas.COUPLE_SCHEMA,
    )
    run.save_couples(couples)
    assert run.couples().equals(couples)
    schema = schemas.prototype_schema(3)
    vector = vector_array(np.arange(3.0)[None])
    values = {field.name: ["x"] if field.type == pa.string() else [1] for field in schema}
    values |= {"image_prototype": vector, "text_prototype": vector, "members": [["s/a", "s/b"]]}
    prototypes = pa.table(values, schema=schema)
    run.save_prototypes(prototypes)
    assert run.prototypes().equals(prototypes)


def test_images_sort_by_pair(run):
    names = [run.image_name(pair) for pair in (0, 9, 10, 99_999, 100_000)]
    assert names == sorted(names)
