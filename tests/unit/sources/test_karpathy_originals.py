"""Annotations of Flickr30K and COCO as Karpathy and COCO publish them."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest

from pds_ray.sources.base import Fault, Sample, SourceError
from pds_ray.sources.karpathy import KarpathySource

OWN = {
    "images": [
        {
            "filepath": folder,
            "filename": name,
            "split": split,
            "cocoid": number,
            "sentences": [{"raw": f"{name} {n}", "tokens": ["x"] * 9} for n in range(5)],
        }
        for number, (folder, name, split) in enumerate(
            [
                ("val2014", "c.jpg", "restval"),
                ("train2014", "a.jpg", "train"),
                ("val2014", "b.jpg", "val"),
                ("val2014", "d.jpg", "test"),
            ]
        )
    ],
    "dataset": "coco",
}
COCO = {
    "info": {"year": 2014},
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "a one"},
        {"image_id": 7, "id": 2, "caption": "b one"},
        {"image_id": 3, "id": 3, "caption": "a two\n"},
    ],
}


def write(root: Path, files: dict[str, Any]) -> Path:
    """Write a folder: JSON of what is no text, empty images otherwise."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def samples(uri: str) -> dict[str, tuple[str, ...]]:
    source = KarpathySource(uri)
    items = [item for shard in source.shards() for item in source.read(shard)]
    assert not [item for item in items if isinstance(item, Fault)]
    return {item.key: item.captions for item in items if isinstance(item, Sample)}


@pytest.mark.parametrize("images", ["", "images/"])
@pytest.mark.parametrize("annotations", ["", "annotations/", "karpathy/"])
def test_karpathys_own_file_has_every_split(tmp_path: Path, annotations: str, images: str) -> None:
    every = ("val2014/b.jpg", "val2014/c.jpg", "val2014/d.jpg", "train2014/a.jpg")
    write(
        tmp_path, {f"{annotations}dataset_coco.json": OWN} | {images + name: "" for name in every}
    )
    assert list(samples(f"coco:{tmp_path}")) == ["val2014/c.jpg", "train2014/a.jpg"]
    assert samples(f"coco:{tmp_path}:val") == {
        "val2014/b.jpg": tuple(f"b.jpg {n}" for n in range(5))
    }
    assert list(samples(f"coco:{tmp_path}:test")) == ["val2014/d.jpg"]


def test_the_place_of_the_images_is_no_part_of_the_source(tmp_path: Path) -> None:
    """Embeddings of a folder stand when its images move to another usual place."""
    shards = [
        KarpathySource(f"coco:{write(tmp_path / str(number), files)}:val").shards()
        for number, files in enumerate(
            {"dataset_coco.json": OWN, place: ""} for place in ("val2014/b.jpg", "images/b.jpg")
        )
    ]
    assert shards[0] == shards[1]


@pytest.mark.parametrize(
    "folder", ["train2014", "images/train2014", "images", "train2017", "images/train2017"]
)
@pytest.mark.parametrize("annotations", ["", "annotations/"])
def test_cocos_own_files(tmp_path: Path, annotations: str, folder: str) -> None:
    year = "2017" if "2017" in folder else "2014"
    write(
        tmp_path,
        {
            f"{annotations}captions_train{year}.json": COCO,
            f"{folder}/a.jpg": "",
            f"{folder}/b.jpg": "",
        },
    )
    assert samples(f"coco:{tmp_path}") == {"b.jpg": ("b one",), "a.jpg": ("a one", "a two\n")}


def test_the_year_whose_images_are_there_is_read(tmp_path: Path) -> None:
    other = {
        "images": [{"id": 1, "file_name": "000.jpg"}],
        "annotations": [{"image_id": 1, "caption": "x"}],
    }
    write(
        tmp_path,
        {
            "annotations/captions_train2014.json": COCO,
            "annotations/captions_train2017.json": other,
            "train2017/000.jpg": "",
        },
    )
    assert samples(f"coco:{tmp_path}") == {"000.jpg": ("x",)}


def test_images_that_are_lost_do_not_change_the_annotation_file(tmp_path: Path) -> None:
    records = [{"image": f"train2014/{name}.jpg", "caption": name} for name in "ab"]
    published = {"coco_karpathy_train.json": records, "train2014/b.jpg": ""}
    write(tmp_path, {**published, "annotations/captions_train2014.json": COCO})
    with pytest.raises(SourceError, match=r"1 of 2 images .*, the first: train2014/a\.jpg$"):
        KarpathySource(f"coco:{tmp_path}").shards()
    write(tmp_path, {"train2014/a.jpg": ""})
    source = KarpathySource(f"coco:{tmp_path}")
    (shard,) = source.shards()
    for name in "ab":
        (tmp_path / f"train2014/{name}.jpg").unlink()
    lost = list(pickle.loads(pickle.dumps(source)).read(shard))  # noqa: S301 - as it travels
    assert [(item.key, type(item)) for item in lost] == [
        ("train2014/a.jpg", Fault),
        ("train2014/b.jpg", Fault),
    ]


