"""Images made to do harm: each is decoded or refused in bounded memory and time."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pds_ray.modalities.image import MAX_JPEG_SCANS, ImageError, decode_image
from tests.support.hostile import (
    encoded,
    gif,
    jpeg_with_scans,
    overlapping_exif,
    png,
    png_chunk,
    webp_canvas,
    zeros,
)

DECODE = """
import json, resource, sys
from pds_ray.modalities.image import ImageError, decode_image

def outcome(path):
    try:
        return "{} x {}".format(*decode_image(open(path, "rb").read()).size)
    except ImageError as error:
        return error.reason

for warm in sys.argv[2:6]:
    outcome(warm)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]),) * 2)
print(json.dumps([outcome(path) for path in sys.argv[6:]]))
"""


def outcomes(folder: Path, images: list[bytes], memory: int) -> list[str]:
    """Decode in a process that may take `memory` bytes more than it has when it starts."""
    small = Image.new("RGB", (8, 8))
    paths = []
    for number, data in enumerate(
        [*(encoded(small, fmt) for fmt in ("JPEG", "PNG", "WEBP", "GIF")), *images]
    ):
        paths.append(folder / str(number))
        paths[-1].write_bytes(data)
    command = [sys.executable, "-c", DECODE, str(memory), *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.stderr == ""
    return json.loads(done.stdout)


PIXELS = zeros(1 << 20)

REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "png of 30,000 x 30,000": (lambda: png(30_000, 30_000, pixels=PIXELS), "image_too_large"),
    "png of 2^31 x 2^31": (lambda: png(2**31 - 1, 2**31 - 1), "image_too_large"),
    "gif of 65,535 x 65,535": (lambda: gif(65_535, 65_535), "image_too_large"),
    "gif whose frame is larger than its screen": (
        lambda: gif(4, 4).replace(b",\0\0\0\0\1\0\1\0", b",\0\0\0\0\xff\xff\xff\xff"),
        "image_too_large",
    ),
    "jpeg of 65,500 x 65,500": (
        lambda: encoded(Image.new("L", (8, 8)), "JPEG").replace(
            b"\x00\x08\x00\x08\x01", b"\xff\xdc\xff\xdc\x01"
        ),
        "image_too_large",
    ),
    "jpeg of 5,000 scans": (lambda: jpeg_with_scans(64, 5_000), "undecodable_image"),
    "jpeg of 5,000 scans, hidden behind other markers": (
        lambda: jpeg_with_scans(64, 5_000, b"\xff\x01\xff\xff\xff\xff\xd0\xff\x00\xff\xfe\0\4ab"),
        "undecodable_image",
    ),
    "progressive jpeg that ends early": (
        lambda: encoded(Image.effect_noise((640, 480), 90), "JPEG", progressive=True)[:20_000],
        "undecodable_image",
    ),
    "a run of 0xff": (lambda: b"\xff\xd8" + b"\xff" * (1 << 20), "undecodable_image"),
}
READ: dict[str, tuple[Callable[[], bytes], str]] = {
    "png with a text of 256 MB": (
        lambda: png(8, 8, png_chunk(b"zTXt", b"k\0\0" + zeros(256 << 20)), pixels=PIXELS),
        "8 x 8",
    ),
    "png with an international text of 256 MB": (
        lambda: png(8, 8, png_chunk(b"iTXt", b"k\0\1\0\0\0" + zeros(256 << 20)), pixels=PIXELS),
        "8 x 8",
    ),
    "png with a colour profile of 256 MB": (
        lambda: png(8, 8, png_chunk(b"iCCP", b"k\0\0" + zeros(256 << 20)), pixels=PIXELS),
        "8 x 8",
    ),
    "png with 100 texts of a megabyte": (
        lambda: png(8, 8, png_chunk(b"zTXt", b"k\0\0" + zeros(1 << 20)[:-4]) * 100, pixels=PIXELS),
        "8 x 8",
    ),
    "png with far more pixels than declared": (lambda: png(8, 8, pixels=zeros(256 << 20)), "8 x 8"),
    "gif of a million frames": (lambda: gif(8, 8, frames=1_000_000), "8 x 8"),
    "webp of 100,000 frames": (lambda: webp_canvas(16, 100_000), "16 x 16"),
    "gif with a comment of 4 MB": (
        lambda: gif(8, 8, b"!\xfe" + (b"\xff" + b"c" * 255) * (1 << 14) + b"\0"),
        "8 x 8",
    ),
    "gif with 100,000 empty extensions": (lambda: gif(8, 8, b"!\xff\1x\0" * 100_000), "8 x 8"),
    **{
        f"{fmt} with EXIF of overlapping values": (
            lambda fmt=fmt, size=size: encoded(  # type: ignore[misc]
                Image.new("RGB", (8, 8)), fmt, exif=overlapping_exif(size)
            ),
            "8 x 8",
        )
        for fmt, size in (("PNG", 1_000_000), ("WEBP", 1_000_000), ("JPEG", 60_000))
    },
    "PNG to be turned, with EXIF of overlapping values": (
        lambda: encoded(Image.new("RGB", (8, 4)), "PNG", exif=overlapping_exif(1_000_000, 6)),
        "4 x 8",
    ),
}


@pytest.mark.long
def test_images_that_lie_cost_little_memory(tmp_path: Path) -> None:
    # 96 MB beyond what the interpreter has: the largest of these would take from 256 MB to 16 GB if
    # it were believed.
    attacks = {**REFUSED, **READ}
    found = outcomes(tmp_path, [make() for make, _ in attacks.values()], 96 << 20)
    assert dict(zip(attacks, found, strict=True)) == {
        name: expected for name, (_, expected) in attacks.items()
    }


@pytest.mark.long
def test_the_largest_image_there_may_be_takes_bounded_memory(tmp_path: Path) -> None:
    # 64 million pixels with transparency, at most 20 bytes a pixel; one pixel more is refused in no
    # memory at all
    row = b"\0" + b"\x40" * (4 * 8000)
    ihdr = png_chunk(b"IHDR", (8000).to_bytes(4) * 2 + b"\x08\x06\0\0\0")
    packer = zlib.compressobj(1)
    body = b"".join(packer.compress(row) for _ in range(8000)) + packer.flush()
    whole = b"\x89PNG\r\n\x1a\n" + ihdr + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    assert outcomes(tmp_path, [whole], 20 * 64_000_000) == ["8000 x 8000"]


def test_a_webp_canvas_is_refused_before_it_is_touched() -> None:
    # libwebp reserves two canvases, a gigabyte, as soon as it is opened; that costs memory only
    # when it is written to.
    code = """if True:
        import resource, sys
        from tests.support.hostile import webp_canvas
        from pds_ray.modalities.image import ImageError, decode_image
        decode_image(webp_canvas(16, 1))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            decode_image(webp_canvas(12_000, 1))
        except ImageError as error:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            print(error.reason, grown < 16 * 1024)
    """
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert (done.stderr, done.stdout) == ("", "image_too_large True\n")


@pytest.mark.parametrize(
    ("scans", "accepted"), [(MAX_JPEG_SCANS - 6, True), (MAX_JPEG_SCANS - 5, False)]
)
def test_scans_are_counted_to_the_end_of_the_image(scans: int, accepted: bool) -> None:
    data = jpeg_with_scans(64, scans)  # Pillow writes six for a grey image
    data += b"\xff\xda\0\2" * 1000  # what lies behind the image, such as a film, does not count
    data = (
        data[:2] + b"\xff\xe5" + (4002).to_bytes(2) + b"\xff\xda\0\2" * 1000 + data[2:]
    )  # nor does metadata
    if accepted:
        assert decode_image(data).size == (64, 64)
    else:
        with pytest.raises(
            ImageError, match=f"{MAX_JPEG_SCANS + 1} scans, at most {MAX_JPEG_SCANS}"
        ):
            decode_image(data)


@pytest.mark.parametrize("subsampling", [0, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_real_jpegs_have_few_scans(subsampling: int, progressive: bool) -> None:
    image = Image.merge("RGB", [Image.effect_noise((400, 300), sigma) for sigma in (20, 60, 90)])
    data = encoded(
        image,
        "JPEG",
        progressive=progressive,
        subsampling=subsampling,
        quality=95,
        restart_marker_rows=2,
    )
    assert decode_image(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()


def test_broken_metadata_does_not_flood_the_log() -> None:
    data = encoded(Image.new("RGB", (8, 8)), "PNG", exif=overlapping_exif(100_000))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        decode_image(data)
    assert seen == []
