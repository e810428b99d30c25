"""The start of an optimisation that no method makes, written by the driver."""

from __future__ import annotations

from pds_ray.methods.base import Counts, Run
from pds_ray.methods.start import noise_side
from pds_ray.modalities.image import encode_image
from pds_ray.stages import start as core
from pds_ray.store.distilled_set import load_distilled
from pds_ray.telemetry.progress import QUIET_S, progress_bar


def copy_set(run: Run) -> Counts:
    """Copy images, captions and prototypes of a finished set; return how many pairs it has."""
    folder, distilled = run.folder, load_distilled(run.config.distill.init)
    folder.images.delete_all()
    folder.save_prototypes(core.prototypes_of(distilled))
    with progress_bar("start", len(distilled), "pairs", delay_s=QUIET_S) as bar:
        for pair in range(len(distilled)):
            folder.images.write_bytes(folder.image_name(pair), core.as_png(distilled, pair))
            bar.update()
    captions = distilled.captions
    return {
        "prototypes": len(distilled),
        "pairs": len(distilled),
        "duplicate_captions": len(captions) - len(set(captions)),
    }


def draw_noise(run: Run) -> Counts:
    """Write an image of noise for each pair; return how many."""
    folder, pairs = run.folder, run.folder.pair_count()
    side = noise_side(run.config)
    folder.images.delete_all()
    with progress_bar("decode", pairs, "images", delay_s=QUIET_S) as bar:
        for pair in range(pairs):
            image = core.noise(run.config.seed, pair, side)
            folder.images.write_bytes(folder.image_name(pair), encode_image(image, "png"))
            bar.update()
    return {"images": pairs, "made": pairs}
