"""Data sets of the Hugging Face hub, from its cache and from a stand-in of the hub."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pds_ray import catalog
from pds_ray.config import ReadConfig
from pds_ray.sources import hub
from pds_ray.sources.base import Sample, SourceError
from pds_ray.sources.splits import CONVERTED, find_split, find_splits, missing_parts
from tests.support.hub import COMMIT, TOKEN, cache, running_hub

NAME = "someone/pictures"


def parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    images = pa.array([{"bytes": text.encode(), "path": None} for text in texts])
    pq.write_table(pa.table({"image": images, "text": texts}), file)
    return file.getvalue()


FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "data/train-00000-of-00002.parquet": parquet("a", "b"),
    "data/train-00001-of-00002.parquet": parquet("c"),
    "data/validation-00000-of-00001.parquet": parquet("d"),
}


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub._look_up.cache_clear()
    return tmp_path


def texts(uri: str, **options: Any) -> list[str]:
    source = catalog.make_source(uri, ReadConfig(**options))
    items = [item for shard in source.shards() for item in source.read(shard)]
    assert all(isinstance(item, Sample) for item in items)
    assert [item.captions[0].encode() for item in items] == [item.image for item in items]
    return [item.captions[0] for item in items]


def test_a_data_set_in_the_cache_is_read_offline(hub_cache: Path) -> None:
    cache(hub_cache, NAME, FILES)
    assert texts(f"hf:{NAME}") == ["a", "b", "c"]
    assert texts(f"hf:{NAME}:val") == ["d"]
    source = catalog.make_source(f"hf:{NAME}")
    assert source.validation == f"hf:{NAME}:validation"
    assert catalog.make_source(f"hf:{NAME}:validation").validation is None
    assert [shard.name for shard in source.shards()] == [
        "train-00000-of-00002",
        "train-00001-of-00002",
    ]


def test_a_part_in_the_cache_is_not_taken_for_the_whole(hub_cache: Path) -> None:
    parts = {path: data for path, data in FILES.items() if "00001-of" not in path}
    cache(hub_cache, NAME, parts)
    with pytest.raises(
        SourceError, match=rf"1 of its files are not in the cache.*hf download {NAME}"
    ):
        catalog.make_source(f"hf:{NAME}").shards()


@pytest.mark.usefixtures("hub_cache")
def test_a_data_set_that_is_nowhere() -> None:
    with pytest.raises(
        SourceError, match=f"hf:{NAME} is not in the cache, and the hub does not give"
    ):
        catalog.make_source(f"hf:{NAME}").shards()


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (FILES, "dev2", f"{NAME} has no split dev2; give one of train, validation"),
        (
            {"a/test.parquet": parquet("x"), "b/val.parquet": parquet("y")},
            "",
            "has several splits; give one of test, validation",
        ),
        (
            {"train/00000.tar": b"", "train/00001.tar": b""},
            "",
            rf"has no Parquet files; its tar shards are hf://datasets/{NAME}/train/\*\.tar",
        ),
        (
            {"a.jpg": b"", "metadata.jsonl": b""},
            "",
            "has no Parquet files; fetch it with hf download",
        ),
    ],
)
def test_data_sets_that_cannot_be_used(
    hub_cache: Path, files: dict[str, bytes], split: str, message: str
) -> None:
    cache(hub_cache, NAME, files)
    with pytest.raises(SourceError, match=message):
        catalog.make_source(f"hf:{NAME}{split and ':'}{split}").shards()


@pytest.mark.parametrize("uri", ["hf:", "hf:name", "hf:a/b/c", "hf:a/b:c:d", "hf:a/b@"])
def test_bad_uri(uri: str) -> None:
    with pytest.raises(SourceError, match=r"is not hf:ORG/NAME\[@REVISION\]\[:SPLIT\]"):
        catalog.make_source(uri)


def declared(*configs: dict[str, Any]) -> dict[str, Any]:
    return {"configs": list(configs)}


SETS = {"split": "train", "path": "en/t-*"}, {"split": "val", "path": ["en/v.parquet"]}


@pytest.mark.parametrize(
    ("paths", "card", "expected"),
    [
        (["data/train-00000-of-00001-abc.parquet"], {}, {"train": [0]}),
        (
            ["train.parquet", "val.parquet", "dev_2.parquet"],
            {},
            {"train": [0], "validation": [1, 2]},
        ),
        (
            ["default/test/0000.parquet", "default/train/0000.parquet"],
            {},
            {"test": [0], "train": [1]},
        ),
        (["trained.parquet", "contest.parquet", "a.json"], {}, {"train": [0, 1]}),
        (["my_split-00000-of-00001.parquet"], {}, {"my_split": [0]}),
        (["latest/evaluation.PARQUET"], {}, {"test": [0]}),
        (
            ["en/t-1.parquet", "en/v.parquet", "fr/t-1.parquet"],
            declared({"config_name": "default", "data_files": list(SETS)}, {"config_name": "fr"}),
            {"train": [0], "val": [1]},
        ),
        (
            ["en/t-1.parquet", "fr/t-1.parquet"],
            declared({"config_name": "all", "data_files": "*/t-*.parquet"}),
            {"train": [0, 1]},
        ),
        (  # names that a card declares are taken to the letter
            ["a.parquet", "b.parquet", "c.parquet"],
            declared(
                {
                    "config_name": "x",
                    "data_files": [
                        {"split": split, "path": f"{file}.parquet"}
                        for split, file in (("test", "a"), ("eval", "b"), ("dev", "c"))
                    ],
                }
            ),
            {"test": [0], "eval": [1], "dev": [2]},
        ),
        (["train.parquet"], declared({"config_name": "x", "data_files": "*.json"}), {"train": [0]}),
        (  # the folder of a configuration
            ["en/test/0.parquet", "en/train/0.parquet", "fr/train/0.parquet"],
            declared(
                {"config_name": "en", "data_dir": "./en", "default": True},
                {"config_name": "fr", "data_dir": "fr"},
            ),
            {"test": [0], "train": [1]},
        ),
        (
            ["en/0.parquet", "fr/0.parquet"],
            declared({"config_name": "x", "data_dir": "fr", "data_files": "*.parquet"}),
            {"train": [1]},
        ),
    ],
)
def test_splits(paths: list[str], card: dict[str, Any], expected: dict[str, list[int]]) -> None:
    found = find_splits(paths, card, NAME)
    assert found == {
        split: sorted(paths[n] for n in numbers) for split, numbers in expected.items()
    }


@pytest.mark.parametrize(
    ("splits", "wanted", "found"),
    [
        (["test", "eval"], "eval", "eval"),
        (["test", "eval"], "testing", "test"),
        (["train", "dev"], "validation", "dev"),
        (["train", "validation"], "val", "validation"),
        (["train"], "validation", ""),
        (["Own"], "Own", "Own"),
    ],
)
def test_the_split_that_is_meant(splits: list[str], wanted: str, found: str) -> None:
    assert find_split(splits, wanted) == found


def test_several_configurations() -> None:
    card = declared(
        {"config_name": "en", "data_files": list(SETS)}, {"config_name": "fr", "data_files": []}
    )
    with pytest.raises(
        SourceError,
        match=rf"has 2 configurations \(en, fr\); .*parquet:hf://datasets/{NAME}/en/t-\*",
    ):
        find_splits(["en/t-1.parquet"], card, NAME)


def test_several_configurations_that_the_hub_converted() -> None:
    paths = ["en/test/0000.parquet", "en/train/0000.parquet", "fr/train/0000.parquet"]
    place = f"{NAME}@{CONVERTED}"
    with pytest.raises(
        SourceError,
        match=rf"has 2 configurations \(en, fr\); .*parquet:hf://datasets/{place}/en/train/\*",
    ):
        find_splits(paths, {}, place)
    assert find_splits(paths[:2], {}, place) == {"test": paths[:1], "train": paths[1:2]}


def test_missing_parts() -> None:
    assert missing_parts(["a-00000-of-00002.parquet", "a-00001-of-00002.parquet", "b.parquet"]) == 0
    assert missing_parts(["a-00000-of-00002.parquet", "b-00001-of-00009.parquet"]) == 9


SCRIPT = """
import json, sys
from pds_ray import catalog
source = catalog.make_source(sys.argv[1])
try:
    shards = source.shards()
    texts = [item.captions[0] for shard in shards for item in source.read(shard)]
    print(json.dumps([source.validation, [shard.version for shard in shards], texts]))
