"""Decoding of encoded images: what comes out, and that nothing but ImageError is ever raised."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from pds_ray.modalities.image import FORMATS, ImageError, decode_image
from tests.fuzz import targets
from tests.support.hostile import encoded, png_chunk
from tests.support.strategies import mangled


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    )


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares a size and holds no pixels."""
    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", size) + png_chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunks


def refusal(data: bytes, **limits: int) -> str:
    with pytest.raises(ImageError) as caught:
        decode_image(data, **limits)
    return caught.value.reason


@pytest.mark.parametrize("fmt", FORMATS)
def test_takes_every_format(fmt: str) -> None:
    source = Image.new("RGB", (20, 10), (200, 30, 60))
    decoded = decode_image(encoded(source, fmt))
    assert (decoded.mode, decoded.size) == ("RGB", (20, 10))
    assert np.abs(np.asarray(decoded, int) - np.asarray(source, int)).max() <= 4


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_that_are_no_bytes_are_refused(mode: str) -> None:
    data = encoded(Image.new(mode, (4, 4)), "TIFF")
    with pytest.raises(ImageError, match=f"a TIFF of pixels in mode {mode}"):
        decode_image(data)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_without_its_end_mark_is_read(mode: str, progressive: bool) -> None:
    data = encoded(noise(64, 48).convert(mode), "JPEG", progressive=progressive)
    for lacking in (1, 2):  # half of the mark, or all of it
        assert decode_image(data[:-lacking]).tobytes() == decode_image(data).tobytes()
    for lacking in (4, 8, 20, 100, len(data) // 2):
        assert refusal(data[:-lacking]) == "undecodable_image"


@pytest.mark.parametrize("place", [33, -12])
@pytest.mark.parametrize(
    ("kind", "start"),
    [(b"zTXt", b"k\0\0"), (b"iTXt", b"k\0\1\0\0\0"), (b"iCCP", b"k\0\0"), (b"tEXt", None)],
)
def test_a_png_with_a_large_text_is_read(kind: bytes, start: bytes | None, place: int) -> None:
    data = encoded(noise(9, 7), "PNG")
    text = b"k\0" + bytes(65 << 20) if start is None else start + zlib.compress(bytes(2 << 20))
    assert decode_image(data[:place] + png_chunk(kind, text) + data[place:]) == noise(9, 7)


def test_lossless_pixels_are_kept() -> None:
    source = noise(17, 9)
    assert decode_image(encoded(source, "PNG")).tobytes() == source.tobytes()


@pytest.mark.parametrize("fmt", ["PPM", "ICO", "TGA"])
def test_refuses_other_formats(fmt: str) -> None:
    assert refusal(encoded(noise(16, 16), fmt)) == "undecodable_image"


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.1, 0.5, 0.9])
def test_refuses_truncated(fmt: str, kept: float) -> None:
    data = encoded(noise(64, 64), fmt)
    assert refusal(data[: int(kept * len(data))]) == "undecodable_image"


def test_gif_gives_its_first_frame() -> None:
    first, second = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
    data = encoded(first, "GIF", save_all=True, append_images=[second])
    assert decode_image(data).getpixel((3, 3)) == (255, 0, 0)


def test_cmyk_is_converted() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(np.array(decode_image(data).getpixel((8, 8))) - (255, 0, 0)).max() <= 5


def test_16_bit_grey_is_scaled() -> None:
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode_image(encoded(Image.fromarray(levels), "PNG")))
    assert (decoded == np.arange(256).reshape(16, 16, 1)).all()


def palette_with_transparency() -> bytes:
    image = Image.new("P", (4, 4), 0)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((1, 1), 1)
    return encoded(image, "PNG", transparency=1)


