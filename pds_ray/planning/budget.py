"""The cost model of a budget's stage (`methods.budget`)."""

from __future__ import annotations

from pds_ray.distributed.process import MODEL_THREADS
from pds_ray.planning.phases import Inputs, Phase, StageModel
from pds_ray.stages.budget import DRAWN, SAMPLE, SAMPLE_SHARDS, SHARES, savings


def _budget(inputs: Inputs) -> list[Phase]:
    shards = min(SAMPLE_SHARDS, inputs.work.shards)
    read = inputs.work.images * shards / inputs.work.shards
    images = float(min(SAMPLE, inputs.work.images))
    ways = len(savings(inputs.config.decode.image_size or inputs.size, inputs.config.decode))
    processors = 1 if inputs.figures["encode_images"].per == "GPU" else MODEL_THREADS
    # each side without loss, and as many ways with it: most often fewer
    looked_at = inputs.demand(
        "encode images", 2 * len(SHARES) * images, "encode_images", processors
    )
    drawn: Phase = ()
    if inputs.config.decode.decoder == "unclip":
        drawn = (inputs.demand("draw some", DRAWN, "draw", processors),)
    return [
        (inputs.demand("read the shards of the sample", read, "read", shards),),
        drawn,
        (inputs.demand("save in each way", ways * images, "save"),),
        (looked_at,),
    ]


BUDGET = StageModel(_budget, lambda _: 0.0)  # it writes a file of some kB