except Exception as error:
    print(json.dumps(f"{type(error).__name__}: {error}"))
"""


@pytest.mark.long
def test_a_data_set_on_the_hub(tmp_path: Path) -> None:
    """It is streamed: its versions are those of the cache, which stays empty."""

    def run(address: str, uri: str, token: str) -> Any:
        environment = os.environ | {
            "HF_ENDPOINT": address, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": token,
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, uri], env=environment, capture_output=True, text=True,
            check=True, timeout=120,
        )  # fmt: skip
        return json.loads(done.stdout)

    sets = [{"split": name, "path": f"data/{name}*"} for name in ("train", "val")]
    card = declared({"config_name": "default", "data_files": sets})
    with running_hub() as served:
        served.create(NAME, private=True, **FILES)
        served.cards[NAME] = card
        validation, versions, found = run(served.url, f"hf:{NAME}", TOKEN)
        assert (validation, found) == (f"hf:{NAME}:validation", ["a", "b", "c"])
        assert any(f"/resolve/{COMMIT}/data/train-00001" in request for request in served.requests)
        refused = run(served.url, f"hf:{NAME}", "hf_wrong")
        assert refused.startswith(
            f"SourceError: hf:{NAME} is not in the cache, and the hub does not"
        )
        assert "hf_wrong" not in refused
    cache(tmp_path / "cache", NAME, FILES)
    assert run("http://127.0.0.1:9", f"hf:{NAME}", "") == [validation, versions, found]
