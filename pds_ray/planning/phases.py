"""Cost model of each stage: its phases, the bytes it writes and those it holds in the object store.

A stage starts, then goes through phases. The demands of a phase overlap; each asks one resource for
work. The constants at the end, one per stage, are named by the stages of a method.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from pds_ray.config import Actors, RunConfig
from pds_ray.distributed.process import MODEL_THREADS
from pds_ray.distributed.sizes import (
    ADDED_TOGETHER,
    BLOCK_BYTES,
    CELL_BYTES,
    ENCODED_TOGETHER,
    FILES_PER_TASK,
    LOOKED_UP_TOGETHER,
    SUMS_BYTES,
    TARS_AT_ONCE,
    additions,
    additions_at_once,
    cluster_ranges,
    column_seconds,
    decoded_where_read,
    executions,
    fit_tasks,
    groups_each,
    match_ranges,
    pixel_block_bytes,
    pool_size,
    product_seconds,
    sum_task_count,
    table_ranges,
    task_count,
    task_places,
)
from pds_ray.planning.figures import Estimate, Figures
from pds_ray.planning.workload import Cluster, Workload
from pds_ray.stages.assign import CORE_LIMIT, is_dense
from pds_ray.stages.captions import LONGEST_LIST
from pds_ray.stages.cluster import SEED_LIMIT, sample_share
from pds_ray.stages.lloyd import START_ROUNDS
from pds_ray.stages.materialize import IMAGES_TOGETHER, PAIRS_PER_TAR
from pds_ray.store.calls import CALLS_AT_ONCE, is_remote
from pds_ray.store.storage import ROW_GROUP

FIT_GPUS = (
    4.0  # of a machine, at most: FAISS's wiki has 8 GPUs fit a k-means 3.9 times as fast as one
)
# of a pair on the driver, as Python's objects: caption, keys and members; the record of the set
NAMES_BYTES, RECORD_BYTES = 1_500, 5_000
ROW_GROUP_COPIES = 9  # of vectors that Parquet decodes, number by number with their levels
QUEUED_BLOCKS = 4  # per actor: waiting for it, or in its hands
# requests to an object store: is a file there, read it, write it
LOOK_TRIPS, READ_TRIPS, WRITE_TRIPS = 2, 2, 4


@dataclass(frozen=True)
class Demand:
    """Work for one resource."""

    what: str
    work: float
    """In the unit of the rate."""
    rate: Estimate
    at_most: float | None = None
    """Cores, GPUs or connections that can share it; None if all can."""

    @property
    def unit_seconds(self) -> float:
        """Seconds of one core, GPU, ..."""
        return self.work / self.rate.value


Phase = tuple[Demand, ...]


@dataclass(frozen=True)
class Inputs:
    """Everything that the model of a stage depends on."""

    config: RunConfig
    work: Workload
    cluster: Cluster
    figures: Figures
    dim: int
    """Width of an embedding."""
    size: int
    """Side of an image that the encoder takes, in pixels."""

    @property
    def clusters(self) -> int:
        """Clusters of a k-means: one per pair of the distilled set."""
        return self.config.pairs

    @property
    def kept_pairs(self) -> int:
        """Pairs that pruning keeps."""
        return self.work.pairs - int(self.config.prune.ratio * self.work.pairs)

    @property
    def kept_images(self) -> float:
        """Images that keep a caption, if captions are dropped independently of each other."""
        dropped = self.config.prune.ratio ** (self.work.pairs / self.work.images)
        return self.work.images * (1 - dropped)

    @property
    def vector_bytes(self) -> float:
        """Bytes of all embeddings, as stored."""
        width = 2 if self.config.embed.store_dtype == "float16" else 4
        return float(self.work.images + self.work.pairs) * self.dim * width

    @property
    def pixel_bytes(self) -> float:
        """Bytes of all images as the encoder takes them."""
        return float(self.work.images) * 3 * self.size**2

    @property
    def prototype_bytes(self) -> float:
        """Bytes of one float32 vector per cluster."""
        return self.clusters * self.dim * 4.0

    def actors(self, wish: Actors, on_gpu: bool = True) -> int:
        """Return the number of actors of a pool that find room."""
        cluster = self.cluster
        workers, _ = pool_size(wish, cluster.gpus, cluster.cpus, cluster.node_cpus, on_gpu)
        return min(workers, int(cluster.gpus / wish.gpus)) if on_gpu and wish.gpus else workers

    def shared_by(self, wish: Actors) -> float:
        """Return the GPUs, or cores, that a pool of models can use.

        A model uses one GPU, however many its actor has.
        """
        actors = self.actors(wish)
        if self.cluster.gpus:
            return min(self.cluster.gpus, actors * min(1.0, wish.gpus or 1.0))
        return MODEL_THREADS * actors

    def demand(self, what: str, work: float, figure: str, at_most: float | None = None) -> Demand:
        """Return a demand at the rate of a named figure."""
        return Demand(what, work, self.figures[figure], at_most)

    def products(self, what: str, flop: float, figure: str) -> Demand:
        """Return the demand for products of vectors: of GPUs, or of cores at a named figure."""
        return self.demand(what, flop, "products" if self.cluster.gpus else figure)

    def product_seconds(self, rows: int, others: int, width: int) -> float:
        """Return about how long the products of the vectors of a shard take; `rows` are of all."""
        device = "cuda" if self.cluster.gpus else "cpu"
        return product_seconds(rows / self.work.shards, others, width, device)

    def over_network(self, what: str, bytes_: float) -> Phase:
        """Return the demand for traffic; none if all is on a disk."""
        return (self.demand(what, bytes_, "network"),) if self.work.remote else ()

    def round_trips(self, what: str, trips: float, at_once: float) -> Phase:
        """Return the demand for requests to the store of the run folder; none of a disk.

        Without a run folder the store is that of the source.
        """
        remote = is_remote(self.config.out) if self.config.out else self.work.remote
        return (self.demand(what, trips, "round_trips", at_once),) if remote else ()

    def hashes(self, files: int) -> Phase:
        """Return the demand for reading the files of a stage once more, to hash them.

        Tasks share them if there are many.
        """
        tasks = min(max(1.0, files / FILES_PER_TASK), self.cluster.cpus)
        at_once = CALLS_AT_ONCE * tasks
        return self.round_trips("hash the files", READ_TRIPS * files, at_once)


@dataclass(frozen=True)
class StageModel:
    """Cost model of one stage."""

    phases: Callable[[Inputs], list[Phase]]
    disk_bytes: Callable[[Inputs], float]
    """Bytes written, to stay."""
    store_bytes: Callable[[Inputs], float] = lambda _: 0.0
    """Bytes in Ray's object store, in the whole cluster: blocks and results under way, and what is
    sent to each machine."""
    driver_bytes: Callable[[Inputs], float] = lambda _: 0.0
    """Bytes of the driver's own memory, beyond what it takes to start."""