@pytest.mark.parametrize(
    ("data", "pixel", "expected"),
    [
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"), (0, 0), (255, 255, 255)),
        (encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 51)), "PNG"), (0, 0), (255, 204, 204)),
        (
            encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "WEBP", lossless=True),
            (0, 0),
            (255, 255, 255),
        ),
        (encoded(Image.new("LA", (4, 4), (0, 51)), "PNG"), (0, 0), (204, 204, 204)),
        (
            encoded(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
            (0, 0),
            (255, 255, 255),
        ),
        (palette_with_transparency(), (0, 0), (255, 0, 0)),
        (palette_with_transparency(), (1, 1), (255, 255, 255)),
        (encoded(Image.new("1", (4, 4), 1), "PNG"), (0, 0), (255, 255, 255)),
    ],
)
def test_transparency_is_laid_on_white(
    data: bytes, pixel: tuple[int, int], expected: tuple[int, ...]
) -> None:
    decoded = decode_image(data)
    assert (decoded.mode, decoded.getpixel(pixel)) == ("RGB", expected)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise(5, 3), "PNG", exif=exif.tobytes())
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    decoded = decode_image(data)
    assert (decoded.size, decoded.tobytes()) == (expected.size, expected.tobytes())


@pytest.mark.parametrize(
    "entry",
    [
        struct.pack(">HHIf", 0x010E, 11, 1, 0.5),  # a description that is a number
        struct.pack(">HHIi", 0x8769, 6, 2, -30),  # a directory that lies before the start
        struct.pack(">HHII", 0xA005, 16, 5, 0),
        struct.pack(">HHII", 0x011A, 7, 2, 0),  # a resolution that is text
    ],
)
def test_damaged_exif_beside_an_orientation_does_no_harm(entry: bytes) -> None:
    turned = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + turned + entry + bytes(60)
    data = encoded(noise(5, 3), "PNG", exif=exif)
    with pytest.raises(Exception):  # noqa: B017, PT011 - of many kinds
        ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    expected = noise(5, 3).transpose(Image.Transpose.ROTATE_270)
    decoded = decode_image(data)
    assert (decoded.size, decoded.tobytes()) == ((3, 5), expected.tobytes())


def test_a_turned_image_keeps_its_colour_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(noise(5, 3), "PNG", exif=exif.tobytes(), icc_profile=b"profile")
    decoded = decode_image(data)
    assert (decoded.size, decoded.info["icc_profile"]) == ((3, 5), b"profile")


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00"]
)
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_is_ignored(fmt: str, exif: bytes) -> None:
    assert decode_image(encoded(noise(5, 3), fmt, exif=exif)).size == (5, 3)


@pytest.mark.parametrize(
    "size", [(30_000, 30_000), (2**31 - 1, 2**31 - 1), (9_000, 8_000), (64_000_001, 1)]
)
def test_size_is_refused_before_decoding(size: tuple[int, int]) -> None:
    # No pixels follow these headers: a decoder that got as far as the pixels would call them
    # undecodable.
    assert refusal(png_header(*size)) == "image_too_large"


def test_pillows_own_warning_is_a_refusal() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = png_header(10_000, Image.MAX_IMAGE_PIXELS // 10_000 + 1)
        assert refusal(data, max_pixels=10**9) == "image_too_large"


@pytest.mark.parametrize(
    ("size", "reason"), [((1, 1), "image_too_small"), ((1, 50), "image_too_small"), ((2, 50), "")]
)
def test_small_side(size: tuple[int, int], reason: str) -> None:
    data = encoded(noise(*size), "PNG")
    assert (refusal(data) if reason else decode_image(data).size) == (reason or size)


def test_limits_are_arguments() -> None:
    data = encoded(noise(10, 10), "PNG")
    assert refusal(data, max_pixels=99) == "image_too_large"
    assert refusal(data, min_side=11) == "image_too_small"
    assert decode_image(data, max_pixels=100, min_side=10).size == (10, 10)


def test_errors_are_reproducible_and_pickle() -> None:
    # They cross process borders, and their details end up in files that must not differ from run to
    # run.
    errors = []
    for _ in range(2):
        with pytest.raises(ImageError) as caught:
            decode_image(b"nothing")
        errors.append(pickle.loads(pickle.dumps(caught.value)))  # noqa: S301
    assert (
        str(errors[0])
        == str(errors[1])
        == f"undecodable_image: not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    )


MAGIC = [
    *[b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x00\x01\x00\x00WEBP"],
    *[b"BM", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"\0\0\0\x1cftypavif"],
]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@settings(max_examples=200)
@given(
    mangled(
        st.sampled_from(list(targets.seeds("image")))
        | st.builds(bytes.__add__, st.sampled_from(MAGIC), st.binary(max_size=200))
    )
)
def test_any_bytes_give_an_image_or_an_image_error(data: bytes) -> None:
    targets.image(data)
