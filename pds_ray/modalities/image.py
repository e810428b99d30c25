"""Decode encoded bytes to an RGB image, or to one reason why not; resize it for an encoder."""

from __future__ import annotations

import hashlib
import io
import re
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, features

FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"),
    *(["AVIF"] if features.check("avif") else []),
)
"""The only decoders that are ever tried: each further one is more code open to hostile bytes."""

MAX_JPEG_SCANS = 100
"""Most passes over a progressive JPEG that are accepted; real ones have 10.

Each costs as much as a whole image and may take 10 bytes.
"""

_BEST: dict[str, dict[str, int]] = {"png": {}, "jpeg": {"optimize": True}, "webp": {"method": 6}}
"""Format of saved images -> options of Pillow, for smaller files; a PNG is as in earlier sets."""
SAVED_FORMATS = tuple(_BEST)

PNG_START, JPEG_START, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd9"
PNG_BALLAST = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
"""Chunks of a PNG that hold texts and the colour profile."""

# the markers that a length follows, and the end
_JPEG_SEGMENT = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])")


class ImageError(ValueError):
    """An image that cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        """One of `sources.base.REASONS`."""
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def decode_image(data: bytes, *, max_pixels: int = 64_000_000, min_side: int = 2) -> Image.Image:
    """Decode the (first) image in bytes of one of FORMATS: upright, RGB, laid on white.

    The size is checked in the header, before any pixel is decoded; Pillow's own pixel limit applies
    as well. Raises ImageError, and nothing else, whatever the bytes are.
    """
    try:
        with warnings.catch_warnings():
            # damaged metadata can give 65,535 warnings per image
            warnings.simplefilter("ignore", UserWarning)
            try:
                return _decode(data, max_pixels, min_side)
            except (OSError, ValueError) as error:
                return _decode(_mended(data, error), max_pixels, min_side)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = min(max_pixels, Image.MAX_IMAGE_PIXELS or max_pixels)
        raise ImageError("image_too_large", f"more than {limit:,} pixels") from error
    # Pillow documents OSError, ValueError and TypeError, but its parsers also let through what they
    # trip over: SyntaxError, EOFError, struct.error, zlib.error, IndexError, KeyError,
    # OverflowError, MemoryError... That list is not closed from one release to the next, and bad
    # bytes must cost one sample, so everything is taken here.
    except Exception as error:
        raise ImageError("undecodable_image", _describe(error)) from error


def resized(image: Image.Image, side: int) -> Image.Image:
    """Return an image as a square of `side` pixels, by LANCZOS unless it is one."""
    if image.size == (side, side):
        return image
    return image.resize((side, side), Image.Resampling.LANCZOS)


def encode_image(image: Image.Image, format: str, quality: int | None = None) -> bytes:
    """Return an RGB image as a file of one of SAVED_FORMATS.

    `quality`, from 1 to 100, is of JPEG and WebP, which lose something; a PNG has none.
    """
    options = dict(_BEST[format])
    if quality is not None:
        options["quality"] = quality
    buffer = io.BytesIO()
    image.save(buffer, format=format.upper(), **options)
    return buffer.getvalue()


def _decode(data: bytes, max_pixels: int, min_side: int) -> Image.Image:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _check_size(image.size, max_pixels, min_side)
        if image.format in ("JPEG", "MPO"):
            _check_scans(data)
        if image.format == "TIFF" and image.mode in ("I", "F"):
            raise ImageError("undecodable_image", f"a TIFF of pixels in mode {image.mode}")
        image.load()
        return _upright(_to_rgb(image), image)


def _mended(data: bytes, error: Exception) -> bytes:
    """Return an image without what kept it from being read and is no pixel of it.

    Raises `error` if there is no such thing.
    """
    if isinstance(error, ImageError):
        raise error
    if data.startswith(PNG_START) and "MAX_TEXT" in str(error):
        return _without_ballast(data)
    if data.startswith(JPEG_START) and "truncated" in str(error):
        begun = data.removesuffix(JPEG_END[:1])
        if _has_all_pixels(begun):
            return begun + JPEG_END
    raise error


def _without_ballast(png: bytes) -> bytes:
    kept, start = [PNG_START], len(PNG_START)
    while start < len(png):
        end = start + 12 + int.from_bytes(png[start : start + 4])
        if png[start + 4 : start + 8] not in PNG_BALLAST:
            kept.append(png[start:end])
        start = end
    return b"".join(kept)


def _has_all_pixels(jpeg: bytes) -> bool:
    """Return whether a JPEG lacks its end mark alone: its pixels are the same whatever follows."""
    pixels = set()
    for rest in (b"", b"\x55" * 16, b"\xaa" * 16):
        try:
            with Image.open(io.BytesIO(jpeg + rest + JPEG_END), formats=("JPEG",)) as image:
                pixels.add(hashlib.blake2b(image.tobytes()).digest())
        except OSError:
            return False
        if len(pixels) > 1:
            return False
    return True


def _check_size(size: tuple[int, int], max_pixels: int, min_side: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageError("image_too_large", f"{width} x {height} pixels, at most {max_pixels}")
    if min(size) < min_side:
        raise ImageError(
            "image_too_small", f"{width} x {height} pixels, each side at least {min_side}"
        )


def _check_scans(jpeg: bytes) -> None:
    scans, position = 0, 0
    while (marker := _JPEG_SEGMENT.search(jpeg, position)) and marker[1] != b"\xd9":
        scans += marker[1] == b"\xda"
        position = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2])
    if scans > MAX_JPEG_SCANS:
        raise ImageError("undecodable_image", f"{scans} scans, at most {MAX_JPEG_SCANS}")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16-bit grey: convert() would clip everything above 255 to white
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def _upright(rgb: Image.Image, source: Image.Image) -> Image.Image:
    """Return `rgb` turned as the EXIF orientation of `source` says."""
    try:
        orientation = source.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # the same open list; broken metadata does not make a good image bad
        return rgb
    if not isinstance(orientation, int) or orientation not in range(2, 9):
        return rgb
    # Pillow would also write the rest of the EXIF again, and raise where that is damaged: it is
    # shown the orientation alone.
    info, rgb.info = rgb.info, {}
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    upright = ImageOps.exif_transpose(rgb)
    upright.info = info
    return upright


def _describe(error: Exception) -> str:
    # Pillow names the BytesIO object, whose address differs from run to run
    if isinstance(error, Image.UnidentifiedImageError):
        return f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image"
    return f"{type(error).__name__}: {error}".removesuffix(": ")


@dataclass(frozen=True)
class Preprocess:
    """The resizing and cropping of an image to the pixels that an encoder takes.

    The pixels are those of open_clip's inference transform before its conversion to floats. Pillow
    only, so that decoding workers need no torch.
    """

    size: int
    interpolation: str = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill: int = 0

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Return the pixels of an RGB image, uint8 [size, size, 3]."""
        bilinear = self.interpolation == "bilinear"
        resample = Image.Resampling.BILINEAR if bilinear else Image.Resampling.BICUBIC
        if self.resize_mode == "squash":
            return np.asarray(image.resize((self.size, self.size), resample))
        if self.resize_mode == "shortest":
            image = _bounded(image)
        width, height = image.size
        if self.resize_mode == "longest":
            ratio = max(width / self.size, height / self.size)
            scaled = (round(width / ratio), round(height / ratio))
        elif width <= height:
            scaled = (self.size, int(self.size * height / width))
        else:
            scaled = (int(self.size * width / height), self.size)
        scaled = (max(1, scaled[0]), max(1, scaled[1]))
        if scaled != (width, height):
            image = image.resize(scaled, resample)
        left, top = (self._edge(side) for side in scaled)
        if (left, top) == (0, 0) and scaled == (self.size, self.size):
            return np.asarray(image)
        canvas = Image.new("RGB", (self.size, self.size), (self.fill,) * 3)
        canvas.paste(image, (-left, -top))
        return np.asarray(canvas)

    def _edge(self, side: int) -> int:
        """Return where the middle `size` pixels of a side begin.

        Below 0 where the side is padded, the odd pixel at the far end.
        """
        return -((self.size - side) // 2) if side < self.size else round((side - self.size) / 2)


MAX_ASPECT = 32
"""Longest side, in short sides, that `Preprocess` looks at."""


def _bounded(image: Image.Image) -> Image.Image:
    """Crop the middle of an image longer than MAX_ASPECT times its short side.

    Enlarged whole it would fill memory.
    """
    width, height = image.size
    limit = MAX_ASPECT * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, (width - limit) // 2), max(0, (height - limit) // 2)
    return image.crop((left, top, min(width, left + limit), min(height, top + limit)))