def _whole_shards(inputs: Inputs) -> bool:
    return decoded_where_read(inputs.work.shards, inputs.cluster.cpus)


def _pixel_block_bytes(inputs: Inputs) -> int:
    return pixel_block_bytes(_whole_shards(inputs), inputs.cluster.gpus > 0)


def _encoded_blocks(work: Workload) -> float:
    return max(work.shards, work.bytes / BLOCK_BYTES)


def decoded_blocks(inputs: Inputs) -> float:
    """Return the number of blocks for the encoders; each leaves its tables in the store."""
    read = inputs.work.shards if _whole_shards(inputs) else _encoded_blocks(inputs.work)
    return max(read, inputs.pixel_bytes / _pixel_block_bytes(inputs))


def embed_tasks(inputs: Inputs) -> float:
    """Return the number of Ray Data's tasks.

    One read per shard, which decodes it or is followed by one decode per block of encoded images;
    one encode per decoded block.
    """
    work = inputs.work
    decodes = 0.0 if _whole_shards(inputs) else _encoded_blocks(work)
    return work.shards + decodes + decoded_blocks(inputs)


def _embed(inputs: Inputs) -> list[Phase]:
    work, wish = inputs.work, inputs.config.ray.embed_actors
    together, actors = inputs.shared_by(wish), inputs.actors(wish)
    processes = executions(inputs.config.ray.executions, inputs.cluster.cpus, actors, work.shards)
    # an actor writes its tables side by side, and encodes meanwhile
    written = WRITE_TRIPS * decoded_blocks(inputs)
    scheduled = embed_tasks(inputs) / processes
    phase = (
        inputs.demand("read", work.images, "read"),
        inputs.demand("decode and resize", work.images, "preprocess"),
        inputs.demand("encode images", work.images, "encode_images", together),
        inputs.demand("encode captions", work.pairs, "encode_captions", together),
        inputs.demand("commit", work.pairs, "commit"),
        *inputs.round_trips("write tables", written, actors),
        inputs.demand("schedule blocks of an execution", scheduled, "blocks"),
        inputs.demand("schedule commits", work.shards, "tasks"),
        *inputs.over_network("read and write", work.bytes + inputs.vector_bytes),
    )
    return [phase, *_groups_of_shards(inputs, processes)]


