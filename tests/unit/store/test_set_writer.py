"""Files of a set against the libraries that write such files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from pds_ray.store import set_writer
from pds_ray.store.storage import Folder
from pds_ray.store.tensors import Tensor


@pytest.mark.parametrize("rows", [0, 1, 40])
@pytest.mark.parametrize("names", ["b a", "image_prototypes text_prototypes similarity", "ä"])
def test_tensors_have_the_bytes_of_safetensors(tmp_path: Path, rows: int, names: str) -> None:
    """Whole, or cut from parts of any length."""
    rng = np.random.default_rng(rows)
    arrays = {name: rng.random((rows, 7), np.float32) for name in names.split()}
    arrays["last"] = rng.random((3, rows), np.float32).T  # not in the order of its rows
    tensors = {name: Tensor.of(array) for name, array in arrays.items()}
    longer = np.concatenate([arrays["last"], np.ones((9, 3), np.float32)])
    parts = np.split(longer, [0, rows // 3, rows, rows + 2])
    tensors["last"] = Tensor(longer.shape, iter(parts)).first(rows)
    files: set_writer.Files = {}
    set_writer.write_tensors(Folder(str(tmp_path)), "x.safetensors", tensors, files)
    written = (tmp_path / "x.safetensors").read_bytes()
    assert written == save({name: np.ascontiguousarray(each) for name, each in arrays.items()})
    assert files == {
        "x.safetensors": {
            "bytes": len(written),
            "sha256": hashlib.sha256(written).hexdigest(),
        }
    }
    np.testing.assert_array_equal(Tensor(longer.shape, parts).gathered(), longer)
