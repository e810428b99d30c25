"""Work on many files is shared by tasks, with the results of one process."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pds_ray.distributed import hashing, tasks
from pds_ray.modalities.image import encode_image
from pds_ray.stages import materialize
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import StorageError

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("together", [2, 3, 1000])
def test_hashes_of_many_files(
    run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    monkeypatch.setattr(hashing, "FILES_PER_TASK", together)
    names = run_folder.image_files(7)[::-1]
    for number, name in enumerate(names):
        run_folder.folder.write_bytes(name, b"image %d" % number)
    done: list[int] = []
    found = hashing.hash_files(run_folder, names, done.append)
    assert list(found.items()) == [
        (name, hashlib.sha256(b"image %d" % number).hexdigest())
        for number, name in enumerate(names)
    ]
    assert sum(done) == 7
    run_folder.folder.delete(names[5])
    with pytest.raises(StorageError, match="is not there"):
        hashing.hash_files(run_folder, names, done.append)


def test_few_tasks_at_once(tmp_path: Path) -> None:
    """However many items there are and CPUs, those under way are no more than allowed."""

    def started(number: int) -> int:
        (tmp_path / str(number)).touch()
        return len(list(tmp_path.iterdir()))

    for number, there in enumerate(tasks.map_in_order(started, range(8), at_once=1)):
        assert there == number + 1


def test_a_set_of_several_tars(run_folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks write the bytes that the driver would; a missing image ends it."""
    monkeypatch.setattr(materialize, "PAIRS_PER_TAR", 3)
    monkeypatch.setattr(materialize, "IMAGES_TOGETHER", 2)
    rng = np.random.default_rng(0)
    rows = [{"file_name": run_folder.image_name(pair), "text": str(pair)} for pair in range(8)]
    for row in rows:
        noise = Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8))
        run_folder.images.write_bytes(row["file_name"], encode_image(noise, "png"))
    found = {}
    for name, share in (("alone", map), ("shared", partial(tasks.map_in_order, at_once=2))):
        target, done = run_folder.folder / name, list[int]()
        files = materialize._write_images(run_folder.images, target, rows, done.append, share)
        below = Path(target.path)
        found[name] = (
            files,
            {
                str(path.relative_to(below)): path.read_bytes()
                for path in below.rglob("*")
                if path.is_file()
            },
        )
        assert sum(done) == len(rows)
    assert found["shared"] == found["alone"]
    images, tars, pixels = found["shared"][0]
    assert (len(images), len(tars), pixels) == (8, 3, 8 * 63)
    run_folder.images.delete(rows[4]["file_name"])
    with pytest.raises(FileNotFoundError):
        materialize._write_images(run_folder.images, target, rows, done.append, share)
