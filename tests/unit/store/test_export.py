"""Exports of a distilled set, as the programs read them that they are for."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml
from PIL import Image

from pds_ray import load_distilled
from pds_ray.errors import ConfigError
from pds_ray.store import export as exporting
from pds_ray.store.calls import StorageError
from pds_ray.store.distilled_set import DistilledSetError
from pds_ray.store.export import FORMATS, export
from tests.support.hand_made_set import save_set
from tests.support.object_store import objects, uri
from tests.support.synthetic_run import HOSTILE, choose_instead, make_run

PAIRS = 6


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", PAIRS, captions=HOSTILE[:4]).path


@pytest.fixture(scope="module")
def selection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_run(tmp_path_factory.mktemp("runs") / "chosen", PAIRS).path
    choose_instead(path, "herding")
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def records(run: Path) -> list[dict]:
    lines = (run / "distilled/imagefolder/metadata.jsonl").read_text("utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def png(run: Path, pair: int) -> bytes:
    return (run / f"images/{pair:06d}.png").read_bytes()


def test_parquet_holds_images_captions_and_all_that_is_known(run: Path, tmp_path: Path) -> None:
    export(str(run), "parquet", str(tmp_path))
    table = pq.read_table(tmp_path / "data/train-00000-of-00001.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {"image": {"_type": "Image"}}
    assert table.column_names[:2] == ["image", "text"]
    for pair, (row, record) in enumerate(zip(table.to_pylist(), records(run), strict=True)):
        image = row.pop("image")
        assert image == {"bytes": png(run, pair), "path": record["file_name"]}
        assert row == {name: value for name, value in record.items() if name != "file_name"}


def test_parquet_is_cut_into_files_and_groups_of_rows(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = [len(png(run, pair)) for pair in range(PAIRS)]
    monkeypatch.setattr(exporting, "BYTES_PER_TABLE", sum(size[:4]))
    monkeypatch.setattr(exporting, "ROWS_PER_GROUP", 3)
    export(str(run), "parquet", str(tmp_path))
    files = sorted((tmp_path / "data").iterdir())
    assert [file.name for file in files] == [
        "train-00000-of-00002.parquet",
        "train-00001-of-00002.parquet",
    ]
    assert [pq.ParquetFile(file).num_row_groups for file in files] == [2, 1]
    pairs = [pq.read_table(file).column("pair").to_pylist() for file in files]
    assert pairs == [[0, 1, 2, 3], [4, 5]]


def test_parquet_of_a_selection_has_no_columns_of_prototypes(
    selection: Path, tmp_path: Path
) -> None:
    export(str(selection), "parquet", str(tmp_path))
    table = pq.read_table(tmp_path / "data/train-00000-of-00001.parquet")
    assert {"image", "text", "cosine", "caption_shard", "caption_key"} <= set(table.column_names)
    assert not {"image_cluster", "nearest_key", "members"} & set(table.column_names)
    assert table.column("image")[2].as_py()["bytes"] == png(selection, 2)


def test_webdataset_reads_the_tars(run: Path, tmp_path: Path) -> None:
    export(str(run), "webdataset", str(tmp_path))
    path = str(tmp_path / "webdataset/000000.tar")
    found = list(
        webdataset.WebDataset(path, shardshuffle=False)
        .decode("rgb8")
        .to_tuple("png", "txt", "json")
    )
    assert [text for _, text, _ in found] == [record["text"] for record in records(run)]
    assert [record for *_, record in found] == records(run)
    for pair, (image, *_) in enumerate(found):
        np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(png(run, pair)))))


@pytest.mark.parametrize("chosen", ["run", "selection"])
def test_an_imagefolder_is_a_distilled_set(
    chosen: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(chosen)
    export(str(run / "distilled"), "imagefolder", str(tmp_path))
    first, second = load_distilled(str(run)), load_distilled(str(tmp_path))
    assert (second.captions, second.records) == (first.captions, first.records)
    assert second.is_selection == first.is_selection
    np.testing.assert_array_equal(second.text_prototypes, first.text_prototypes)
    assert second.image_bytes(3) == png(run, 3)


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_names_the_files(run: Path, tmp_path: Path, form: str) -> None:
    export(str(run), form, str(tmp_path), place="me/pairs")
    text = (tmp_path / "README.md").read_text("utf-8")
    original = (run / "distilled/README.md").read_text("utf-8")
    front, body = yaml.safe_load(text.split("---\n")[1]), text.split("```", 2)[2]
    assert 'load_dataset("me/pairs", split="train")' in text
    assert body == original.split("```", 2)[2]  # all after the lines of code
    before = yaml.safe_load(original.split("---\n")[1])
    assert {**front, "configs": None} == {**before, "configs": None}
    (config,) = front["configs"]
    patterns = [f"{config['data_dir']}/*"] if "data_dir" in config else []
    patterns += [file["path"] for file in config.get("data_files", ())]
    data = {path for pattern in patterns for path in tmp_path.glob(pattern)}
    others = {tmp_path / name for name in ("README.md", "manifest.json", "prototypes.safetensors")}
    assert data == {path for path in tmp_path.rglob("*") if path.is_file()} - others


def test_a_card_that_a_person_edited_is_kept(run: Path, tmp_path: Path) -> None:
    export(str(run), "imagefolder", str(tmp_path / "a"))
    card = tmp_path / "a/README.md"
    text = card.read_text("utf-8").replace("license: other", "license: mit") + "\nThanks to all.\n"
    card.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))  # by an editor of Windows
    export(str(tmp_path / "a"), "parquet", str(tmp_path / "b"))
    made = (tmp_path / "b/README.md").read_text("utf-8")
    assert yaml.safe_load(made.split("---\n")[1])["license"] == "mit"
    assert made.endswith("\nThanks to all.\n")
    card.write_text("my pairs", "utf-8")
    with pytest.raises(DistilledSetError, match=r"a/README\.md is no data-set card"):
        export(str(tmp_path / "a"), "parquet", str(tmp_path / "b"))


@pytest.mark.parametrize("form", FORMATS)
def test_the_manifest_is_true_and_the_bytes_are_the_same_again(
    run: Path, tmp_path: Path, form: str
) -> None:
    manifest = export(str(run), form, str(tmp_path / "a"))
    files = content(tmp_path / "a")
    assert json.loads(files.pop("manifest.json")) == manifest
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    export(str(run), form, str(tmp_path / "b"))
    assert content(tmp_path / "b") == content(tmp_path / "a")


def test_another_export_is_replaced_whole(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    export(str(run), "imagefolder", str(tmp_path))
    manifest = export(str(run), "webdataset", str(tmp_path))
    assert content(tmp_path).keys() == {"notes.txt", "manifest.json", *manifest["files"]}


@pytest.mark.parametrize(
    "name", ["README.md", "prototypes.safetensors", "manifest.json", "data/other.csv"]
)
def test_files_of_others_are_not_overwritten(run: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(StorageError, match=rf"{name} is in the way, and no export wrote it"):
        export(str(run), "parquet", str(tmp_path))
    assert content(tmp_path) == {name: b"mine"}


def test_neither_a_run_nor_the_set_is_written_over(run: Path, tmp_path: Path) -> None:
    before = content(run)
    (tmp_path / "link").symlink_to(run / "distilled")
    for place, line in [
        (run, "is a run folder; give another --to"),
        (run / "distilled", "is the set itself; give another --to"),
        (tmp_path / "link", "is the set itself; give another --to"),
    ]:
        with pytest.raises(StorageError, match=line):
            export(str(run), "imagefolder", str(place))
    assert content(run) == before


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("damaged", ["imagefolder/000002.png", "webdataset/000000.tar"])
def test_a_damaged_set_is_not_exported(tmp_path: Path, form: str, damaged: str) -> None:
    run = make_run(tmp_path / "run", PAIRS).path
    export(str(run), form, str(tmp_path / "out"))
    before = content(tmp_path / "out")
    path = run / "distilled" / damaged
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    if (form == "webdataset") != damaged.startswith("webdataset"):
        export(str(run), form, str(tmp_path / "out"))
    else:
        with pytest.raises(DistilledSetError, match=f"{damaged} is not the file that was written"):
            export(str(run), form, str(tmp_path / "out"))
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("form", FORMATS)
def test_an_export_that_ends_half_way_is_replaced(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "write", lambda *_: 1 / 0)  # of the card, the last file but one
        with pytest.raises(ZeroDivisionError):
            export(str(run), form, str(out))
    assert content(out)
    with pytest.raises(DistilledSetError, match="it has no manifest"):
        load_distilled(str(out))
    export(str(run), "imagefolder", str(out))
    export(str(run), "imagefolder", str(tmp_path / "other"))
    assert content(out) == content(tmp_path / "other")


def test_a_set_without_card_and_tars(tmp_path: Path) -> None:
    """As another program may write it."""
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    made = save_set(tmp_path / "set", images, ["red", ""], np.eye(2))
    with pytest.raises(DistilledSetError, match="has not all of its tars; export it as parquet"):
        export(str(made), "webdataset", str(tmp_path / "out"))
    export(str(made), "parquet", str(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out/data")
    assert table.column("text").to_pylist() == ["red", None]
    front = (tmp_path / "out/README.md").read_text("utf-8").split("---\n")[1]
    assert yaml.safe_load(front)["configs"][0]["data_files"][0]["path"] == "data/train-*.parquet"


def test_only_an_imagefolder_is_read_back(run: Path, tmp_path: Path) -> None:
    export(str(run), "parquet", str(tmp_path))
    with pytest.raises(DistilledSetError, match="is an export as parquet, for other programs"):
        load_distilled(str(tmp_path))


def test_an_unknown_format_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--format is 'csv'; it must be one of parquet, webd"):
        export(str(run), "csv", str(tmp_path))


@pytest.mark.usefixtures("s3_login")
def test_an_export_on_an_object_store(run: Path, tmp_path: Path, s3_port: int) -> None:
    for form in ("parquet", "imagefolder"):
        export(str(run), form, uri(s3_port, "export"))
        export(str(run), form, str(tmp_path))
        assert objects(s3_port, "export") == content(tmp_path)


READ = """
import datasets, hashlib, json, sys
datasets.disable_progress_bars()
digest = lambda image: hashlib.sha256(image.tobytes()).hexdigest()
rows = []
for row in datasets.load_dataset(sys.argv[1], split="train"):
    row = {**row.get("json", {}), **row}
    image = row["image"] if "image" in row else row["png"]
    rows.append([row["text"] if "text" in row else row["txt"], row["pair"], digest(image)])
print(json.dumps(rows))
"""


@pytest.mark.long
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("chosen", ["run", "selection"])
def test_datasets_loads_the_folder_by_its_card(
    chosen: str, form: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In its own process, as the library reads offline mode and cache folder at import."""
    run = request.getfixturevalue(chosen)
    export(str(run), form, str(tmp_path / "out"))
    env = {**os.environ, "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(tmp_path / "out")],
        env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [
            record["text"],
            pair,
            hashlib.sha256(Image.open(io.BytesIO(png(run, pair))).tobytes()).hexdigest(),
        ]
        for pair, record in enumerate(records(run))
    ]