def _groups_of_shards(inputs: Inputs, processes: int) -> list[Phase]:
    """Return the phase in which encoders load again, for all groups of an execution but one."""
    groups = groups_each(inputs.work.shards, processes)
    load = inputs.figures["start_embed"]
    per_s = replace(
        load,
        value=1 / load.value,
        worst=1 / load.worst,
        best=1 / load.best,
        unit="groups",
        per="driver",
    )
    return [(Demand("load the encoders for more shards", groups - 1.0, per_s),)] * (groups > 1)


def _embed_disk_bytes(inputs: Inputs) -> float:
    return inputs.vector_bytes + inputs.work.pairs * inputs.figures["text"].value


def _embed_store_bytes(inputs: Inputs) -> float:
    actors = inputs.actors(inputs.config.ray.embed_actors)
    blocks = inputs.cluster.cpus + QUEUED_BLOCKS * actors
    return min(blocks * _pixel_block_bytes(inputs), inputs.pixel_bytes + inputs.work.bytes)


def _prune(inputs: Inputs) -> list[Phase]:
    work = inputs.work
    each = task_count(work.shards, column_seconds(work.pairs / work.shards))
    passes = (
        inputs.demand("four passes over the cosines", work.pairs, "prune"),
        inputs.demand("schedule", 4.0 * each, "tasks"),
    )
    return [passes, inputs.hashes(inputs.work.shards)]


def _prune_disk_bytes(inputs: Inputs) -> float:
    return inputs.work.pairs / 8  # a bit per pair


def distance_flop(rows: float, clusters: float, dim: int) -> float:
    """Return the FLOP of the distances (or cosines) of all rows to all centroids."""
    return 2.0 * rows * clusters * dim


def _stored_rows(inputs: Inputs, space: str) -> int:
    return inputs.work.images if space == "image" else inputs.work.pairs


def _width(inputs: Inputs, space: str) -> int:
    return 2 * inputs.dim if space == "joint" else inputs.dim


def _sample_rows(inputs: Inputs, space: str) -> float:
    """Return the number of training vectors of a k-means."""
    rows = inputs.kept_images if space == "image" else inputs.kept_pairs
    width, config = _width(inputs, space), inputs.config.cluster
    return rows * sample_share(round(rows), width, config, inputs.clusters)


def _sample(inputs: Inputs, space: str) -> Phase:
    what = f"sample {space} vectors"
    return (
        inputs.demand(what, _stored_rows(inputs, space), "sample"),
        *inputs.over_network(what, inputs.vector_bytes / 2),
    )


