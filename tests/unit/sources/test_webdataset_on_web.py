"""Shards on web servers, good and bad: what arrives is what was there, or one line says why."""

from __future__ import annotations

import io
import random
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from pds_ray.sources.base import Fault, MissingShardsError, Sample, SourceError, read_shard
from pds_ray.sources.listing import open_shard
from pds_ray.sources.shard_patterns import for_retrieval
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.store import calls
from pds_ray.store.calls import StorageError
from tests.support.web_server import Web, serving


def tar(first: int, count: int, size: int = 3000) -> bytes:
    """A tar of `count` samples, whose images are random bytes."""
    draw, data = random.Random(first), io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for number in range(first, first + count):
            for suffix, content in (("jpg", draw.randbytes(size)), ("txt", b"a caption")):
                member = tarfile.TarInfo(f"{number:05d}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return data.getvalue()


SHARDS = {f"/set/{number:05d}.tar": tar(100 * number, 8) for number in range(4)}


@pytest.fixture
def web() -> Web:
    return Web(dict(SHARDS))


@pytest.fixture
def host(web: Web, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(calls, "WAITS_S", (0.01,) * 3)
    with serving(web) as address:
        yield address


def content(source: WebDatasetSource) -> list[Sample | Fault]:
    return [item for shard in source.shards() for item in source.read(shard)]


@pytest.fixture
def truth(tmp_path: Path) -> list[Sample | Fault]:
    """What the same shards hold on a disk."""
    for name, data in SHARDS.items():
        (tmp_path / name.rpartition("/")[2]).write_bytes(data)
    return content(WebDatasetSource(f"{tmp_path}/*.tar"))


@pytest.mark.parametrize(
    "server",
    [
        {},
        {"head": True},
        {"ranges": False},
        {"sized": False, "ranges": False},
        {"cut_after": 20_000},
        {"cut_after": 7_001, "cuts": 3, "ranges": False},
        {"cut_after": 9_000, "cuts": 3, "ranges": False, "sized": False},
        {"refusals": [(503, {}), (500, {}), (429, {"Retry-After": "0"})]},
    ],
    ids=str,
)
def test_every_server_gives_the_same_samples(
    web: Web, host: str, truth: list[Sample | Fault], server: dict
) -> None:
    for name, value in server.items():
        setattr(web, name, value)
    source = WebDatasetSource(f"{host}/set/{{00000..00003}}.tar")
    assert content(source) == truth
    assert len(truth) == 32
    sizes = [shard.size for shard in source.shards()]
    assert sizes == [len(data) if web.sized else 0 for data in SHARDS.values()]


def test_a_broken_transfer_goes_on_where_it_stopped(web: Web, host: str) -> None:
    web.cut_after = 10_000
    (shard,) = (source := WebDatasetSource(f"{host}/set/00000.tar")).shards()
    web.requests.clear()
    assert len(list(source.read(shard))) == 8
    sent = len(SHARDS["/set/00000.tar"])
    ranges = [int(asked[6:-1]) for _, _, asked in web.requests if asked.endswith("-")]
    assert ranges == sorted(ranges)
    assert 0 < ranges[0] <= 10_000
    assert len(web.requests) <= 2 + sent // 10_000 + 1, "nothing is read twice"


def test_a_file_that_changes_under_the_transfer_is_no_mixture(web: Web, host: str) -> None:
    web.cut_after, web.cuts = 8_000, 1
    (shard,) = (source := WebDatasetSource(f"{host}/set/00000.tar")).shards()
    items = read_shard(source, shard)
    next(items)
    web.files["/set/00000.tar"] = tar(500, 8)
    with pytest.raises(
        SourceError, match=r"00000: the server fails at .* \(the file changed while"
    ):
        list(items)


def test_a_size_that_is_a_lie_is_one_line(web: Web, host: str) -> None:
    web.too_long = 5000
    data = SHARDS["/set/00000.tar"]
    with open_shard(f"{host}/set/00000.tar") as stream:
        assert stream.read(len(data)) == data
        with pytest.raises(
            StorageError, match=f"the transfer ended after {len(data)} of"
        ) as caught:
            stream.read(1)
    assert "\n" not in str(caught.value)


def test_a_shard_is_not_held_in_memory(web: Web, host: str) -> None:
    web.files["/large.tar"] = tar(0, 30, 2**20)
    (shard,) = (source := WebDatasetSource(f"{host}/large.tar")).shards()
    tracemalloc.start()
    for number, item in enumerate(source.read(shard)):
        assert isinstance(item, Sample)
        if number == 3:
            tracemalloc.reset_peak()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 29
    assert peak < 12 * 2**20


def test_shards_are_asked_for_side_by_side(web: Web, host: str) -> None:
    web.files = {f"/{number}.tar": b"" for number in range(24)}
    web.delay_s = 0.1
    assert len(WebDatasetSource(f"{host}/{{0..23}}.tar").shards()) == 24
    assert web.busiest > 8


def test_redirects_are_followed(web: Web, host: str, truth: list[Sample | Fault]) -> None:
    web.redirects = {"/old/00000.tar": f"{host}/set/00000.tar", "/circle.tar": "/circle.tar"}
    assert content(WebDatasetSource(f"{host}/old/00000.tar")) == truth[:8]
    with pytest.raises(SourceError, match="it redirects in a circle"):
        WebDatasetSource(f"{host}/circle.tar").shards()


def test_gaps_are_counted_and_a_list_takes_what_is_there(host: str, tmp_path: Path) -> None:
    with pytest.raises(MissingShardsError) as caught:
        WebDatasetSource(f"{host}/set/{{00000..00009}}.tar").shards()
    assert str(caught.value) == (
        f"6 of 10 shard patterns match nothing, the first is {host}/set/00004.tar (HTTP status "
        "404); 4 match: to take those, name them alone, in a list, @FILE"
    )
    assert len(caught.value.found) == 4
    (tmp_path / "list").write_text("".join(f"{host}{name}\n" for name in SHARDS))
    assert len(WebDatasetSource(f"@{tmp_path}/list").shards()) == 4


def test_a_list_on_the_server_names_its_neighbours(web: Web, host: str) -> None:
    web.files["/set/list.txt"] = "\ufeff00001.tar\n{00002..00003}.tar\n".encode()
    names = [shard.name for shard in WebDatasetSource(f"@{host}/set/list.txt").shards()]
    assert names == ["00001", "00002", "00003"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/set/*.tar", r"/set/\*\.tar: a web server lists no files; name them, as in \{00000"),
        ("/set/none.tar", r"^no tar shard matches \S+/set/none\.tar \(HTTP status 404\)$"),
    ],
)
def test_what_is_not_there_is_one_line(host: str, path: str, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        WebDatasetSource(host + path).shards()
    assert "\n" not in str(caught.value)


def test_a_server_that_goes_on_failing_is_one_line(web: Web, host: str) -> None:
    web.refusals = [(503, {})] * 4
    with pytest.raises(SourceError, match=r"the server fails at \S+ \(HTTP status 503 Service"):
        WebDatasetSource(f"{host}/set/00000.tar").shards()
    assert len(web.requests) == 4


def test_a_server_is_left_alone_as_long_as_it_asks(
    web: Web, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(calls.time, "sleep", pauses.append)
    web.refusals = [(429, {"Retry-After": "7"}), (503, {"Retry-After": "99999"})]
    assert len(WebDatasetSource(f"{host}/set/00000.tar").shards()) == 1
    # the server sleeps 0 s in the same process
    assert [pause for pause in pauses if pause] == [7.0, calls.LONGEST_PAUSE_S]


def test_a_signature_is_used_and_shown_nowhere(
    web: Web, host: str, truth: list[Sample | Fault]
) -> None:
    web.signature = "S3CR3T/+=="
    query = "?X-Amz-Expires=9&sig=S3CR3T%2F%2B%3D%3D"
    source = WebDatasetSource(" ".join(f"{host}{name}{query}" for name in SHARDS))
    assert content(source) == truth
    assert "S3CR3T" not in repr([source, *source.shards()])
    web.signature = "expired"
    with pytest.raises(MissingShardsError, match=r"00000\.tar \(HTTP status 403 Forb") as caught:
        source.shards()
    assert "S3CR3T" not in str(caught.value)
    (web.refusals, web.signature) = ([(500, {})] * 9, "")
    with pytest.raises(SourceError, match="HTTP status 500") as failed:
        WebDatasetSource(f"{host}/set/00000.tar{query}").shards()
    assert "S3CR3T" not in str(failed.value)


def test_a_folder_of_signed_shards_is_asked_once_what_it_is_for(web: Web, host: str) -> None:
    web.files["/set/dataset_type.txt"] = b"retrieval"
    uri = " ".join(f"{host}{path}?sig={number}" for number, path in enumerate(SHARDS))
    assert all(shard.version.endswith(" retrieval") for shard in WebDatasetSource(uri).shards())
    asked = [path for _, path, _ in web.requests if "dataset_type" in path]
    assert set(asked) == {"/set/dataset_type.txt"}
    assert len(asked) <= 3  # asked for, opened, read


def test_a_server_that_fails_does_not_say_what_shards_are_for(web: Web, host: str) -> None:
    shard = f"{host}/set/00000.tar"
    web.files["/set/dataset_type.txt"] = b"retrieval\n"
    web.refusals = [(500, {})] * 9
    with pytest.raises(SourceError, match=r"cannot look for .*dataset_type\.txt: .*status 500"):
        for_retrieval([shard])
    web.refusals = [(500, {})]
    assert for_retrieval([shard]) == {shard}
    web.signature = "needed"
    assert for_retrieval([shard]) == set()


def test_names_do_not_depend_on_the_signature(web: Web, host: str) -> None:
    web.files = {"/a/0.tar": b"", "/b/0.tar": b""}

    def names(signature: str) -> list[str]:
        uri = " ".join(f"{host}{path}?sig={signature}" for path in web.files)
        return [shard.name for shard in WebDatasetSource(uri).shards()]

    assert names("one") == names("two")
    assert len(set(names("one"))) == 2


@pytest.mark.parametrize("listed", [False, True])
def test_a_command_is_never_run(tmp_path: Path, listed: bool) -> None:
    command = f"pipe:touch {tmp_path}/ran"
    (tmp_path / "list").write_text(command)
    with pytest.raises(SourceError, match=r"^pipe: is a command, and pds-ray runs none; give the"):
        WebDatasetSource(f"@{tmp_path}/list" if listed else command).shards()
    assert not (tmp_path / "ran").exists()
