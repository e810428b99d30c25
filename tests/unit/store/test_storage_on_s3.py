"""Folders on an S3 server behind a network that fails; boto3 shows what the store really holds."""

from __future__ import annotations

import hashlib
import json
import random
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from pds_ray.store import calls, storage
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder, StorageError
from tests.support.object_store import BUCKET, KEY, SECRET, Faults, client, objects, proxy, uri

pytestmark = pytest.mark.usefixtures("s3_login")


@pytest.fixture
def place(request):
    """A path in the bucket that is this test's own."""
    return request.node.name.replace("[", "-").rstrip("]")


@pytest.fixture
def unretried(monkeypatch):
    """Retries nothing: the client itself retries for six seconds."""
    monkeypatch.setattr(calls, "WAITS_S", ())


def test_what_is_written_is_there(s3_port, place):
    folder = Folder(uri(s3_port, place)) / "a"
    folder.create()
    assert objects(s3_port, place) == {}  # nothing of the trial
    folder.write_bytes("x.bin", b"\x00one")
    folder.write_bytes("empty", b"")
    folder.write_json("y.json", {"ü": [1]})
    folder.write_table("t.parquet", pa.table({"n": [1, 2]}))
    there = objects(s3_port, place)
    assert there.keys() == {"a/x.bin", "a/empty", "a/y.json", "a/t.parquet"}
    assert (there["a/x.bin"], there["a/empty"], json.loads(there["a/y.json"])) == (
        b"\x00one",
        b"",
        {"ü": [1]},
    )
    assert folder.read_bytes("x.bin") == b"\x00one"
    assert folder.read_bytes("empty") == b""
    assert folder.read_table("t.parquet", ["n"]).to_pydict() == {"n": [1, 2]}
    assert folder.names() == ["empty", "t.parquet", "x.bin", "y.json"]
    assert folder.exists("empty")
    folder.delete("x.bin")
    folder.delete("x.bin")
    assert not folder.exists("x.bin")
    Folder(uri(s3_port, place)).delete_all()
    Folder(uri(s3_port, place)).delete_all()
    assert objects(s3_port, place) == {}
    assert folder.names() == []


def test_a_network_that_fails_changes_nothing(s3_port, place, monkeypatch):
    """Every fault at a fifth of the requests; both we and boto3 read what was written."""
    # threads decide which request is struck: with so many tries hardly any order fails one
    monkeypatch.setattr(calls, "WAITS_S", (0.05,) * 9)
    faults = Faults(
        seed=7, errors=0.2, cut_downloads=0.2, cut_uploads=0.2, delayed=0.2, delay_s=0.05
    )
    draw = random.Random(1)
    written = {
        f"{number:02d}": draw.randbytes(draw.choice([0, 1, 1000, 300_000])) for number in range(6)
    }
    # at once: nearly all of the time is spent in waits before retries
    with proxy(s3_port, faults) as port, ThreadPoolExecutor(len(written)) as threads:
        folder = Folder(uri(port, place))
        list(threads.map(folder.write_bytes, written, written.values()))
        read = dict(zip(written, threads.map(folder.read_bytes, written), strict=True))
    assert faults.struck > len(written)
    assert read == written
    assert objects(s3_port, place) == written


@pytest.mark.usefixtures("unretried")
def test_a_write_that_cannot_be_done_leaves_what_was_there(s3_port, place):
    Folder(uri(s3_port, place)).write_bytes("old", b"whole")
    with (
        proxy(s3_port, Faults(cut_uploads=1.0)) as port,
        pytest.raises(StorageError, match="the object store fails at s3://bucket/"),
    ):
        Folder(uri(port, place)).write_bytes("old", b"x" * 100_000)
    assert objects(s3_port, place) == {"old": b"whole"}


@pytest.mark.usefixtures("unretried")
def test_a_store_that_goes_on_failing_is_one_line_without_secrets(s3_port, place):
    login = f"{KEY}:{SECRET.replace('/', '%2F').replace('+', '%2B')}@"
    with proxy(s3_port, Faults(errors=1.0)) as port:
        folder = Folder(uri(port, place, login))
        with pytest.raises(StorageError) as caught:
            folder.names()
    assert str(caught.value).startswith(f"the object store fails at {uri(port, place)} (")
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    assert SECRET[:12] not in str(caught.value)
    assert KEY not in repr([folder, EmbeddingStore(folder)])


