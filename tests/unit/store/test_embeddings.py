"""The embedding store: a shard is there exactly if its marker is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pds_ray.store import schemas
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import embedding_array
from pds_ray.store.storage import Folder


def tables(dim=3, dtype="float16", rows=4):
    embedding = np.random.default_rng(0).standard_normal((rows, dim))
    keys = [f"k{i}" for i in range(rows)]
    numbers = np.arange(rows, dtype=np.int32)
    images = pa.table(
        {
            "key": keys,
            "index": numbers,
            "embedding": embedding_array(embedding, dtype),
            "width": numbers,
            "height": numbers,
        },
        schema=schemas.image_schema(dim, dtype),
    )
    captions = pa.table(
        {
            "key": keys,
            "image_row": numbers,
            "caption_index": numbers,
            "caption": ["", "ü|\n", "x" * 3000, "a"][:rows],
            "embedding": embedding_array(-embedding, dtype),
            "similarity": embedding[:, 0].astype(np.float32),
        },
        schema=schemas.caption_schema(dim, dtype),
    )
    errors = pa.table(
        {"key": ["e"], "reason": ["not_a_tar"], "detail": [""]}, schema=schemas.ERROR_SCHEMA
    )
    return images, captions, errors


COUNTS = {"images": 4, "pairs": 4, "bad": 1, "reasons": {"not_a_tar": 1}, "precision": "fp32"}


def test_a_shard_is_there_when_its_marker_is(tmp_path, monkeypatch):
    store = EmbeddingStore(Folder(str(tmp_path)))
    images, captions, errors = tables()

    def dies(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_json", dies)
        with pytest.raises(KeyboardInterrupt):
            store.commit("s0", images, captions, errors, COUNTS)
    assert store.committed() == {}

    store.folder.write_json(store.STORE, {})
    store.commit("s0", images, captions, errors, COUNTS)
    store.commit("s1.x-y_z", *(table.slice(0, 0) for table in (images, captions, errors)), COUNTS)
    assert store.committed().keys() == {"s0", "s1.x-y_z"}
    assert EmbeddingStore(store.folder, "of other data").committed() == {}, (
        "markers of another fingerprint count"
    )
    assert store.images("s0").equals(images, check_metadata=True)
    assert store.captions("s0").equals(captions, check_metadata=True)
    assert store.errors("s0").equals(errors)
    assert store.captions("s0", ["key"]).column_names == ["key"]
    assert store.images("s1.x-y_z").schema.equals(images.schema, check_metadata=True)

    marker = store.committed()["s0"]
    assert marker["images"] == 4
    assert len(marker["sha256"]) == 3
    for name, digest in marker["sha256"].items():
        assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest


def test_shards_as_another_version_wrote_them_are_not_there(tmp_path):
    store = EmbeddingStore(Folder(str(tmp_path)))
    for name in ("old", "mine"):
        store.commit(name, *tables(), COUNTS)
    marker = store.folder.read_json("old.json")
    store.folder.write_json("old.json", {**marker, "schema": marker["schema"] - 1})
    assert store.committed().keys() == {"mine"}
    del marker["schema"]
    store.folder.write_json("old.json", marker)
    assert store.committed().keys() == {"mine"}


class Killed(BaseException):
    """As by SIGKILL: nobody cleans up behind it."""


def whole(store):
    """The shards that are there; each with the very files that its marker means."""
    there = store.committed()
    for marker in there.values():
        for name, digest in marker["sha256"].items():
            assert (
                hashlib.sha256((Path(store.folder.path) / name).read_bytes()).hexdigest() == digest
            )
    return there


def kill_at(step, after, patch):
    """The process dies before or after the given change of files."""
    steps = iter(range(100))

    def dying(method):
        def call(*args):
            mine = next(steps) == step
            if mine and not after:
                raise Killed
            found = method(*args)
            if mine:
                raise Killed
            return found

        return call

    for name in ("delete", "write_bytes", "write_table"):
        patch.setattr(Folder, name, dying(getattr(Folder, name)))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "step", range(6)
)  # the marker away, three files, the marker, the note of failure away
def test_a_shard_that_is_committed_again_is_never_a_mixture(tmp_path, monkeypatch, step, after):
    """Killed at any step it is as it was, as it is to be, or not there; a repetition mends it."""
    store = EmbeddingStore(Folder(str(tmp_path)))
    old, new = tables(), tables(rows=3)
    store.commit("s0", *old, COUNTS)
    store.fail("s0", "to be tried again")
    with monkeypatch.context() as patch:
        kill_at(step, after, patch)
        with pytest.raises(Killed):
            store.commit("s0", *new, COUNTS)
    assert bool(whole(store)) == (step + after in (0, 5, 6))
    if whole(store):
        assert store.images("s0").equals((new if step else old)[0])
    store.commit("s0", *new, COUNTS)
    assert whole(store).keys() == {"s0"}
    assert store.images("s0").equals(new[0])
    assert store.failed() == {}