def _fit(inputs: Inputs, space: str) -> Demand:
    """Return the demand of one k-means: its iterations, in one task."""
    config, rows = inputs.config.cluster, _sample_rows(inputs, space)
    distances = distance_flop(rows, inputs.clusters, _width(inputs, space))
    flop = distances * (config.iterations + 1) * config.restarts
    on_gpu, cluster = inputs.figures["fit"].per == "GPU", inputs.cluster
    gpus = min(FIT_GPUS, max(1.0, cluster.gpus / cluster.units("node")))
    processors = gpus if on_gpu else cluster.node_cpus
    return inputs.demand(f"fit {space} k-means", flop, "fit", processors)


def _draw_seeds(inputs: Inputs, space: str) -> Phase:
    """Return the demand of FAISS's start from many clusters: one core compares all pairs."""
    if inputs.clusters <= SEED_LIMIT:
        return ()
    work = float(inputs.clusters) ** 2 * _width(inputs, space) * inputs.config.cluster.restarts
    return (inputs.demand(f"draw {space} seeds", work, "seeds", 1),)


def _fits(inputs: Inputs) -> list[Phase]:
    """Return the phases of all k-means.

    Those of one node each are side by side on several nodes, else one after the other, as those of
    all nodes are.
    """
    spaces = inputs.config.cluster.spaces
    samples = [_sample(inputs, space) for space in spaces]
    if inputs.config.cluster.solver == "distributed":
        return [
            phase
            for sample, space in zip(samples, spaces, strict=True)
            for phase in (sample, *_iterations(inputs, space))
        ]
    seeds = [_draw_seeds(inputs, space) for space in spaces]
    fits = [_fit(inputs, space) for space in spaces]
    if inputs.cluster.units("node") < len(spaces):
        return [
            phase
            for sample, drawn, fit in zip(samples, seeds, fits, strict=True)
            for phase in (sample, drawn, (fit,))
        ]
    return [*samples, tuple(demand for drawn in seeds for demand in drawn), tuple(fits)]


@dataclass(frozen=True)
class _SharedOut:
    """An iteration of a k-means over all nodes."""

    rows: float
    tasks: int
    """Tasks that label and sum vectors."""
    added: int
    """Tasks that add their sums up."""
    sums_bytes: float
    """Bytes of the sums of all tasks."""


def _shared_out(inputs: Inputs, space: str) -> _SharedOut:
    cluster, clusters, width = inputs.cluster, inputs.clusters, _width(inputs, space)
    rows, device = _sample_rows(inputs, space), "cuda" if cluster.gpus else "cpu"
    places = task_places(cluster.cpus, cluster.gpus)
    tasks = fit_tasks(rows, clusters, width, places, device)
    # clusters that the rows of a task are of, if these are drawn independently of each other
    touched = clusters * (1 - math.exp(-rows / tasks / clusters))
    added = cluster_ranges(clusters, width) * max(1, additions(tasks))
    return _SharedOut(rows, tasks, added, 8.0 * tasks * touched * width)


def _iterations(inputs: Inputs, space: str) -> list[Phase]:
    """Return the phases of a k-means over all nodes: labels and sums, then the centroids.

    Of each there are as many as iterations, with one for the objective at the end and one for the
    start from many clusters.
    """
    config, width = inputs.config.cluster, _width(inputs, space)
    one, drawn = _shared_out(inputs, space), inputs.clusters > SEED_LIMIT
    passes = (config.iterations + 1 + drawn) * config.restarts
    draws = drawn * config.restarts * 2 * (START_ROUNDS - 1) * one.tasks
    tasks = one.tasks + one.added + draws / passes
    flop = distance_flop(one.rows, inputs.clusters, width) * passes
    labels = inputs.products(f"label {space} vectors", flop, "label")
    at_once = min(one.tasks, inputs.cluster.gpus) if inputs.cluster.gpus else one.tasks
    nodes, centroids = inputs.cluster.units("node"), 4.0 * inputs.clusters * width
    sent = (nodes * centroids + one.sums_bytes) * passes if nodes > 1 else 0.0
    return [
        (
            replace(labels, at_most=at_once),
            inputs.demand(f"sum {space} vectors", one.rows * passes, "fit_rows", one.tasks),
            inputs.demand("add sums", one.sums_bytes * passes, "add", one.added),
            inputs.demand("schedule", tasks * passes, "tasks"),
            *((inputs.demand("send centroids and sums", sent, "network"),) if sent else ()),
        ),
        (inputs.demand("collect centroids", centroids * passes, "collect"),),
    ]


