"""Training data in memory: every picture of a source at one size, with its captions."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pds_ray.catalog import make_source
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.sources.base import Fault, SourceError
from pds_ray.telemetry.progress import progress_bar


@dataclass(frozen=True)
class CaptionedImages:
    """Pictures and captions in the order of the source."""

    pixels: torch.Tensor
    """uint8 [N, 3, S, S]."""
    captions: list[tuple[str, ...]]
    """N times at least one caption."""

    def __len__(self) -> int:
        return len(self.captions)


def load_captioned_images(uri: str, size: int) -> CaptionedImages:
    """Read a whole source, resized and cropped to `size` x `size` as open_clip does.

    Samples that cannot be used are left out and counted on stderr by reason. Raises SourceError if none is left.
    """
    source = make_source(uri)
    shards = source.shards()
    pixels: list[np.ndarray] = []
    captions: list[tuple[str, ...]] = []
    faults: Counter[str] = Counter()
    with progress_bar("read", None, "pictures") as bar:
        for shard in shards:
            for sample in source.read(shard):
                bar.update(1)
                if isinstance(sample, Fault):
                    faults[sample.reason] += 1
                    continue
                try:
                    pixels.append(np.asarray(resize_and_crop(decode_image(sample.image), size)))
                except ImageError as error:
                    faults[error.reason] += 1
                    continue
                captions.append(sample.captions)
    for reason, count in sorted(faults.items()):
        print(f"left out {count:,} samples of {uri}: {reason}", file=sys.stderr)
    if not pixels:
        raise SourceError(f"no usable picture in {uri}")
    return CaptionedImages(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), captions
    )


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre square of a picture whose shorter side is brought to `size` pixels (bicubic)."""
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1, which is what the CLIP, the VAE and the pipeline work on."""
    return pixels.float().div_(127.5).sub_(1)
