"""Training data in memory: every image of a source at one size, with its captions."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from pds_ray.catalog import make_source
from pds_ray.modalities.image import ImageError, Preprocess, decode_image
from pds_ray.sources.base import Fault, SourceError
from pds_ray.telemetry.progress import progress_bar


@dataclass(frozen=True)
class CaptionedImages:
    """Images and captions in the order of the source."""

    pixels: torch.Tensor
    """uint8 [N, 3, S, S]."""
    captions: list[tuple[str, ...]]
    """N tuples of at least one caption."""

    def __len__(self) -> int:
        return len(self.captions)


def load_captioned_images(uri: str, size: int) -> CaptionedImages:
    """Read a whole source, resized and cropped to `size` x `size` as open_clip does.

    Samples that cannot be used are left out and counted on stderr by reason. Raises SourceError if
    none is left.
    """
    source = make_source(uri)
    preprocess = Preprocess(size)
    pixels: list[np.ndarray] = []
    captions: list[tuple[str, ...]] = []
    faults: Counter[str] = Counter()
    with progress_bar("read", None, "images") as bar:
        for shard in source.shards():
            for sample in source.read(shard):
                bar.update(1)
                if isinstance(sample, Fault):
                    faults[sample.reason] += 1
                    continue
                try:
                    pixels.append(preprocess(decode_image(sample.image)))
                except ImageError as error:
                    faults[error.reason] += 1
                    continue
                captions.append(sample.captions)
    for reason, count in sorted(faults.items()):
        print(f"left out {count:,} samples of {uri}: {reason}", file=sys.stderr)
    if not pixels:
        raise SourceError(f"no usable image in {uri}")
    return CaptionedImages(
        torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), captions
    )


def to_signed(pixels: torch.Tensor) -> torch.Tensor:
    """Scale uint8 0..255 to float32 -1..1, the range of the CLIP, the VAE and the pipeline."""
    return pixels.float().div_(127.5).sub_(1)