def _cluster(inputs: Inputs) -> list[Phase]:
    spaces = inputs.config.cluster.spaces
    flop = sum(
        distance_flop(_stored_rows(inputs, space), inputs.clusters, _width(inputs, space))
        for space in spaces
    )
    work = inputs.work
    shard_s = inputs.product_seconds(work.images + work.pairs, inputs.clusters, inputs.dim)
    tasks = task_count(work.shards, shard_s)
    labels = (
        inputs.products("distances of labels", flop, "label"),
        inputs.demand("read vectors, write labels", work.pairs, "label_rows"),
        inputs.demand("schedule", tasks, "tasks"),
        *inputs.over_network("read vectors", inputs.vector_bytes),
    )
    return [*_fits(inputs), labels, inputs.hashes(inputs.work.shards)]


def _cluster_disk_bytes(inputs: Inputs) -> float:
    return 8.0 * inputs.work.pairs + 2 * inputs.prototype_bytes  # two int32 labels per pair


def _cluster_store_bytes(inputs: Inputs) -> float:
    """Return the bytes of the samples at one time, or of the centroids on every node if more.

    A k-means over all nodes has sums and centroids there besides its sample.
    """
    spaces, nodes = inputs.config.cluster.spaces, inputs.cluster.units("node")
    samples = [
        4.0 * math.prod((_sample_rows(inputs, space), _width(inputs, space))) for space in spaces
    ]
    if inputs.config.cluster.solver == "distributed":
        sums = [_shared_out(inputs, space).sums_bytes for space in spaces]
        return max(map(sum, zip(samples, sums, strict=True))) + nodes * inputs.prototype_bytes
    together = max(samples) if nodes < len(spaces) else sum(samples)
    return max(nodes * 2 * inputs.prototype_bytes, together)


def _solves_dense(inputs: Inputs) -> bool:
    return is_dense(inputs.clusters, inputs.config.match.solver)


def _match(inputs: Inputs) -> list[Phase]:
    work = inputs.work
    tasks = task_count(work.shards, 2 * column_seconds(work.pairs / work.shards))
    ranges = table_ranges(work.pairs, inputs.clusters)
    count = (
        inputs.demand("count", work.pairs, "match"),
        inputs.demand("schedule", tasks + ranges * (1 + additions(tasks)), "tasks"),
    )
    # the cosines of matched clusters are summed in a second pass
    cosines = (
        inputs.demand("sum cosines", work.pairs, "match"),
        inputs.demand("schedule", tasks, "tasks"),
    )
    return [count, *_assignment(inputs, ranges), cosines]


def _assignment(inputs: Inputs, ranges: int) -> list[Phase]:
    """Return the phases of the assignment: of a large table a core grows, and is solved again."""
    if _solves_dense(inputs):
        return [(inputs.demand("solve", float(inputs.clusters) ** 3, "solve_dense"),)]
    steps = float(inputs.clusters) ** 2
    if _cells(inputs) <= CORE_LIMIT:
        return [(inputs.demand("solve", steps, "solve_sparse"),)]
    times = inputs.figures["cores"].value
    grow = (
        inputs.demand("look through cells", times * _cells(inputs), "price", ranges),
        inputs.demand("schedule", times * 2 * ranges, "tasks"),
    )
    return [
        grow,
        (inputs.demand("solve", times * steps, "solve_sparse"),),
        (inputs.demand("find prices", times * CORE_LIMIT / 2, "prices"),),
    ]


def _cells(inputs: Inputs) -> float:
    """Return the number of cells of the contingency table that have a pair."""
    found = inputs.figures["cells"].value * inputs.kept_pairs
    return min(found, float(inputs.clusters) ** 2)