def test_the_files_of_the_published_code_come_first(tmp_path: Path) -> None:
    record = {"image": "val2014/b.jpg", "caption": "of the published code"}
    write(
        tmp_path,
        {"coco_karpathy_val.json": [record], "dataset_coco.json": OWN, "val2014/b.jpg": ""},
    )
    assert samples(f"coco:{tmp_path}:val") == {"val2014/b.jpg": ("of the published code",)}


def test_gzipped_originals(tmp_path: Path) -> None:
    write(tmp_path, {"train2014/a.jpg": "", "train2014/b.jpg": ""})
    (tmp_path / "captions_train2014.json.gz").write_bytes(gzip.compress(json.dumps(COCO).encode()))
    assert len(samples(f"coco:{tmp_path}")) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "has no image of the split train"),
        ({"images": [1]}, "image 0: not a JSON object"),
        ({"images": [{"split": "train"}]}, "image 0: 'filename' is not a path"),
        ({"images": [{"split": "train", "filename": "../a.jpg"}]}, "image 0: image path .* leaves"),
        ({"images": [{"split": "train", "filename": "a.jpg"}]}, "image 0: 'sentences' is not"),
        (
            {
                "images": [
                    {"split": "train", "filename": "a.jpg", "filepath": "/x", "sentences": []}
                ]
            },
            "image 0: image path '/x' leaves",
        ),
        (COCO | {"images": [{"id": 7}]}, "image 0: 'file_name' is not a path"),
        (COCO | {"annotations": [{"image_id": 8, "caption": "x"}]}, "annotation 0: no 'caption'"),
        (COCO | {"annotations": [{"image_id": 7}]}, "annotation 0: no 'caption'"),
        ({"licenses": []}, "is not a JSON list of records"),
        ({"images": [{"split": "val", "filename": "a.jpg"}]}, "has no image of the split train"),
    ],
)
def test_bad_originals_are_named(tmp_path: Path, content: Any, message: str) -> None:
    write(tmp_path, {"dataset_coco.json": content})
    with pytest.raises(SourceError, match=rf"dataset_coco\.json,? {message}"):
        KarpathySource(f"coco:{tmp_path}").shards()


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "flickr30k:{}",
            r"flickr30k_train\.json \(or flickr30k_train\.json\.gz\), nor dataset_flickr30k\.json "
            r"\(in Karpathy's caption_datasets\.zip\), in {} or its folder annotations or karpathy",
        ),
        (
            "coco:{}:val",
            r"coco_karpathy_val\.json .* or captions_val2014\.json "
            r"\(in annotations_trainval2014\.zip on COCO's download page\)",
        ),
    ],
)
def test_the_message_names_the_file_and_where_to_get_it(
    tmp_path: Path, uri: str, message: str
) -> None:
    with pytest.raises(SourceError, match=message.format(tmp_path)):
        KarpathySource(uri.format(tmp_path)).shards()


def test_the_message_names_the_folders_that_were_looked_in(tmp_path: Path) -> None:
    write(tmp_path, {"dataset_coco.json": OWN})
    with pytest.raises(
        SourceError, match=r"2 of 2 images are not in .*looked also .*images/val2014"
    ):
        KarpathySource(f"coco:{tmp_path}").shards()


@pytest.mark.parametrize(
    ("case", "uri", "first"),
    [
        ("karpathy_orig", "flickr30k:{}", "a red circle number 0 0."),
        ("karpathy_coco_own", "coco:{}", None),
        ("karpathy_win", "flickr30k:{}", "a red circle number 0 0"),
    ],
)
def test_public_cases(shared_data: Path, case: str, uri: str, first: str | None) -> None:
    root = shared_data / "public_cases" / case
    if not root.is_dir():
        pytest.skip(f"no {root}")
    source = KarpathySource(uri.format(root))
    items = [item for shard in source.shards() for item in source.read(shard)]
    assert all(isinstance(item, Sample) and item.image for item in items)
    pictures = {path.name for path in root.rglob("*.jpg")}
    keys = {item.key.rpartition("/")[2] for item in items}
    if case == "karpathy_orig":  # the other images are those of the other splits
        content = json.loads((root / "dataset_flickr30k.json").read_text())
        pictures = {r["filename"] for r in content["images"] if r["split"] == "train"}
    assert keys == pictures
    assert first in (None, items[0].captions[0])


def test_slashes_of_windows(tmp_path: Path) -> None:
    records = [{"image": "flickr30k-images\\1.jpg", "caption": "x"}]
    write(tmp_path, {"flickr30k_train.json": records, "flickr30k-images/1.jpg": ""})
    assert samples(f"flickr30k:{tmp_path}") == {"flickr30k-images/1.jpg": ("x",)}
    shutil.move(tmp_path / "flickr30k-images", tmp_path / "images")
    assert samples(f"flickr30k:{tmp_path}") == {"flickr30k-images/1.jpg": ("x",)}
