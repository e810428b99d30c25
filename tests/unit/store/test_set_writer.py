"""Files of a set against the libraries that write such files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
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


@pytest.mark.parametrize("lengths", [[], [1], [2, 1], [5], [3, 2]])
def test_parts_that_are_not_what_the_shape_says(tmp_path: Path, lengths: list[int]) -> None:
    """The bytes of a header that promises others are no safetensors file."""
    parts = [np.ones((length, 2), np.float32) for length in lengths]
    with pytest.raises(ValueError, match=r"rows of 4|could not broadcast"):
        Tensor((4, 2), parts).gathered()
    files: set_writer.Files = {}
    with pytest.raises(ValueError, match=r"a: .* bytes of 32 found"):
        set_writer.write_tensors(Folder(str(tmp_path)), "x", {"a": Tensor((4, 2), parts)}, files)
    assert (list(tmp_path.iterdir()), files) == ([], {})


def test_parts_are_read_once() -> None:
    tensor = Tensor((2, 1), iter([np.ones((2, 1), np.float32)]))
    assert tensor.gathered().tolist() == [[1], [1]]
    with pytest.raises(ValueError, match="0 rows of 2"):
        tensor.gathered()


@pytest.mark.parametrize(("rows", "wanted"), [(0, 0), (1, 1), (3, 1), (4, 2), (6, 2)])
def test_no_part_is_read_after_the_last_row_wanted(rows: int, wanted: int) -> None:
    read = []

    def parts() -> Iterator[np.ndarray]:
        for number in range(3):
            read.append(number)
            yield np.full((3, 1), number, np.float32)

    expected = np.repeat(np.arange(3), 3)[:rows]
    assert Tensor((9, 1), parts()).first(rows).gathered()[:, 0].tolist() == expected.tolist()
    assert len(read) == wanted
