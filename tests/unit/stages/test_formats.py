"""Sets of each image format, and sets that end where a budget does, against the files on disk."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from pds_ray.config import ConfigError, DecodeConfig, options
from pds_ray.methods.pds import PDS_CARD
from pds_ray.modalities.image import SAVED_FORMATS, Preprocess, encode_image
from pds_ray.stages.materialize import write_distilled
from pds_ray.stages.trial import set_images
from pds_ray.store.distilled_set import load_distilled
from pds_ray.store.export import export
from pds_ray.store.run_folder import SUFFIXES, RunFolder
from pds_ray.store.storage import Folder
from tests.unit.stages.test_materialize import ABOUT, prototypes

FORMATS = sorted(SUFFIXES)
CAPTIONS = ["a red circle", "Zoë ☃ and a tab\there", "two\nlines", "", "x" * 300]
SIDES = (9, 16, 33, 64, 20)


def smooth(side: int, seed: int = 0) -> Image.Image:
    """Return an image that a lossy format keeps well: one colour running into another."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(40, 216, (2, 2, 3)).astype(np.uint8)
    return Image.fromarray(ends).resize((side, side), Image.Resampling.BICUBIC)


def make_run(path: Path, format: str, captions: list[str], images: list[Image.Image]) -> RunFolder:
    run = RunFolder(Folder(str(path))).of_format(format)
    run.save_prototypes(prototypes(captions))
    for pair, image in enumerate(images):
        run.images.write_bytes(run.image_name(pair), encode_image(image, format))
    return run


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_is_of_its_format(format: str) -> None:
    image = smooth(40)
    with Image.open(io.BytesIO(encode_image(image, format))) as opened:
        assert opened.format == format.upper()
        assert opened.mode == "RGB"
        far = np.abs(np.asarray(opened, int) - np.asarray(image, int)).max()
    assert far <= (0 if format == "png" else 24)


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_a_lower_quality_has_fewer_bytes(format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    sizes = [len(encode_image(Image.fromarray(noise), format, quality)) for quality in (90, 50, 10)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3


def test_the_formats_of_options_files_and_pillow_are_the_same() -> None:
    assert options(DecodeConfig)["format"].choices == ("auto", *SAVED_FORMATS)
    assert tuple(SUFFIXES) == SAVED_FORMATS


def test_a_png_is_that_of_earlier_versions() -> None:
    image, plain = smooth(40), io.BytesIO()
    image.save(plain, format="PNG")
    assert encode_image(image, "png") == plain.getvalue()


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp(request.param)
    images = [smooth(side, side) for side in SIDES]
    run = make_run(path, request.param, CAPTIONS, images)
    write_distilled(run, ABOUT, PDS_CARD)
    return (
        path,
        request.param,
        [np.asarray(Image.open(run.images.full(name))) for name in names(run)],
    )


def names(run: RunFolder) -> list[str]:
    return [run.image_name(pair) for pair in range(len(CAPTIONS))]


def test_a_set_of_each_format_is_read_by_all(made, tmp_path: Path) -> None:
    path, format, pixels = made
    suffix = SUFFIXES[format]
    folder = path / "distilled"
    pairs = load_distilled(str(path))
    assert [row["file_name"] for row in pairs.records] == [f"{n:06d}{suffix}" for n in range(5)]
    for pair, expected in enumerate(pixels):
        np.testing.assert_array_equal(np.asarray(pairs.image(pair)), expected)
    tar = webdataset.WebDataset(str(folder / "webdataset/000000.tar"), shardshuffle=False)
    kind = suffix.removeprefix(".")
    found = list(tar.decode("pil").to_tuple(kind, "txt", "json"))
    assert f'to_tuple("{kind}", "txt")' in (folder / "README.md").read_text("utf-8")
    for (image, text, _), expected, caption in zip(found, pixels, CAPTIONS, strict=True):
        np.testing.assert_array_equal(np.asarray(image), expected)
        assert text == caption
    for form in ("parquet", "webdataset", "imagefolder"):
        export(str(path), form, str(tmp_path / form))
    table = pq.read_table(tmp_path / "parquet/data/train-00000-of-00001.parquet").to_pylist()
    assert [row["image"]["path"] for row in table] == [row["file_name"] for row in pairs.records]
    with tarfile.open(tmp_path / "webdataset/webdataset/000000.tar") as archive:
        assert f"000003{suffix}" in archive.getnames()
    assert f'to_tuple("{kind}", "txt")' in (tmp_path / "webdataset/README.md").read_text("utf-8")
    again = load_distilled(str(tmp_path / "imagefolder"))
    np.testing.assert_array_equal(np.asarray(again.image(3)), pixels[3])
    assert again.size() == pairs.size()


@pytest.mark.parametrize("size", [7, 32, 96])
def test_evaluation_scales_whatever_side_is_stored(made, size: int) -> None:
    """As Pillow does by bicubic interpolation, smaller and larger, square or not."""
    path, _, pixels = made
    found = set_images(load_distilled(str(path)), Preprocess(size, resize_mode="squash"))
    for row, image in zip(found, pixels, strict=True):
        scaled = Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(row.transpose(1, 2, 0), np.asarray(scaled))


def counted(path: Path) -> dict[str, int]:
    """Count the size of a set from its files alone."""
    folder = path / "distilled/imagefolder"
    images = [file for file in folder.iterdir() if file.suffix != ".jsonl"]
    rows = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
    texts = [json.loads(row)["text"] for row in rows if row]
    sides = [Image.open(file).size for file in images]
    found = {
        "pairs": len(texts),
        "image_bytes": sum(file.stat().st_size for file in images),
        "caption_bytes": sum(len(f"{text}\n".encode()) for text in texts),
        "pixels": sum(width * height for width, height in sides),
    }
    return {"bytes": found["image_bytes"] + found["caption_bytes"], **found}


def test_manifest_card_and_set_say_the_size(made) -> None:
    path, _, _ = made
    manifest = json.loads((path / "distilled/manifest.json").read_text())
    pairs = load_distilled(str(path))
    assert manifest["size"] == counted(path) == pairs.size().to_json()
    card = (path / "distilled/README.md").read_text("utf-8")
    assert f"| bytes of images and captions | {counted(path)['bytes']} |" in card
    assert f"| pixels | {counted(path)['pixels']} |" in card
    del pairs.manifest["size"]  # as of an earlier version
    assert pairs.size().to_json() == counted(path)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(st.tuples(st.text(max_size=80), st.integers(1, 24)), min_size=1, max_size=12),
    st.integers(1, 12_000),
    st.sampled_from(FORMATS),
)
def test_a_set_is_the_most_of_its_pairs_that_fit(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, int]],
    budget: int,
    format: str,
) -> None:
    captions = [text.encode("utf-8", "ignore").decode() for text, _ in pairs]
    images = [smooth(side, number) for number, (_, side) in enumerate(pairs)]
    path = tmp_path_factory.mktemp("budget")
    run = make_run(path, format, captions, images)
    sizes = [
        len(encode_image(image, format)) + len(caption.encode()) + 1
        for image, caption in zip(images, captions, strict=True)
    ]
    if sizes[0] > budget:
        with pytest.raises(ConfigError, match="the first pair alone has"):
            write_distilled(run, ABOUT, PDS_CARD, budget=budget)
        return
    counts = write_distilled(run, ABOUT, PDS_CARD, budget=budget)
    found = counted(path)
    kept = found["pairs"]
    assert counts["size"] == found
    assert found["bytes"] == sum(sizes[:kept]) <= budget
    assert kept == len(sizes) or sum(sizes[: kept + 1]) > budget
    distilled = load_distilled(str(path))
    assert distilled.captions == captions[:kept]
    assert len(distilled.image_prototypes) == kept
    assert distilled.manifest["about"]["counts"]["distilled pairs"] == kept


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_datasets_loads_an_export(format: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", format, ["a", "b"], [smooth(16), smooth(24)])
    write_distilled(run, ABOUT, PDS_CARD)
    export(str(tmp_path / "run"), "parquet", str(tmp_path / "out"))
    file = str(tmp_path / "out/data/train-00000-of-00001.parquet")
    table = datasets.Dataset.from_parquet(file, cache_dir=str(tmp_path / "cache"))
    expected = np.asarray(Image.open(run.images.full(run.image_name(1))))
    np.testing.assert_array_equal(np.asarray(table[1]["image"]), expected)
