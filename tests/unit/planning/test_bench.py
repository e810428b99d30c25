"""Counting a source from its first shard, and how spread becomes a range."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pds_ray import catalog
from pds_ray.planning import bench
from pds_ray.sources.base import Sample, SourceError


def tar(path: Path, samples: int, captioned: bool = True) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(picture, "JPEG")
    files = {"jpg": picture.getvalue(), **({"txt": b"teal"} if captioned else {})}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number in range(samples):
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("images", [1, 700, 1000, 20_000, 20_500])
def test_scenes_are_counted(images: int) -> None:
    """Five captions a picture, shards of 1,000."""
    work = bench.survey(f"scenes:{images}")
    assert (work.images, work.pairs, work.shards, work.remote) == (
        images,
        5 * images,
        -(-images // 1000),
        False,
    )


def test_drawn_pictures_have_bytes(tmp_path: Path) -> None:
    """As many as they and their captions take on a disk."""
    for shard in (source := catalog.make_source("scenes:100")).shards():
        for item in source.read(shard):
            assert isinstance(item, Sample)
            (tmp_path / f"{item.key}.png").write_bytes(item.image)
            (tmp_path / f"{item.key}.txt").write_text("".join(item.captions))
    written = [file.stat().st_size for file in tmp_path.iterdir()]
    assert (len(written), bench.survey("scenes:100").bytes) == (200, sum(written))


def test_tars_are_counted_by_the_first(tmp_path: Path) -> None:
    """By their bytes, headers and end marks included."""
    for number, samples in enumerate((200, 100, 400)):
        tar(tmp_path / f"{number}.tar", samples)
    work = bench.survey(str(tmp_path / "*.tar"))
    assert work.images == pytest.approx(700, rel=0.02)
    assert (work.pairs, work.shards, work.remote) == (work.images, 3, False)
    size = (tmp_path / "0.tar").stat().st_size
    assert 0 < work.bytes < 3.5 * size


def test_a_source_without_pairs(tmp_path: Path) -> None:
    tar(tmp_path / "0.tar", 3, captioned=False)
    with pytest.raises(SourceError, match="holds no captioned image"):
        bench.survey(str(tmp_path / "0.tar"))


def test_the_worst_makes_a_run_longer() -> None:
    rate, time = (
        bench._entry([3.0, 1.0, 2.0], "images", "core"),
        bench._entry([3.0, 1.0, 2.0], "s", "run"),
    )
    assert (rate["value"], rate["worst"], rate["best"], rate["repeats"]) == (2.0, 1.0, 3.0, 3)
    assert (time["value"], time["worst"], time["best"]) == (2.0, 3.0, 1.0)


def test_work_one_after_the_other() -> None:
    both = bench._one_after_the_other(
        bench._entry([30.0], "pairs", "core"), bench._entry([60.0], "pairs", "core")
    )
    assert both["value"] == pytest.approx(20.0)
