"""Archives of the kinds that people report, with what is right for each."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pds_ray.config import FilesConfig
from pds_ray.modalities.image import decode_image
from pds_ray.sources.advice import Tally
from pds_ray.sources.base import Fault, Sample
from pds_ray.sources.webdataset import WebDatasetSource


@pytest.fixture
def cases(shared_data: Path) -> Path:
    folder = shared_data / "public_cases"
    if not folder.is_dir():
        pytest.skip("there is no folder public_cases among the shared data")
    return folder


def read(uri: Path, **options: Any) -> tuple[list[Sample], Tally]:
    """Return the samples of a source, and what is bad."""
    source, samples, bad = WebDatasetSource(str(uri), FilesConfig(**options)), [], Tally()
    for shard in source.shards():
        for item in source.read(shard):
            if isinstance(item, Fault):
                bad.add(item.reason, item.key, item.detail)
            else:
                samples.append(item)
    return samples, bad


@pytest.mark.parametrize(
    ("case", "count"),
    [
        ("join/cat", 40),
        ("download/00000", 20),
        ("dots/url", 40),
        ("json/TEXT", 40),
        ("json/alt_text", 40),
        ("json/captions_dicts", 40),
        ("suffix/caption", 40),
        ("suffix/jfif", 40),
        ("suffix/avif", 40),
        ("suffix/img_cap", 40),
        ("packed_plain/zstd", 20),
    ],
)
def test_every_sample_is_read(cases: Path, case: str, count: int) -> None:
    samples, bad = read(cases / f"{case}.tar")
    assert not bad.counts
    assert len({sample.key for sample in samples}) == len(samples) == count
    for number, sample in enumerate(samples):
        (caption,) = sample.captions
        assert caption.endswith(f"number {number}")
        assert decode_image(sample.image).mode == "RGB"


@pytest.mark.parametrize(
    ("case", "count", "images"),
    [("html_some/00000", 10, 10), ("html_some/00012", 10, 10), ("same/all", 60, 1)],
)
def test_whole_shards_with_other_captions(cases: Path, case: str, count: int, images: int) -> None:
    samples, bad = read(cases / f"{case}.tar")
    assert not bad.counts
    assert (len(samples), len({sample.image for sample in samples})) == (count, images)


def test_a_bare_list_of_captions(cases: Path) -> None:
    samples, bad = read(cases / "json" / "bare_list.tar")
    assert (len(samples), bad.line()) == (40, "")
    assert samples[0].captions == ("a red circle number 0", "another a red circle number 0")


@pytest.mark.parametrize(
    ("case", "line"),
    [
        (
            "download/00004",
            "not_a_tar: 1; 61,440 bytes of zeros where the first file should begin: a download "
            "that was not finished?; download it again",
        ),
        (
            "download/00006",
            "not_a_tar: 1; 30,720 bytes of zeros where the first file should begin: a download "
            "that was not finished?; download it again",
        ),
        (
            "lfs/00000",
            "not_a_tar: 1; a Git LFS pointer, not the file itself; fetch the files with "
            "git lfs pull",
        ),
        (
            "links/symbolic",
            "unsafe_member: 40; such as 00000: 00000.jpg: link to /data/all/0.jpg; pack the files "
            "themselves: tar --dereference",
        ),
        (
            "dots/input_output",
            "missing_image: 40; such as sample00000000: no image and caption under one key; found "
            ".input.jpg, .outputs.txt; name the suffixes with --read.image-suffixes and "
            "--read.caption-suffixes",
        ),
    ],
)
def test_what_cannot_be_read_says_why_and_what_to_do(cases: Path, case: str, line: str) -> None:
    assert read(cases / f"{case}.tar")[1].line() == line


def test_hard_links_need_another_option_of_tar(tmp_path: Path) -> None:
    (tmp_path / "0.jpg").write_bytes(b"one image")
    (tmp_path / "1.jpg").hardlink_to(tmp_path / "0.jpg")
    for key in "01":
        (tmp_path / f"{key}.txt").write_text("its caption")

    def packed(*options: str) -> Path:
        names = ["0.jpg", "0.txt", "1.jpg", "1.txt"]
        command = ["tar", *options, "-cf", "a.tar", *names]
        subprocess.run(command, cwd=tmp_path, check=True)
        return tmp_path / "a.tar"

    samples, bad = read(packed("--dereference"))
    assert len(samples) == 1
    assert bad.line() == (
        "unsafe_member: 1; such as 1: 1.jpg: hard link to 0.jpg; pack the files themselves: "
        "tar --hard-dereference"
    )
    assert len(read(packed("--hard-dereference"))[0]) == 2


def test_all_images_before_all_captions(cases: Path) -> None:
    samples, bad = read(cases / "order" / "jpg_then_txt.tar")
    assert len(samples) == 1  # the last image and its caption have no other image between them
    assert bad.counts == {"missing_caption": 39, "duplicate_key": 39}
    assert bad.example().endswith(
        "the files of a sample do not lie side by side; pack them again with tar --sort=name"
    )


def test_suffixes_of_two_parts(cases: Path) -> None:
    options = {"image_suffixes": "input.jpg", "caption_suffixes": "outputs.txt"}
    samples, bad = read(cases / "dots" / "input_output.tar", **options)
    assert (len(samples), bad.line()) == (40, "")
    assert (samples[1].key, samples[1].captions) == ("sample00000001", ("a green circle number 1",))


@pytest.mark.parametrize(
    ("case", "notes"),
    [("utf16", ("utf-16",)), ("cp1252", ("cp1252",)), ("utf8bom", ())],
)
def test_captions_of_windows_editors(cases: Path, case: str, notes: tuple[str, ...]) -> None:
    samples, bad = read(cases / "enc" / f"{case}.tar")
    assert (len(samples), bad.line()) == (40, "")
    for number, sample in enumerate(samples):
        assert sample.captions == (f"a café with “smart” quotes – number {number}",)
    assert {sample.notes for sample in samples} == {notes}


@pytest.mark.parametrize("where", [".", "test"])
def test_captions_one_per_line(cases: Path, tmp_path: Path, where: str) -> None:
    flickr = cases / "lines" / "flickr.tar"
    whole, _ = read(flickr)
    assert {len(sample.captions) for sample in whole} == {1}
    assert Counter(note for sample in whole for note in sample.notes) == {"lines": 40}

    (tmp_path / where).mkdir(exist_ok=True)
    (tmp_path / where / "0.tar").write_bytes(flickr.read_bytes())
    (tmp_path / "dataset_type.txt").write_text("retrieval\n")
    by_option, _ = read(flickr, caption_lines="each")
    by_type, _ = read(tmp_path / where / "0.tar")
    assert by_option == by_type
    assert by_type[0].captions == tuple(f"caption {n} says a red circle number 0" for n in range(5))
    assert by_type[0].notes == ()
    assert read(tmp_path / where / "0.tar", caption_lines="whole")[0] == whole

    (tmp_path / "dataset_type.txt").write_text("zeroshot_classification")
    assert read(tmp_path / where / "0.tar")[0] == whole
