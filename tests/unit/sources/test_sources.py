"""All sources alike: how a URI chooses one, and what is asked of each."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pds_ray import catalog
from pds_ray.errors import ConfigError
from pds_ray.planning.workload import survey
from pds_ray.sources.base import Sample


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("scenes:10", "ScenesSource"),
        ("folder:{}", "FolderSource"),
        ("{}", "FolderSource"),
        ("parquet:{}/*.parquet", "ParquetSource"),
        ("hf:someone/pictures:test", "HubSource"),
        ("hf://datasets/someone/pictures/*.tar", "WebDatasetSource"),
        ("{}/*.tar", "WebDatasetSource"),
        ("flickr30k:{}", "KarpathySource"),
    ],
)
def test_the_uri_chooses_the_source(tmp_path: Path, uri: str, kind: str) -> None:
    assert type(catalog.make_source(uri.format(tmp_path))).__name__ == kind


@pytest.mark.parametrize("uri", ["sceens:300", "Scenes:300", "flickr:/data", "flickr30:/data:test"])
def test_a_misspelt_source_is_named(uri: str) -> None:
    scheme = uri.partition(":")[0]
    with pytest.raises(ConfigError, match=f"unknown source '{scheme}'; known: scenes, flickr30k"):
        catalog.make_source(uri)


@pytest.mark.parametrize(
    "uri", ["scene:*.tar", "scene:1.tar::b.tar", "s3://a/b.tar", "there:1.tar"]
)
def test_paths_with_a_colon_are_no_misspelt_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scene:1.tar").touch()
    for name in (uri, "scene:1.tar"):
        assert type(catalog.make_source(name)).__name__ == "WebDatasetSource"


def img2dataset(root: Path) -> None:
    """Write what img2dataset writes as `webdataset`, with a row for an image it did not get."""
    records = [
        {"key": f"{n:09d}", "caption": f"caption {n}", "status": "success", "url": f"http://x/{n}"}
        for n in range(3)
    ]
    with tarfile.open(root / "00000.tar", "w") as tar:
        for record in records:
            files = {
                "jpg": b"pixels",
                "json": json.dumps(record, indent=4).encode(),
                "txt": record["caption"].encode(),
            }
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{record['key']}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    lost = {"key": "000000003", "caption": "no", "status": "failed_to_download", "url": "http://x"}
    pq.write_table(pa.Table.from_pylist([*records, lost]), root / "00000.parquet")
    (root / "00000_stats.json").write_text("{}")


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/*"])
def test_the_shards_of_img2dataset(tmp_path: Path, pattern: str) -> None:
    """The table and the statistics beside a shard are no shards."""
    img2dataset(tmp_path)
    source = catalog.make_source(f"{tmp_path}{pattern}")
    (shard,) = source.shards()
    assert list(source.read(shard)) == [
        Sample(f"{n:09d}", b"pixels", (f"caption {n}",)) for n in range(3)
    ]


def test_a_plan_surveys_every_source(tmp_path: Path) -> None:
    image = b"x" * 1000
    (tmp_path / "beside").mkdir()
    for n in range(5):
        (tmp_path / "beside" / f"{n}.jpg").write_bytes(image)
        (tmp_path / "beside" / f"{n}.txt").write_text("a caption")
    table = pa.table({"image": pa.array([image] * 5, pa.binary()), "text": ["a caption"] * 5})
    pq.write_table(table, tmp_path / "a.parquet")
    for uri in (f"folder:{tmp_path}/beside", f"parquet:{tmp_path}/a.parquet"):
        work = survey(uri)
        assert (work.images, work.pairs, work.shards, work.remote) == (5, 5, 1, False)
        assert work.bytes == 5 * 1009