def _match_store_bytes(inputs: Inputs) -> float:
    """Return the bytes of the answers of all tasks: few cells occur in several."""
    return CELL_BYTES * min(float(inputs.kept_pairs), 2 * _cells(inputs) * ADDED_TOGETHER)


def _match_driver_bytes(inputs: Inputs) -> float:
    """Return the bytes of a table, or its core, as it is solved, and of a part put in its place.

    A cell of a sparse table has a weight, a column and, when all parts are in their place, three
    flags; a cell of a part has two numbers.
    """
    if _solves_dense(inputs):
        return 8.0 * inputs.clusters**2
    cells = min(_cells(inputs), float(CORE_LIMIT))
    part = 2 * 8 * cells / table_ranges(inputs.work.pairs, inputs.clusters)
    return 12 * cells + max(3 * cells, part)


def _match_disk_bytes(inputs: Inputs) -> float:
    return 25.0 * inputs.clusters  # a row: two int32, an int64, a bool and a float64


def _search(inputs: Inputs, sides: Mapping[str, int]) -> Phase:
    """Return the phase that finds the nearest rows for every query; sides and their rows."""
    work, rows, what = inputs.work, sum(sides.values()), " and ".join(sides)
    shard_s = sum(
        inputs.product_seconds(each, inputs.clusters, inputs.dim) for each in sides.values()
    )
    searched = task_count(work.shards, shard_s)
    winning = min(len(sides) * inputs.clusters, work.shards)
    names_s = sum(column_seconds(each / work.shards) for each in sides.values())
    flop = distance_flop(rows, inputs.clusters, inputs.dim)
    share = rows / (work.images + work.pairs)
    return (
        inputs.products(f"nearest {what}", flop, "search"),
        inputs.demand(f"read {what}", rows, "search_rows"),
        inputs.demand("schedule", searched + task_count(winning, names_s), "tasks"),
        *inputs.over_network(f"read {what}", inputs.vector_bytes * share),
    )


def _search_store_bytes(inputs: Inputs, sides: int) -> float:
    """Return the bytes of the queries on every node and of the answers under way.

    The first answers hold query, cosine, shard and row of every query: 16 bytes. Later ones hold
    those of queries that a shard improves.
    """
    answers = 2 * task_places(inputs.cluster.cpus, inputs.cluster.gpus) * sides
    queries = inputs.cluster.units("node") * inputs.prototype_bytes * sides
    return queries + answers * 16.0 * inputs.clusters


def _sum_tasks(inputs: Inputs) -> tuple[int, int]:
    """Return the number of tasks that sum shards, and of those that add sums up."""
    shards = inputs.work.shards
    rows = (inputs.work.images + inputs.work.pairs) / shards
    members = _members(inputs) / shards
    summed = sum_task_count(shards, rows, members, inputs.clusters, inputs.dim)
    return summed, match_ranges(inputs.clusters, inputs.dim) * (1 + additions(summed))


def _members(inputs: Inputs) -> float:
    """Return the number of pairs that are averaged."""
    shared = inputs.figures["shared"].value if inputs.config.match.filter else 1.0
    return shared * inputs.kept_pairs


def _answer_bytes(inputs: Inputs) -> float:
    """Return the bytes of sums with which a task answers, on average."""
    summed, _ = _sum_tasks(inputs)
    matches = inputs.clusters * -math.expm1(-_members(inputs) / summed / inputs.clusters)
    return 2 * 8.0 * inputs.dim * matches


def _prototypes(inputs: Inputs) -> list[Phase]:
    work = inputs.work
    read = inputs.over_network("read vectors", inputs.vector_bytes)
    vectors = inputs.demand("sum vectors", work.pairs, "sums")
    summed, added = _sum_tasks(inputs)
    # a tree adds up what tasks have summed; the first of its levels has nearly all of the work
    answers = math.ceil(summed / ADDED_TOGETHER)
    at_once = match_ranges(inputs.clusters, inputs.dim) * min(
        answers, additions_at_once(inputs.cluster.cpus)
    )
    sums = (
        vectors,
        inputs.demand("add sums", summed * _answer_bytes(inputs), "add", at_once),
        inputs.demand("schedule", summed + added, "tasks"),
        *read,
    )
    # medoids are found in a second pass over all vectors
    medoids = (vectors, inputs.demand("schedule", summed, "tasks"), *read)
    return [
        sums,
        *([medoids] if inputs.config.prototypes.center == "medoid" else []),
        _search(inputs, {"captions": work.pairs, "images": work.images}),
    ]


