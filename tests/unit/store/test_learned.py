"""Learned parts of a set: the file, what is damage, what size counts, and what an export keeps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save

from pds_ray import load_distilled
from pds_ray.store.distilled_set import DistilledSetError
from pds_ray.store.export import FORMATS, export
from pds_ray.store.learned import LOSSES, Learned, LearnedError, LearnedFor, pack, unpack
from pds_ray.training import losses
from tests.support.hand_made_set import learned_file, learned_tensors, scenes_set

PAIRS, SIDE = 3, 8


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return learned_tensors(PAIRS, SIDE)


def test_a_set_shows_its_learned_parts(tmp_path: Path, tensors: dict[str, np.ndarray]) -> None:
    data = learned_file(tensors)
    found = load_distilled(str(scenes_set(tmp_path, PAIRS, learned=data)))
    assert found.learned is not None
    for name in ("text", "similarity", "step_sizes"):
        np.testing.assert_array_equal(getattr(found.learned, name), tensors[name])
    np.testing.assert_array_equal(found.learned_images(), tensors["images"])
    about = found.learned.about
    assert (about.distiller, about.loss, about.image_size) == ("lors", "wbce", SIDE)
    assert found.learned.parts == ("images", "text", "similarity", "steps")


def test_learned_bytes_are_a_number_of_their_own(tmp_path: Path, tensors: dict) -> None:
    plain = load_distilled(str(scenes_set(tmp_path / "plain", PAIRS))).size()
    data = learned_file(tensors)
    size = load_distilled(str(scenes_set(tmp_path / "learned", PAIRS, learned=data))).size()
    assert size.bytes == plain.bytes
    assert size.to_json() == {**plain.to_json(), "learned_bytes": len(data)}
    assert "learned_bytes" not in plain.to_json(), "manifests of other sets stay as they were"


def test_a_set_without_learned_parts_has_none(tmp_path: Path) -> None:
    found = load_distilled(str(scenes_set(tmp_path, PAIRS)))
    assert found.learned is None
    with pytest.raises(DistilledSetError, match="has no learned parts"):
        found.learned_images()


def test_what_is_packed_is_what_other_programs_read(tmp_path: Path, tensors: dict) -> None:
    learned, images = unpack(learned_file(tensors))
    (tmp_path / "x.safetensors").write_bytes(pack(learned, images))
    with safe_open(tmp_path / "x.safetensors", "np") as file:
        assert {*file.keys()} == {*tensors}
        for name, value in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), value)
        assert json.loads(file.metadata()["learned"])["backbone"] == "small_conv"
    again, images_again = unpack(pack(learned, images))
    assert again.about == learned.about
    np.testing.assert_array_equal(images_again, images)


def test_similarity_and_steps_may_be_missing(tensors: dict) -> None:
    some = {name: tensors[name] for name in ("images", "text")}
    learned, _ = unpack(learned_file(some))
    assert learned.parts == ("images", "text")
    assert (learned.similarity, learned.step_sizes) == (None, None)


def test_the_first_pairs_of_learned_parts(tensors: dict) -> None:
    few = unpack(learned_file(tensors))[0].first(2)
    np.testing.assert_array_equal(few.text, tensors["text"][:2])
    np.testing.assert_array_equal(few.similarity, tensors["similarity"][:2, :2])
    np.testing.assert_array_equal(few.step_sizes, tensors["step_sizes"])


DAMAGE = {
    "no text": ({"text": None}, {}, "learned text are no float32"),
    "wide images": ({"images": np.zeros((PAIRS, 3, SIDE, 5), np.float32)}, {}, "learned images"),
    "float64": ({"similarity": np.eye(PAIRS)}, {}, "learned similarity are no float32"),
    "small similarity": ({"similarity": np.eye(2, dtype=np.float32)}, {}, "learned similarity"),
    "one number": ({"text": np.array(1.0, np.float32)}, {}, "learned text are no float32"),
    "flat images": (
        {"images": np.zeros((1, 1, SIDE), np.float32)},
        {},
        "learned images are no float32",
    ),
    "a mean of NaN": ({}, {"mean": [1, 1, np.nan]}, "cannot be read, or does not say"),
    "NaN": ({"text": np.full((PAIRS, 4), np.nan, np.float32)}, {}, "values that are not finite"),
    "one step": ({"step_sizes": np.ones(1, np.float32)}, {}, "learned step_sizes are no float32"),
    "a step of zero": ({"step_sizes": np.zeros(2, np.float32)}, {}, "are not positive"),
    "another side": ({}, {"image_size": 9}, "learned images are no float32"),
    "another loss": ({}, {"loss": "hinge"}, "cannot be read, or does not say"),
    "no std": ({}, {"std": [1, 1, 0]}, "cannot be read, or does not say"),
    "two means": ({}, {"mean": [1, 1]}, "cannot be read, or does not say"),
    "a number as name": ({}, {"distiller": 7}, "cannot be read, or does not say"),
    "a side as text": ({}, {"image_size": "7"}, "cannot be read, or does not say"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path: Path, tensors: dict, damage: str) -> None:
    changed, metadata, line = DAMAGE[damage]
    values = {n: v for n, v in {**tensors, **changed}.items() if v is not None}
    data = learned_file(values, **metadata)
    with pytest.raises(DistilledSetError, match=f"is a damaged distilled set: its .*{line}"):
        load_distilled(str(scenes_set(tmp_path, PAIRS, learned=data)))


def test_other_files_are_damage(tmp_path: Path, tensors: dict) -> None:
    for number, data in enumerate((b"x", b"\xff" * 99, save(tensors))):
        path = scenes_set(tmp_path / str(number), PAIRS, learned=data)
        with pytest.raises(DistilledSetError, match="cannot be read, or does not say"):
            load_distilled(str(path))
    path = scenes_set(tmp_path / "fewer", PAIRS + 1, learned=learned_file(tensors))
    with pytest.raises(DistilledSetError, match="holds 3 pairs, not 4"):
        load_distilled(str(path))
    (path / "learned.safetensors").write_bytes(b"x")
    with pytest.raises(DistilledSetError, match=r"learned\.safetensors is not the file"):
        load_distilled(str(path))


def test_images_that_change_later_are_named(tmp_path: Path, tensors: dict) -> None:
    path = scenes_set(tmp_path, PAIRS, learned=learned_file(tensors))
    found = load_distilled(str(path))
    (path / "learned.safetensors").write_bytes(learned_file(tensors)[1:])
    with pytest.raises(DistilledSetError, match=r"learned\.safetensors cannot be read"):
        found.learned_images()


def test_parts_that_do_not_fit_are_not_written(tensors: dict) -> None:
    learned, images = unpack(learned_file(tensors))
    with pytest.raises(LearnedError, match="learned images"):
        pack(learned, images[:, :, :4])
    with pytest.raises(LearnedError, match="learned similarity"):
        pack(Learned(learned.about, learned.text[:2], learned.similarity), images[:2])


@pytest.mark.parametrize("format", ["parquet", "imagefolder"])
def test_an_export_keeps_learned_parts(tmp_path: Path, tensors: dict, format: str) -> None:
    assert {"parquet", "imagefolder"} < {*FORMATS}
    path = scenes_set(tmp_path / "set", PAIRS, learned=learned_file(tensors))
    manifest = export(str(path), format, str(tmp_path / "out"))
    name = "learned.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (path / name).read_bytes()
    assert manifest["files"][name] == load_distilled(str(path)).manifest["files"][name]
    if format == "imagefolder":
        assert load_distilled(str(tmp_path / "out")).learned is not None
    plain = scenes_set(tmp_path / "plain", PAIRS)
    export(str(plain), format, str(tmp_path / "out"))
    assert not (tmp_path / "out" / name).exists(), "an export leaves nothing of an earlier one"


def test_a_set_names_the_losses_that_there_are() -> None:
    assert {*LOSSES} == {*losses.SOFT_LOSSES}
    assert LearnedFor.__dataclass_fields__["loss"].default in LOSSES
