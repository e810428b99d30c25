"""The cost model of experts: models trained on all images, whose weights are kept."""

from __future__ import annotations

from pds_ray.planning.phases import WRITE_TRIPS, Inputs, Phase, StageModel
from pds_ray.stages.experts import FLOAT_BYTES, STATES


def _rate(inputs: Inputs) -> str:
    """Return the figure of the rate of training, on GPUs or on cores."""
    return "train_on_gpu" if inputs.cluster.gpus else "train_on_core"


def _experts(inputs: Inputs) -> list[Phase]:
    """Return the phases of preparing images and captions, and of training side by side."""
    work, wish = inputs.work, inputs.config.experts
    prepare = (
        inputs.demand("read", work.images, "read"),
        inputs.demand("decode and resize", work.images, "preprocess"),
        inputs.demand("encode captions", work.pairs, "encode_captions"),
        *inputs.over_network("read", work.bytes),
    )
    visits = float(work.images) * wish.epochs * wish.count
    at_most = wish.count * (min(1.0, wish.gpus or 1.0) if inputs.cluster.gpus else wish.cpus)
    written = WRITE_TRIPS * wish.count * (wish.epochs + 1.0)
    train = (
        inputs.demand("train", visits, _rate(inputs), at_most),
        *inputs.round_trips("write snapshots", written, wish.count),
    )
    return [prepare, train]


def _disk_bytes(inputs: Inputs) -> float:
    """Return N (M + 1) P 4 bytes of N experts of M epochs and P weights, states, and pixels."""
    wish = inputs.config.experts
    snapshots = wish.count * (wish.epochs + 1 + STATES)
    side = wish.image_size or inputs.size
    pixels = inputs.work.images * 3.0 * side**2
    vectors = inputs.work.pairs * inputs.dim * float(FLOAT_BYTES)
    return snapshots * inputs.figures["expert"].value + pixels + vectors


EXPERTS = StageModel(_experts, _disk_bytes)