def test_an_object_that_is_missing_is_asked_for_once(s3_port, place):
    faults = Faults()
    with proxy(s3_port, faults) as port, pytest.raises(FileNotFoundError):
        Folder(uri(port, place)).read_bytes("never")
    assert len(faults.requests) == len(set(faults.requests))


def test_a_bucket_that_is_not_there_is_said_at_once(s3_port):
    with pytest.raises(StorageError, match="Bucket 'nobucket' not found"):
        Folder(uri(s3_port, "x").replace(f"//{BUCKET}/", "//nobucket/")).create()


def test_markers_are_read_together_and_a_damaged_one_is_none(s3_port, place, tmp_path):
    store = EmbeddingStore(Folder(str(tmp_path)), "mine")
    tables = [pa.table({"n": [1]})] * 3
    rest = {"pairs": 1, "bad": 0, "reasons": {}, "precision": "fp32"}
    for number in range(40):
        store.commit(f"s{number:02d}", *tables, {"images": number, **rest})
    markers = {path.stem: path.read_bytes() for path in tmp_path.glob("*.json")}
    markers |= {
        "half": b'{"shard": "half", "fing',
        "list": b"[]",
        "other": b'{"fingerprint": "theirs"}',
        "none": b"",
    }
    s3 = client(s3_port)
    for name, data in markers.items():
        s3.put_object(Bucket=BUCKET, Key=f"{place}/{name}.json", Body=data)
    faults = Faults(delayed=1.0, delay_s=0.2)
    with proxy(s3_port, faults) as port:
        found = EmbeddingStore(Folder(uri(port, place)), "mine").committed()
    assert faults.busiest > 8
    assert {name: marker["images"] for name, marker in found.items()} == {
        f"s{n:02d}": n for n in range(40)
    }


def test_files_of_a_run_are_hashed_and_deleted(s3_port, place):
    run = RunFolder(Folder(uri(s3_port, place)))
    run.save_labels("a", np.zeros(2, np.int32), np.ones(2, np.int32))
    run.save_fits({"fits": {}})
    run.images.write_bytes(run.image_name(0), b"image")
    names = ["clusters/a.labels.parquet", "clusters/fits.json", "images/000000.png"]
    there = objects(s3_port, place)
    assert there.keys() == set(names)
    assert run.hash_files(names) == {
        name: hashlib.sha256(data).hexdigest() for name, data in there.items()
    }
    run.delete_labels()
    run.images.delete_all()
    assert objects(s3_port, place).keys() == {"clusters/fits.json"}
    with pytest.raises(StorageError, match="is not there"):
        run.hash_files(names)


def test_a_large_object_is_not_held_in_memory(s3_port, place):
    """A tar of the distilled set has thousands of images."""
    pieces = [bytes([number]) * 2**20 for number in range(48)]
    Folder(uri(s3_port, place)).write_bytes("warm", b"")
    tracemalloc.start()
    with Folder(uri(s3_port, place)).writer("large") as stream:
        for piece in pieces:
            stream.write(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert objects(s3_port, place)["large"] == b"".join(pieces)
    assert peak < 24 * 2**20, "twice what is spooled would be held, or the whole"


def test_an_upload_in_pieces_is_repeated_whole(s3_port, place, monkeypatch):
    monkeypatch.setattr(calls, "WAITS_S", (0.05,) * 8)
    monkeypatch.setattr(storage, "SPOOL_BYTES", 1000)
    data = random.Random(1).randbytes(3 * 2**20 + 17)
    faults = Faults(seed=2, errors=0.3, cut_uploads=0.3, limit=6)
    with proxy(s3_port, faults) as port, Folder(uri(port, place)).writer("x") as stream:
        stream.write(data[:100])
        stream.write(data[100:])
    assert faults.struck
    assert objects(s3_port, place)["x"] == data
