"""Each form of `--source` in the table of the README gives the sample that it was given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfFileSystem, constants

from pds_ray import catalog
from pds_ray.sources import hub
from pds_ray.sources.base import Sample, read_shard
from tests.support import object_store
from tests.support.docs_pages import ROOT
from tests.support.hostile import tar_bytes
from tests.support.hub import TOKEN, cache, running_hub
from tests.support.web_server import Web, serving

IMAGE, CAPTION = b"an image", "a caption"
TAR = tar_bytes([("7.jpg", IMAGE), ("7.txt", CAPTION.encode())])


@dataclass
class Place:
    """The means by which a test puts the sample somewhere; closed after the test."""

    root: Path
    request: pytest.FixtureRequest
    patch: pytest.MonkeyPatch
    stack: ExitStack

    def write(self, name: str, data: bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path


def tar_on_disk(place: Place) -> str:
    place.write("00000.tar", TAR)
    return f"{place.root}/{{00000..00000}}.tar"


def tar_in_a_list(place: Place) -> str:
    place.write("00000.tar", TAR)
    return f"@{place.write('list.txt', b'00000.tar')}"


def tar_on_a_store(place: Place) -> str:
    port = place.request.getfixturevalue("s3_port")
    place.request.getfixturevalue("s3_login")
    object_store.client(port).put_object(
        Bucket=object_store.BUCKET, Key="readme/00000.tar", Body=TAR
    )
    return object_store.uri(port, "readme/*.tar")


def tar_on_the_web(place: Place) -> str:
    host = place.stack.enter_context(serving(Web({"/00000.tar": TAR})))
    return f"{host}/{{00000..00000}}.tar"


def tar_on_the_hub(place: Place) -> str:
    place.patch.setattr(constants, "HF_HUB_OFFLINE", False)
    HfFileSystem.clear_instance_cache()
    place.stack.callback(HfFileSystem.clear_instance_cache)
    place.patch.setenv("HF_TOKEN", TOKEN)
    server = place.stack.enter_context(running_hub())
    server.create("org/name", **{"00000.tar": TAR})
    return f"hf://datasets/org/name/*.tar?endpoint={server.url}"


def folder(place: Place) -> str:
    place.write("7.jpg", IMAGE)
    place.write("7.txt", CAPTION.encode())
    return f"folder:{place.root}"


def path_of_a_folder(place: Place) -> str:
    return folder(place).removeprefix("folder:")


def parquet(place: Place) -> str:
    table = pa.table({"image": [{"bytes": IMAGE, "path": None}], "caption": [CAPTION]})
    pq.write_table(table, place.root / "00000.parquet")
    return f"parquet:{place.root}/*.parquet"


def hub_data_set(place: Place) -> str:
    parquet(place)
    files = {"data/test-00000-of-00001.parquet": (place.root / "00000.parquet").read_bytes()}
    cache(place.root / "cache", "org/name", files)
    place.patch.setattr(constants, "HF_HUB_CACHE", str(place.root / "cache"))
    hub._look_up.cache_clear()
    return "hf:org/name@main:test"


def karpathy(place: Place, name: str, annotations: str, image: str) -> str:
    place.write(image, IMAGE)
    record = [{"image": image, "caption": CAPTION}]
    place.write(annotations, json.dumps(record).encode())
    return f"{name}:{place.root}:test"


def flickr30k(place: Place) -> str:
    return karpathy(place, "flickr30k", "flickr30k_test.json", "flickr30k-images/7.jpg")


def coco(place: Place) -> str:
    return karpathy(place, "coco", "coco_karpathy_test.json", "val2014/7.jpg")


def scenes(_: Place) -> str:
    return "scenes:1:2:0:1"


FORMS: dict[str, Callable[[Place], str]] = {
    "shards/{00000..00099}.tar": tar_on_disk,
    "@FILE": tar_in_a_list,
    "s3://BUCKET/*.tar": tar_on_a_store,
    "https://HOST/{00000..00099}.tar": tar_on_the_web,
    "hf://datasets/ORG/NAME/*.tar": tar_on_the_hub,
    "folder:FOLDER": folder,
    "FOLDER": path_of_a_folder,
    "parquet:PATTERN": parquet,
    "hf:ORG/NAME[@REVISION][:SPLIT]": hub_data_set,
    "flickr30k:ROOT[:SPLIT]": flickr30k,
    "coco:ROOT[:SPLIT]": coco,
    "scenes:N[:SEED[:NOISE[:SHARD]]]": scenes,
}


@pytest.fixture
def place(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Place]:
    with ExitStack() as stack:
        yield Place(tmp_path, request, monkeypatch, stack)


@pytest.mark.parametrize("form", FORMS)
def test_a_source_of_the_readme_reads(place: Place, form: str) -> None:
    source = catalog.make_source(FORMS[form](place))
    (shard,) = source.shards()
    (item,) = read_shard(source, shard)
    assert isinstance(item, Sample)
    if form.startswith("scenes:"):
        assert item.image.startswith(b"\x89PNG")
        assert len(item.captions) == 5
    else:
        assert (item.image, item.captions) == (IMAGE, (CAPTION,))


def test_these_are_the_forms_of_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, rest = text.partition("\n| `--source` |")
    table = rest.partition("\n\n")[0].splitlines()[2:]
    cells = [line.split(" | ")[0] for line in table]
    assert [form for cell in cells for form in re.findall("`(.+?)`", cell)] == [*FORMS]