def _prototypes_store_bytes(inputs: Inputs) -> float:
    """Return the bytes of a search, or of sums under way if more.

    These wait to be added up, are being added up, or are of tasks of a window.
    """
    cpus = inputs.cluster.cpus
    waiting = ADDED_TOGETHER * (1 + additions_at_once(cpus)) + 2 * cpus
    summed, _ = _sum_tasks(inputs)
    answers = min(waiting, summed) * min(SUMS_BYTES, _answer_bytes(inputs))
    return max(_search_store_bytes(inputs, 2), answers + 2 * 8.0 * inputs.dim * inputs.clusters)


def _prototypes_driver_bytes(inputs: Inputs) -> float:
    """Return the bytes of both vectors of each prototype, and of its texts and names.

    Medoids are found beside the means, and are put in order at the end.
    """
    copies = 3 if inputs.config.prototypes.center == "medoid" else 1
    return copies * 2 * inputs.prototype_bytes + NAMES_BYTES * inputs.clusters


def _prototypes_disk_bytes(inputs: Inputs) -> float:
    text = inputs.figures["text"].value
    return 2 * inputs.prototype_bytes + 3 * inputs.clusters * text


def images_looked_through(pairs: int, batch: int, work: Workload) -> float:
    """Return the images that are read to find those nearest to the prototypes.

    Each batch reads each shard that it needs up to the last image wanted.
    """
    batch = min(batch, pairs)
    hit = work.shards * (1 - (1 - 1 / work.shards) ** batch)
    wanted = batch / hit
    return pairs / batch * hit * work.images / work.shards * wanted / (wanted + 1)


def _decode(inputs: Inputs) -> list[Phase]:
    config = inputs.config
    wish, drawn = config.ray.decode_actors, config.decode.decoder == "unclip"
    actors, together = inputs.actors(wish, on_gpu=drawn), config.decode.batch_size
    if drawn:
        drawings = inputs.clusters * config.decode.candidates
        work = inputs.demand("draw", drawings, "draw", inputs.shared_by(wish))
    else:
        together = max(together, LOOKED_UP_TOGETHER)
        images = images_looked_through(inputs.clusters, together, inputs.work)
        work = inputs.demand("look images up", images, "read", actors)
    # an actor writes the images of a chunk side by side
    rounds = math.ceil(inputs.clusters / together) * math.ceil(together / CALLS_AT_ONCE)
    written = inputs.round_trips("write images", (LOOK_TRIPS + WRITE_TRIPS) * rounds, actors)
    judged = _judge(inputs) if drawn and config.decode.judged else []
    return [(work,), *judged, written, inputs.hashes(inputs.clusters)]


def _judge(inputs: Inputs) -> list[Phase]:
    """Return the phases that score candidates and, if they may be taken, real images."""
    decode, actors = inputs.config.decode, inputs.shared_by(inputs.config.ray.decode_actors)
    images = inputs.clusters * (decode.candidates + decode.real_fallback)
    scored = inputs.demand("score images", images, "encode_images", actors)
    if not decode.real_fallback:
        return [(scored,)]
    looked_up = inputs.demand(
        "look images up",
        images_looked_through(inputs.clusters, inputs.config.decode.batch_size, inputs.work),
        "read",
    )
    return [(scored,), (looked_up,)]


def _decode_disk_bytes(inputs: Inputs) -> float:
    return inputs.clusters * inputs.figures["image_file"].value


