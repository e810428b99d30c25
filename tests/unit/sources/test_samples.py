"""The files that make a sample: keys with dots, files of one sample beside those of others."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pds_ray.config import FilesConfig
from pds_ray.sources.base import Fault, Sample, Shard
from pds_ray.sources.samples import MAX_PARTS
from pds_ray.sources.webdataset import WebDatasetSource
from tests.support.hostile import brief, memory, tar_bytes

Files = list[tuple[str, bytes]]


def read(folder: Path, names: list[str], **options: str) -> list[Sample | Fault]:
    """Read an archive of these files; each holds its own name, a .json as a caption."""
    members = [
        (name, b'{"caption": "%s"}' % name.encode() if name.endswith("json") else name.encode())
        for name in names
    ]
    (folder / "x.tar").write_bytes(tar_bytes(members))
    source = WebDatasetSource("x", FilesConfig(**options))
    return list(source.read(Shard("x", str(folder / "x.tar"))))


def good(found: list[Sample | Fault]) -> dict[str, tuple[str, ...]]:
    """Key -> image and captions of each sample, all of which are names of files."""
    return {
        item.key: (item.image.decode(), *item.captions)
        for item in found
        if isinstance(item, Sample)
    }


@pytest.mark.parametrize(
    ("names", "outcome"),
    [
        ("22.05.jpg 22.05.txt 22.06.jpg 22.06.txt", "22.05 22.06"),
        ("No. 7.jpg|No. 7.txt|No. 8.jpg|No. 8.txt", "No. 7|No. 8"),
        ("22.05.json 22.05.jpg 22.06.json 22.06.jpg", "22.05 22.06"),
        ("v1.2/a.jpg v1.2/a.txt", "v1.2/a"),
        ("a.JPG a.Txt", "a"),
        # a key that is the beginning of another
        ("22.jpg 22.txt 22.05.jpg 22.05.txt", "22 22.05"),
        ("22.05.jpg 22.05.txt 22.jpg 22.txt", "22.05 22"),
        # other images and texts of a sample, before, between and behind its own
        ("1.jpg 1.seg.png 1.txt 2.jpg 2.txt", "1 2"),
        ("1.canny.png 1.depth.png 1.jpg 1.txt", "1"),
        ("1.alt.txt 1.jpg 1.seg.png 1.txt", "1"),
        ("1.jpg 1.txt 1.a.png 1.b.png 1.note.txt", "1"),
        ("22.05.jpg 22.05.seg.png 22.05.txt", "22.05"),
        # files that are none of a sample
        ("a.jpg README.md a.txt b.jpg b.txt", "a README:missing_image b"),
        ("a.jpg metadata.json a.txt b.jpg b.txt", "a metadata:missing_image b"),
        ("a.jpg x.md y.md a.txt", "x:missing_image a y:missing_image"),
        ("a.txt a.jpg b.txt x.md b.jpg", "a b x:missing_image"),
        ("a.jpg a.txt b.txt x.md y.md b.jpg c.txt c.jpg", "a x:missing_image b y:missing_image c"),
        ("a.jpg b.txt x.md a.txt", "b:missing_image a x:missing_image"),
        ("a.jpg a.txt a.cls b.cls b.jpg b.txt", "a b"),
        ("www.a.cls www.a.jpg www.a.txt www.b.cls www.b.jpg www.b.txt", "www.a www.b"),
        ("a.jpg a.txt b.jpg b.txt a.cls b.cls", "a b"),
        ("a.heic a.doc b.heic", "a:missing_image b:missing_image"),
        # never many as one
        ("w.a.jpg w.b.jpg w.c.jpg", "w.a:missing_caption w.b:missing_caption w.c:missing_caption"),
        ("w.a.txt w.b.txt w.c.txt", "w.b:missing_image w.a:missing_image w.c:missing_image"),
        ("w.a.jpg w.b.jpg w.b.txt", "w.a:missing_caption w.b"),
        ("a.input.jpg a.output.txt b.input.jpg b.output.txt", "a:missing_image b:missing_image"),
        ("a.0.jpg a.1.jpg a.txt", "a:missing_image a.0:missing_caption a.1:missing_caption"),
        ("a.jpg b.jpg a.txt b.txt", "a:missing_caption b a:duplicate_key"),
    ],
)
def test_files_make_samples(tmp_path: Path, names: str, outcome: str) -> None:
    separator = "|" if "|" in names else " "
    found = read(tmp_path, names.split(separator))
    shown = [f"{key}:{reason}" if reason else key for key, reason in brief(found)]
    assert sorted(shown) == sorted(outcome.split(separator))
    for key, (image, *captions) in good(found).items():
        stem = image.rpartition(".")[0]
        assert stem == key
        assert all(caption.rpartition(".")[0] == key for caption in captions)


def test_usual_names_come_before_others(tmp_path: Path) -> None:
    found = read(tmp_path, ["a.tif", "a.jpg", "a.cap", "a.txt", "b.tif", "b.bmp", "b.cap"])
    assert good(found) == {"a": ("a.jpg", "a.txt"), "b": ("b.tif", "b.cap")}


@pytest.mark.parametrize(
    ("names", "outcome"),
    [
        ("a.jpg a.txt a.LARGE.tif", "a"),
        ("a.LARGE.tif a.jpg a.txt", "a"),
        ("a.jpg a.txt a.LARGE.cap", "a"),
        ("a.LARGE.bmp a.txt b.jpg b.txt", "a:member_too_large b"),
        ("a.jpg a.LARGE.text b.jpg b.txt", "a:member_too_large b"),
        ("a.jpg a.txt a.mask.LARGE.png b.jpg b.txt", "a b"),
        ("a.mask.LARGE.png a.jpg a.txt b.jpg b.txt", "a b"),
        ("a.mask.LARGE.png b.jpg b.txt", "a.mask:member_too_large b"),
    ],
)
def test_a_large_file_that_is_not_needed_costs_nothing(
    tmp_path: Path, names: str, outcome: str
) -> None:
    members = [
        (name.replace(".LARGE", ""), b"x" * (9 if "LARGE" in name else 1)) for name in names.split()
    ]
    (tmp_path / "x.tar").write_bytes(tar_bytes(members))
    source = WebDatasetSource("x", max_image_bytes=8, max_text_bytes=8)
    found = list(source.read(Shard("x", str(tmp_path / "x.tar"))))
    assert [f"{key}:{reason}".rstrip(":") for key, reason in brief(found)] == outcome.split()


def test_suffixes_are_chosen(tmp_path: Path) -> None:
    names = ["w.a.input.jpg", "w.a.jpg", "w.a.out.json", "w.b.INPUT.jpg", "w.b.out.json"]
    found = read(tmp_path, names, image_suffixes=".Input.JPG", caption_suffixes="out.json, cap")
    assert good(found) == {
        "w.a": ("w.a.input.jpg", "w.a.out.json"),
        "w.b": ("w.b.INPUT.jpg", "w.b.out.json"),
    }


KEYS = st.lists(st.text("ab.1 é", min_size=1, max_size=8), unique=True, min_size=1, max_size=6)
PLAIN = st.lists(st.text("abc1é", min_size=1, max_size=5), unique=True, min_size=1, max_size=5)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(KEYS, st.booleans())
def test_samples_of_any_keys_are_all_read(
    tmp_path: Path, keys: list[str], image_first: bool
) -> None:
    keys = [key for key in keys if not key.startswith(".")]
    suffixes = (".jpg", ".txt") if image_first else (".txt", ".jpg")
    found = read(tmp_path, [key + suffix for key in keys for suffix in suffixes])
    assert {item.key for item in found if isinstance(item, Sample)} == set(keys)
    assert len(found) == len(keys)
    assert good(found) == {key: (f"{key}.jpg", f"{key}.txt") for key in keys}


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PLAIN, st.data())
def test_other_files_of_a_sample_change_nothing(
    tmp_path: Path, keys: list[str], data: st.DataObject
) -> None:
    others = st.lists(
        st.sampled_from(["seg.png", "depth.jpg", "alt.txt", "x.y.png", "cls", "m.npy"]), unique=True
    )
    names = []
    for key in keys:
        files = ["jpg", "txt", *data.draw(others)]
        names += [f"{key}.{suffix}" for suffix in data.draw(st.permutations(files))]
    found = read(tmp_path, names)
    assert brief(found) == [(key, "") for key in keys]
    assert good(found) == {key: (f"{key}.jpg", f"{key}.txt") for key in keys}


@settings(max_examples=66, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text("ab.1", min_size=1, max_size=6), unique=True, min_size=1), st.data())
def test_nothing_is_lost(tmp_path: Path, keys: list[str], data: st.DataObject) -> None:
    """Each image, in whatever order, is a sample's, a fault's, or another file of a sample."""
    keys = [key for key in keys if not key.startswith(".")]
    files = [f"{key}{suffix}" for key in keys for suffix in (".jpg", ".txt")]
    found = read(tmp_path, data.draw(st.permutations(files)))
    named = {item.key for item in found}
    for key in keys:
        begins = {key[:end] for end in range(len(key) + 1) if end == len(key) or key[end] == "."}
        assert begins & named


def test_incomplete_samples_do_not_add_up(tmp_path: Path) -> None:
    names = [f"www.{number:05d}{'n' * 90}.jpg" for number in range(3_000)]
    (tmp_path / "x.tar").write_bytes(tar_bytes([(name, b"p" * 500) for name in names]))
    faults = 0
    with memory(4 << 20):
        for item in WebDatasetSource("x").read(Shard("x", str(tmp_path / "x.tar"))):
            faults += isinstance(item, Fault) and item.reason == "missing_caption"
    assert faults == len(names) > MAX_PARTS
