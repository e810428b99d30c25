"""A shard whose disk fails while it is read; no Ray is started."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pyarrow as pa
import pytest

from pds_ray.distributed import embed
from pds_ray.sources.base import Fault, Sample, Shard, SourceError
from pds_ray.stages import embed as core


class FailingSource:
    """Ten samples; the reads fail after as many samples as told, those after them do not."""

    uri, validation = "failing", None

    def __init__(self, *failures: int) -> None:
        self.failures = list(failures)

    def shards(self) -> list[Shard]:
        return [Shard("s", "s")]

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        fails_after = self.failures.pop(0) if self.failures else None
        for number in range(10):
            if number == fails_after:
                raise OSError(errno.EIO, "Input/output error")
            yield Sample(f"{shard.name}{number}", b"picture", (f"caption {number}",))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Blocks of three samples; the waits between reads, which take no time here."""
    found: list[float] = []
    monkeypatch.setattr(core, "BLOCK_SAMPLES", 3)
    monkeypatch.setattr(embed.time, "sleep", found.append)
    return found


def test_a_shard_is_read_again_and_no_sample_comes_twice(waits: list[float]) -> None:
    reader = embed._Reader(FailingSource(4, 0, 8), Shard("s", "s"))
    table = pa.concat_tables(list(reader()))
    assert table.column("key").to_pylist() == [*(f"s{number}" for number in range(10)), ""]
    assert table.column("ordinal").to_pylist() == list(range(11))
    assert len(waits) == 3


def test_a_disk_that_goes_on_failing_ends_in_one_line(waits: list[float]) -> None:
    reader = embed._Reader(FailingSource(*[5] * 99), Shard("s", "/data/s.tar"))
    with pytest.raises(
        SourceError, match=r"^cannot read /data/s\.tar: .*Input/output error; the same command continues$"
    ):
        list(reader())
    assert len(waits) == len(embed.READ_RETRY_WAITS_S)
