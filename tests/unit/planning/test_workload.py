"""The data and the machines of a plan, as a user names them, and the survey of a source."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pds_ray import catalog
from pds_ray.errors import ConfigError
from pds_ray.planning.workload import (
    Cluster,
    make_cluster,
    parse_count,
    parse_gpus,
    survey,
    web_workload,
)
from pds_ray.sources.base import Sample, SourceError
from tests.support.plans import MACHINE, MACHINE_HERE, machine


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("400M", 400_000_000),
        ("5.85B", 5_850_000_000),
        ("24k", 24_000),
        ("1", 1),
        ("1.5T", 1_500_000_000_000),
    ],
)
def test_counts(text: str, number: int) -> None:
    assert parse_count(text, "--pairs-in") == number


@given(st.integers(1, 10**17))
def test_whole_counts(number: int) -> None:
    assert parse_count(str(number), "") == pytest.approx(number, rel=1e-15)


@pytest.mark.parametrize(
    "text", ["", "0", "-4M", "M", "4 M", "4m", "1e9", "nan", "inf", "0.2", "400MM", "²", "1" * 30]
)
def test_bad_counts(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--pairs-in is .* such as 24k, 400M or 5\.85B") as error:
        parse_count(text, "--pairs-in")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("pairs", "terabytes", "shards"), [("400M", 9.6, 40_000), ("5.85B", 140, 585_000)]
)
def test_bytes_and_shards_of_web_data(pairs: str, terabytes: float, shards: int) -> None:
    work = web_workload(parse_count(pairs, ""), 1, parse_count("24k", ""))
    assert work.bytes / 1e12 == pytest.approx(terabytes, rel=0.005)
    assert work.shards == shards


@pytest.mark.parametrize(
    ("text", "gpus"), [("64xH100", (64, "H100")), ("8xa100", (8, "A100")), ("0", (0, ""))]
)
def test_gpus(text: str, gpus: tuple[int, str]) -> None:
    assert parse_gpus(text) == gpus


@pytest.mark.parametrize(
    "text", ["", "64", "H100", "0xH100", "64xH101", "64 x H100", "-1xH100", "1.5xH100", "64xH100x"]
)
def test_bad_gpus(text: str) -> None:
    with pytest.raises(ConfigError, match="NUMBERxKIND such as 64xH100, of B200") as error:
        parse_gpus(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", "NVIDIA L40"),
        ("NVIDIA RTX A1000", "NVIDIA RTX A1000"),
        ("NVIDIA A10", "NVIDIA A10"),
        ("NVIDIA GH200 480GB", "NVIDIA GH200 480GB"),
        ("L40S2", "L40S2"),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name: str, kind: str) -> None:
    """Another GPU has another peak: no peak is better than a wrong one."""
    assert make_cluster(None, None, machine("GPU", (name,))).gpu == kind


def test_clusters() -> None:
    assert make_cluster("64xH100", None, None) == Cluster(64, "H100", 512, 64)
    assert make_cluster("1xH100", 4, None) == Cluster(1, "H100", 4, 4)
    assert make_cluster(None, None, MACHINE) == MACHINE_HERE
    with pytest.raises(ConfigError, match="give --gpus"):
        make_cluster(None, None, None)
    with pytest.raises(ConfigError, match="give --cpus"):
        make_cluster("0", None, None)


# ---- surveys -----------------------------------------------------------------------------------


def write_tar(path: Path, samples: int, captioned: bool = True) -> None:
    image = io.BytesIO()
    Image.new("RGB", (32, 32), "teal").save(image, "JPEG")
    files = {"jpg": image.getvalue(), **({"txt": b"teal"} if captioned else {})}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
        for number in range(samples):
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                member.size = len(data)
                shard.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    ("images", "shards"), [(1, 1), (700, 1), (1000, 1), (20_000, 20), (20_500, 21)]
)
def test_scenes_are_counted(images: int, shards: int) -> None:
    """Scenes have five captions per image and 1,000 images per shard."""
    work = survey(f"scenes:{images}")
    assert (work.images, work.pairs, work.shards) == (images, 5 * images, shards)
    assert not work.remote


def test_rendered_images_have_bytes(tmp_path: Path) -> None:
    """Their bytes are those that they and their captions take on a disk."""
    for shard in (source := catalog.make_source("scenes:100")).shards():
        for item in source.read(shard):
            assert isinstance(item, Sample)
            (tmp_path / f"{item.key}.png").write_bytes(item.image)
            (tmp_path / f"{item.key}.txt").write_text("".join(item.captions))
    written = [file.stat().st_size for file in tmp_path.iterdir()]
    assert (len(written), survey("scenes:100").bytes) == (200, sum(written))


def test_tars_are_counted_by_the_first(tmp_path: Path) -> None:
    """Shards scale with their bytes, headers and end marks included."""
    for number, samples in enumerate((200, 100, 400)):
        write_tar(tmp_path / f"{number}.tar", samples)
    work = survey(str(tmp_path / "*.tar"))
    assert work.images == pytest.approx(700, rel=0.02)
    assert (work.pairs, work.shards, work.remote) == (work.images, 3, False)
    size = (tmp_path / "0.tar").stat().st_size
    assert 0 < work.bytes < 3.5 * size


def test_a_source_without_pairs(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", 3, captioned=False)
    with pytest.raises(SourceError, match="holds no captioned image"):
        survey(str(tmp_path / "0.tar"))
