"""Count the decoded images of a run that find their own prototype.

    python benchmarks/round_trip.py runs/demo

Each image of a distilled set is embedded with the run's encoder. It counts if its own image
prototype is the nearest of all, by cosine.
"""

from __future__ import annotations

import sys

import numpy as np

from pds_ray import catalog, load_distilled
from pds_ray.config import EmbedConfig
from pds_ray.stages.vectors import normalized


def main(run: str) -> None:
    """Print the count for the distilled set in `run`."""
    pairs = load_distilled(run)
    info = catalog.describe_encoder(EmbedConfig(encoder=pairs.manifest["about"]["encoder"]))
    encoder = catalog.load_encoder(info, "fp32")
    images = encoder.encode_images(
        np.stack([info.preprocess(pairs.image(pair)) for pair in range(len(pairs))])
    )
    similarity = normalized(images) @ normalized(pairs.image_prototypes).T
    found = int((similarity.argmax(axis=1) == np.arange(len(pairs))).sum())
    print(f"round trip: {found} of {len(pairs)} images find their own prototype")


if __name__ == "__main__":
    main(*sys.argv[1:])
