"""Cost models of the stages that method coverage has of its own."""

from __future__ import annotations

from pds_ray.planning.phases import Inputs, Phase, StageModel, distance_flop
from pds_ray.stages.cover import candidate_bytes, candidates_of, parts_of

GAINS_AGAIN = 12  # times that a candidate's gain is computed again, as counted: 9 to 19


def _whiten(inputs: Inputs) -> list[Phase]:
    work = inputs.work
    # outer products: as many FLOP as distances of all vectors to d centroids
    flop = distance_flop(work.images + work.pairs, inputs.dim, inputs.dim)
    sums = (
        inputs.demand("outer products", flop, "label"),
        inputs.demand("read vectors", work.images + work.pairs, "search_rows"),
        inputs.demand("schedule", work.shards, "tasks"),
        *inputs.over_network("read vectors", inputs.vector_bytes),
    )
    # each shard sends two float64 matrices to the driver, which adds them
    sent = 2 * 8.0 * inputs.dim**2 * work.shards
    return [sums, inputs.over_network("sums of shards", sent)]


def _whiten_disk_bytes(inputs: Inputs) -> float:
    return 2 * 4.0 * inputs.dim * (inputs.dim + 1)


def _whiten_store_bytes(inputs: Inputs) -> float:
    return 2 * inputs.cluster.cpus * 2 * 8.0 * inputs.dim**2  # results under way


def _candidates(inputs: Inputs) -> int:
    wanted = candidates_of(inputs.config.pairs, inputs.config.cover.candidates)
    return min(wanted, round(inputs.kept_images))


def _cover(inputs: Inputs) -> list[Phase]:
    """Return the phases of ranking, of gathering the candidates, and of picking in parts."""
    work, count, pairs = inputs.work, _candidates(inputs), inputs.config.pairs
    parts = parts_of(count)
    rank = (
        inputs.demand("rank images", work.pairs, "search_rows"),
        inputs.demand("schedule", work.shards, "tasks"),
    )
    gather = (
        inputs.demand("read vectors", work.images + work.pairs, "search_rows"),
        inputs.demand("whiten", distance_flop(2 * count, inputs.dim, inputs.dim), "label"),
        inputs.demand("schedule", work.shards, "tasks"),
        *inputs.over_network("read vectors", inputs.vector_bytes),
    )
    gains = (1 + GAINS_AGAIN) * distance_flop(count, count / parts, 2 * inputs.dim)
    herded = distance_flop(pairs * inputs.config.cover.herded, count / parts, 2 * inputs.dim)
    return [rank, gather, (inputs.demand("gains", gains + herded, "search", parts),)]


def _cover_disk_bytes(inputs: Inputs) -> float:
    return 2 * inputs.prototype_bytes + 3 * inputs.clusters * inputs.figures["text"].value


def _cover_store_bytes(inputs: Inputs) -> float:
    """Return the bytes of the candidates that tasks pick among, or that shards send if fewer."""
    return float(candidate_bytes(_candidates(inputs), inputs.dim))


WHITEN = StageModel(_whiten, _whiten_disk_bytes, _whiten_store_bytes)
COVER = StageModel(_cover, _cover_disk_bytes, _cover_store_bytes)