def _caption(inputs: Inputs) -> list[Phase]:
    if inputs.config.caption.nearest_to == "prototype":
        return []
    parts = min(
        inputs.actors(inputs.config.ray.embed_actors),
        math.ceil(inputs.clusters / ENCODED_TOGETHER),
    )
    on_gpu = inputs.figures["encode_images"].per == "GPU"
    processors = parts if on_gpu else MODEL_THREADS * parts
    embedded = (  # an image is read while another is encoded
        inputs.demand("encode images", inputs.clusters, "encode_images", processors),
        *inputs.round_trips("read images", READ_TRIPS * inputs.clusters, CALLS_AT_ONCE * parts),
    )
    return [embedded, _search(inputs, {"captions": inputs.work.pairs})]


def _caption_disk_bytes(inputs: Inputs) -> float:
    return inputs.clusters * inputs.figures["text"].value


def _caption_driver_bytes(inputs: Inputs) -> float:
    """Return the bytes of names, images and lists: of each row its place and what it finds.

    A list is 24 bytes per row; as much again while the rows are put in the order of their shards.
    Queries are the images, or beside them the texts, both at unit length, and their sums.
    """
    names = NAMES_BYTES * inputs.clusters
    if inputs.config.caption.nearest_to == "prototype":
        return names
    lists = 2 * 24.0 * LONGEST_LIST * inputs.clusters if inputs.config.caption.round_trip else 0.0
    vectors = 5 if inputs.config.caption.nearest_to == "both" else 1
    return names + vectors * inputs.prototype_bytes + lists


def _materialize(inputs: Inputs) -> list[Phase]:
    """Return the phases that copy images and then read them again for tars, each in one task."""
    copies = min(max(1.0, inputs.clusters / IMAGES_TOGETHER), inputs.cluster.cpus)
    tars = min(max(1.0, inputs.clusters / PAIRS_PER_TAR), TARS_AT_ONCE, inputs.cluster.cpus)
    copied = (READ_TRIPS + WRITE_TRIPS) * inputs.clusters
    return [
        inputs.round_trips("copy images", copied, CALLS_AT_ONCE * copies),
        (
            inputs.demand("write the set", inputs.clusters, "materialize", tars),
            *inputs.round_trips(
                "read images for tars", READ_TRIPS * inputs.clusters, CALLS_AT_ONCE * tars
            ),
        ),
    ]


def _materialize_disk_bytes(inputs: Inputs) -> float:
    images = inputs.clusters * inputs.figures["image_file"].value
    return 2 * images + 2 * inputs.prototype_bytes


def _materialize_driver_bytes(inputs: Inputs) -> float:
    """Return the bytes of records, of vectors as they are copied, and of soft targets."""
    similarity = 4.0 * inputs.clusters**2 if inputs.config.extras.similarity != "off" else 0.0
    return _row_group_bytes(inputs) + RECORD_BYTES * inputs.clusters + 2 * similarity


def _row_group_bytes(inputs: Inputs) -> float:
    """Return the bytes of a row group of vectors as it is read: Parquet decodes it in copies."""
    return ROW_GROUP_COPIES * 4.0 * min(ROW_GROUP, inputs.clusters) * inputs.dim


EMBED = StageModel(_embed, _embed_disk_bytes, _embed_store_bytes)
PRUNE = StageModel(_prune, _prune_disk_bytes)
CLUSTER = StageModel(
    _cluster, _cluster_disk_bytes, _cluster_store_bytes, lambda inputs: 2 * inputs.prototype_bytes
)
MATCH = StageModel(_match, _match_disk_bytes, _match_store_bytes, _match_driver_bytes)
PROTOTYPES = StageModel(
    _prototypes, _prototypes_disk_bytes, _prototypes_store_bytes, _prototypes_driver_bytes
)
DECODE = StageModel(_decode, _decode_disk_bytes)
CAPTION = StageModel(
    _caption,
    _caption_disk_bytes,
    lambda inputs: _search_store_bytes(inputs, 1),
    _caption_driver_bytes,
)
MATERIALIZE = StageModel(
    _materialize, _materialize_disk_bytes, driver_bytes=_materialize_driver_bytes
)
