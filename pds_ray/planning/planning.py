"""What a run takes, foretold stage by stage: time, hardware, bytes and money. Arithmetic alone: no Ray, no torch.

A stage starts, then goes through phases. The demands of a phase overlap; each asks one resource for work. So

    seconds of a phase = max(over resources: sum of work / rate / units there are,
                             over demands:   work / rate / units that can share it)

and no stage is foretold shorter than any resource needs for its work. The rates are figures of `pds-ray bench`, of the
machine they were measured on, or those of assumptions.yaml; each says which. What a GPU of another kind does is derived
in one way only: by the ratio of the peaks. What hangs on encoder or decoder is taken as measured only for its like.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from pds_ray import catalog
from pds_ray.catalog import SOURCES
from pds_ray.config import Actors, ConfigError, RunConfig
from pds_ray.errors import first_line
from pds_ray.stages.cluster import FLAT_LIMIT, sample_share
from pds_ray.stages.match import DENSE_LIMIT
from pds_ray.store.storage import CALLS_AT_ONCE, is_remote

SCHEMA_VERSION = 1
SHARD_IMAGES = 10_000  # of a shard that nobody has seen, as img2dataset writes them
SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
# what distributed/runtime.py and distributed/nearest.py go by; they import Ray, hence not imported here
MODEL_THREADS, CPUS_A_WORKER, BLOCK_BYTES, QUERIES_PER_SHARD = 4, 8, 64 << 20, 10_000
QUEUED_BLOCKS = 4  # that wait for an actor, or are in its hands
LOOK_TRIPS, READ_TRIPS, WRITE_TRIPS = (
    2,
    2,
    4,
)  # requests of an object store: is a file there, read it, write it
NEEDED = (
    "encode_images",
    "encode_captions",
    "fit",
)  # of a file of rates; what else it lacks is assumed
JPEG = "jpeg"  # among the sources of a measurement: the pictures it made itself

Case = Literal["value", "worst", "best"]


@dataclass(frozen=True)
class Figure:
    """A rate, in `unit` a second of one `per`; with unit "s" a time, and with unit "bytes" a size of one `per`."""

    value: float
    worst: float
    """The end of its range that makes a run longer; a rate's lowest."""
    best: float
    unit: str
    per: str
    """core, GPU, node, driver (of which there is one) or connection (to an object store; each demand says how many);
    of times and sizes, what they are of."""
    origin: str
    """measured, published or assumed, and how."""

    def scaled(self, factor: float, origin: str) -> Figure:
        """This figure times a factor."""
        value, worst, best = (factor * figure for figure in (self.value, self.worst, self.best))
        return replace(self, value=value, worst=worst, best=best, origin=origin)

    def at(self, case: Case) -> Figure:
        """One end of the range as the value."""
        return replace(self, value=getattr(self, case))


Figures = Mapping[str, Figure]


@dataclass(frozen=True)
class Workload:
    """What there is to be distilled."""

    images: int
    pairs: int
    bytes: float
    """Of all encoded pictures and captions, drawn ones too."""
    shards: int
    remote: bool
    """Read over a network."""


@dataclass(frozen=True)
class Cluster:
    """What it is distilled on."""

    gpus: int
    gpu: str
    """Their kind, as assumptions.yaml names it; "" without any."""
    cpus: int
    node_cpus: int
    """Of the largest machine."""

    def units(self, per: str) -> float:
        """How many there are of what a rate is of."""
        nodes = max(1.0, self.cpus / self.node_cpus)
        return {
            "core": self.cpus,
            "GPU": self.gpus,
            "node": nodes,
            "driver": 1.0,
            "connection": math.inf,
        }[per]


@dataclass(frozen=True)
class Demand:
    """Work for one resource."""

    what: str
    work: float
    """In the unit of the rate."""
    rate: Figure
    at_most: float | None = None
    """Cores, GPUs or connections that can share it; None if all can."""

    @property
    def unit_seconds(self) -> float:
        """Seconds of one core, GPU, ..."""
        return self.work / self.rate.value


Phase = tuple[Demand, ...]


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    seconds: float
    bottleneck: str
    gpu_hours: float
    """Of GPUs at work; those that wait are in the cost alone."""
    core_hours: float
    disk_bytes: float
    """Written, to stay."""
    traffic_bytes: float
    """Over the network."""
    store_bytes: float
    """Of Ray's object store, in the whole cluster."""
    usd: float | None
    """None where a price is not known."""
    start: Figure
    phases: tuple[Phase, ...]


@dataclass(frozen=True)
class Plan:
    """What a run takes."""

    workload: Workload
    cluster: Cluster
    stages: tuple[StagePlan, ...]
    start: Figure
    """Of Ray, before the first stage."""
    seconds: float
    seconds_worst: float
    seconds_best: float
    usd: float | None
    """Of the machines, idle ones included."""
    storage_usd_month: float
    egress_usd: float
    """If the source lies in another region; in no other figure."""
    prices: str
    """Where they come from."""


@dataclass(frozen=True)
class Measured:
    """A file of rates."""

    date: str
    cpu: str
    cpus: int
    gpus: tuple[str, ...]
    encoder: str
    dim: int
    size: int
    decoder: str
    passes: int
    """Of the UNet for a picture, when decoding was measured."""
    sources: dict[str, dict[str, Figure]]
    figures: dict[str, Figure]


# ---- what the user gives ---------------------------------------------------------------------------------------------


def parse_count(text: str, name: str) -> int:
    """`400M`, `5.85B`, `24k`, `100000` -> a whole number, at least 1. Raises ConfigError in one line."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMBGT]?)", text.strip())
    number = float(found[1]) * SUFFIXES[found[2]] if found else 0.0
    if not 1 <= number < 1e18:
        raise ConfigError(
            f"{name} is {text!r}; it must be a positive number such as 24k, 400M or 5.85B"
        )
    return round(number)


def parse_gpus(text: str) -> tuple[int, str]:
    """`64xH100` -> (64, "H100"), `0` -> (0, ""). Raises ConfigError in one line, naming the known kinds."""
    known = _assumptions()["gpus"]
    found = re.fullmatch(r"([0-9]{1,6})x(\w+)", text.strip())
    if text.strip() == "0":
        return 0, ""
    if not found or int(found[1]) == 0 or found[2].upper() not in known:
        raise ConfigError(
            f"--gpus is {text!r}; it must be 0 or NUMBERxKIND such as 64xH100, of {', '.join(known)}"
        )
    return int(found[1]), found[2].upper()


def web_workload(pairs: int, captions_per_image: int, bytes_per_pair: int) -> Workload:
    """Pairs that nobody has seen, in shards of SHARD_IMAGES on an object store."""
    images = math.ceil(pairs / captions_per_image)
    return Workload(
        images, pairs, float(pairs) * bytes_per_pair, math.ceil(images / SHARD_IMAGES), remote=True
    )


def make_cluster(gpus: str | None, cpus: int | None, measured: Measured | None) -> Cluster:
    """What was asked for or, without `gpus`, the machine that was measured. Raises ConfigError in one line."""
    if gpus is None:
        if measured is None:
            raise ConfigError(
                "which machines? give --gpus, such as 64xH100 or 0, or measure this one: pds-ray bench"
            )
        kind = _kind(measured.gpus[0]) if measured.gpus else ""
        own = cpus or measured.cpus
        return Cluster(len(measured.gpus), kind, own, own)
    count, kind = parse_gpus(gpus)
    machines = _assumptions()["machines"]
    if not count and cpus is None:
        raise ConfigError("--gpus is 0; give --cpus as well, the CPU cores in all")
    total = cpus or count * machines["cores_per_gpu"]
    return Cluster(count, kind, total, min(total, machines["cores_per_node"]))


def default_rates() -> Path:
    """Where `pds-ray bench` leaves its figures."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_home).expanduser() / "pds-ray" / "rates.json"


def read_rates(path: Path) -> Measured:
    """What `pds-ray bench` measured. Raises ConfigError in one line if it is none of its files."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["schema"] != SCHEMA_VERSION:
            raise ValueError(f"schema {data['schema']}, not {SCHEMA_VERSION}")
        return parse_rates(data)
    except OSError as error:
        raise ConfigError(
            f"cannot read --rates {path}: {error.strerror}; pds-ray bench writes it"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--rates {path} is not what this version's pds-ray bench writes ({error!r})"
        ) from error


def parse_rates(data: Mapping[str, Any]) -> Measured:
    """The content of a file of rates. Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    machine, date = data["machine"], data["date"]
    missing = sorted({JPEG} - data["sources"].keys() | set(NEEDED) - data["figures"].keys())
    if missing:
        raise KeyError(", ".join(missing))
    origin = f"measured on {', '.join(sorted(set(machine['gpus']))) or machine['cpu']}, {date}"
    return Measured(
        date=date,
        cpu=machine["cpu"],
        cpus=machine["cpus"],
        gpus=tuple(machine["gpus"]),
        encoder=data["encoder"]["name"],
        dim=data["encoder"]["dim"],
        size=data["encoder"]["size"],
        decoder=data["decoder"]["name"],
        passes=data["decoder"]["passes"],
        sources={uri: _read_figures(found, origin) for uri, found in data["sources"].items()},
        figures=_read_figures(data["figures"], origin),
    )


def read_prices(path: str | None) -> dict[str, Any]:
    """A price file, or the assumed prices. Raises ConfigError in one line."""
    if path is None:
        return _assumptions()["prices"]
    try:
        prices = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --prices {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prices {path} is not YAML: {first_line(error)}") from error
    wanted = ("gpu_hour", "core_hour", "storage_tb_month", "egress_tb")
    if (
        not isinstance(prices, dict)
        or not prices.keys() >= set(wanted)
        or not isinstance(prices["gpu_hour"], dict)
    ):
        raise ConfigError(
            f"--prices {path} must hold {', '.join(wanted)}; gpu_hour by kind, as H100: 3.0"
        )
    for name, price in [
        *prices["gpu_hour"].items(),
        *((name, prices[name]) for name in wanted[1:]),
    ]:
        if (
            isinstance(price, bool)
            or not isinstance(price, int | float)
            or not 0 <= price < math.inf
        ):
            raise ConfigError(f"--prices {path}: {name} is {price!r}; it must be a number of USD")
    return {"from": path, **prices}


def _read_figures(found: Mapping[str, Mapping[str, Any]], origin: str) -> dict[str, Figure]:
    figures = {
        name: Figure(
            **{key: entry[key] for key in ("value", "worst", "best", "unit", "per")}, origin=origin
        )
        for name, entry in found.items()
    }
    for name, figure in figures.items():
        positive = figure.value >= 0 if figure.unit == "s" else figure.value > 0
        if not positive or not math.isfinite(figure.value):
            raise ValueError(f"{name} is {figure.value}")
    return figures


@cache
def _assumptions() -> dict[str, Any]:
    return yaml.safe_load(
        (resources.files("pds_ray.planning") / "assumptions.yaml").read_text(encoding="utf-8")
    )


def _kind(gpu: str) -> str:
    """The name in assumptions.yaml of a GPU as its driver calls it; that itself if there is none."""
    return next((kind for kind in _assumptions()["gpus"] if re.search(rf"\b{kind}\b", gpu)), gpu)


# ---- the figures a plan goes by --------------------------------------------------------------------------------------


def flop_rate(peak: float, utilisation: float, flop: float) -> float:
    """Items a second: peak FLOP/s x share of it that is reached / FLOP an item."""
    return peak * utilisation / flop


def passes(config: RunConfig) -> int:
    """Of the UNet for a picture: guidance takes a second one each step."""
    return config.decode.steps * (2 if config.decode.guidance > 1 else 1)


def picture_flop(config: RunConfig) -> float:
    """Of a picture by Stable Diffusion 2.1 unCLIP."""
    unclip = _assumptions()["unclip"]
    return passes(config) * unclip["step"] + unclip["picture"]


def model_name(encoder: str) -> str:
    """What decides an encoder's speed: its architecture, whatever the weights; or its whole name if that says none."""
    architecture = encoder.partition(":")[0].removesuffix("-quickgelu")
    return architecture if architecture in _assumptions()["encoders"] else encoder


def encoder_shape(config: RunConfig, measured: Measured | None) -> tuple[int, int]:
    """Width of its embeddings and side of its pictures. Raises ConfigError in one line for one that is not known."""
    name, table = model_name(config.embed.encoder), _assumptions()["encoders"]
    if name in table:
        return table[name]["dim"], table[name]["size"]
    if measured is None or model_name(measured.encoder) != name:
        raise _unknown("encoder", name, ", ".join(table))
    return measured.dim, measured.size


def choose_figures(
    config: RunConfig, cluster: Cluster, measured: Measured | None
) -> dict[str, Figure]:
    """Measured figures where there are any that hold here, assumed ones elsewhere.

    Raises ConfigError in one line if nothing is known of a model.
    """
    table = _assumptions()
    chosen = {
        name: Figure(
            **{key: entry[key] for key in ("value", "worst", "best", "unit", "per")},
            origin=entry["from"],
        )
        for name, entry in table["figures"].items()
    }
    if measured is not None:
        own = {**measured.figures, **_pictures(config.source, measured)}
        elsewhere = {"fit", *_of_another_model(config, measured)}
        chosen |= {name: own[name] for name in (chosen.keys() & own.keys()) - elsewhere}
        chosen["fit"] = _on(cluster, measured.figures["fit"], measured) or chosen["fit"]
    encoder = model_name(config.embed.encoder)
    for name, item in (("encode_images", "image"), ("encode_captions", "text")):
        found = None
        if measured is not None and model_name(measured.encoder) == encoder:
            at_batch = measured.figures.get(
                f"{name}@{config.embed.batch_size}", measured.figures[name]
            )
            found = _on(cluster, at_batch, measured)
        if found is None:
            if encoder not in table["encoders"]:
                raise _unknown("encoder", encoder, ", ".join(table["encoders"]))
            flop = table["encoders"][encoder][item]
            found = _assumed(cluster, "encode", flop, "images" if item == "image" else "captions")
        chosen[name] = found
    if config.decode.decoder == "unclip":
        chosen["draw"] = _draw(config, cluster, measured)
    return chosen


def _of_another_model(config: RunConfig, measured: Measured) -> set[str]:
    """The figures that hang on encoder or decoder and were measured with one that is not alike."""
    dim, size = encoder_shape(config, measured)
    alike = {
        ("commit", "sample", "label_rows", "sums", "search_rows"): measured.dim == dim,
        ("preprocess",): measured.size == size,
        ("start_embed", "start_caption"): model_name(measured.encoder)
        == model_name(config.embed.encoder),
        ("start_decode",): measured.decoder == decoder_name(config),
    }
    return {name for names, same in alike.items() if not same for name in names}


def _draw(config: RunConfig, cluster: Cluster, measured: Measured | None) -> Figure:
    known = "stable-diffusion-2-1-unclip"
    model = decoder_name(config)
    if measured is not None and measured.decoder == model:
        found = _on(cluster, measured.figures.get("draw"), measured)
        if found is not None and passes(config) != measured.passes:
            ratio = measured.passes / passes(config)
            note = f"{found.origin}, x {measured.passes}/{passes(config)} passes of the UNet"
            return found.scaled(ratio, note)
        if found is not None:
            return found
    if known not in model:
        raise _unknown("decoder", model, known)
    return _assumed(cluster, "draw", picture_flop(config), "images")


def decoder_name(config: RunConfig) -> str:
    """The decoder as figures go by it: `auto` stands for that of the encoder."""
    if config.decode.decoder != "unclip":
        return config.decode.decoder
    if config.decode.model != "auto":
        return config.decode.model
    encoder = model_name(config.embed.encoder)
    return (
        "stable-diffusion-2-1-unclip"
        if encoder in _assumptions()["encoders"]
        else f"auto for {encoder}"
    )


def _unknown(kind: str, name: str, known: str) -> ConfigError:
    return ConfigError(
        f"nothing is known of {kind} {name} on such machines; measure it on one (pds-ray bench), or take one of {known}"
    )


def _on(cluster: Cluster, figure: Figure | None, measured: Measured) -> Figure | None:
    """What was measured, for the cluster's hardware; None if it does not carry over."""
    if figure is None or (figure.per == "GPU") != (cluster.gpus > 0):
        # FAISS runs on the CPU wherever it was not measured on a GPU
        return (
            figure
            if figure is not None and figure.unit == "FLOP" and figure.per == "core"
            else None
        )
    if figure.per == "core":
        return figure
    peaks, kind = _assumptions()["gpus"], _kind(measured.gpus[0])
    if kind == cluster.gpu:
        return figure
    if kind not in peaks or cluster.gpu not in peaks:
        return None
    ratio = peaks[cluster.gpu] / peaks[kind]
    note = f"{figure.origin}, x {peaks[cluster.gpu] / 1e12:g}/{peaks[kind] / 1e12:g} TFLOP/s of {cluster.gpu} to {kind}"
    return figure.scaled(ratio, note)


def _assumed(cluster: Cluster, what: str, flop: float, unit: str) -> Figure:
    """A model's rate by its FLOP, on a GPU or a core."""
    table = _assumptions()
    share = table["utilisation"][what] if cluster.gpus else table["core_flops"]
    if cluster.gpus and cluster.gpu not in table["gpus"]:
        raise ConfigError(f"nothing is known of GPU {cluster.gpu}; measure it (pds-ray bench)")
    peak = table["gpus"][cluster.gpu] if cluster.gpus else 1.0
    value, worst, best = (flop_rate(peak, share[case], flop) for case in ("value", "worst", "best"))
    reached = (
        f"{peak / 1e12:g} TFLOP/s x {share['value']:.1%}"
        if cluster.gpus
        else f"{share['value'] / 1e9:g} GFLOP/s"
    )
    origin = f"{reached} / {flop / 1e9:,.4g} GFLOP ({share['from']})"
    return Figure(value, worst, best, unit, "GPU" if cluster.gpus else "core", origin)


def _pictures(source: str, measured: Measured) -> dict[str, Figure]:
    """How fast pictures of the source are read and decoded: its own figures, those of its kind, or those of JPEGs."""
    scheme = source.partition(":")[0]
    for uri, found in measured.sources.items():
        if uri == source or (scheme in SOURCES and scheme == uri.partition(":")[0]):
            return found
    return measured.sources[JPEG]


# ---- the stages ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """All that the phases of a stage follow from."""

    config: RunConfig
    work: Workload
    cluster: Cluster
    figures: Figures
    dim: int
    size: int

    @property
    def clusters(self) -> int:
        return self.config.pairs

    @property
    def kept_pairs(self) -> int:
        return self.work.pairs - int(self.config.prune.ratio * self.work.pairs)

    @property
    def kept_images(self) -> float:
        """Images with a caption that was kept, if captions are dropped independently of each other."""
        return self.work.images * (
            1 - self.config.prune.ratio ** (self.work.pairs / self.work.images)
        )

    @property
    def vector_bytes(self) -> float:
        """Of all embeddings."""
        width = 2 if self.config.embed.store_dtype == "float16" else 4
        return float(self.work.images + self.work.pairs) * self.dim * width

    @property
    def pixel_bytes(self) -> float:
        """Of all pictures as the encoder takes them."""
        return float(self.work.images) * 3 * self.size**2

    def actors(self, wish: Actors, on_gpu: bool = True) -> int:
        """Those of pools.pool that find room."""
        if on_gpu and wish.gpus:
            room = int(self.cluster.gpus / wish.gpus)
            return min(room, wish.workers or room)
        gpus = self.cluster.gpus if on_gpu else 0
        by_cpus = max(1, self.cluster.cpus // min(CPUS_A_WORKER, self.cluster.node_cpus))
        return max(wish.workers or gpus or by_cpus, wish.min_workers)

    def demand(self, what: str, work: float, figure: str, at_most: float | None = None) -> Demand:
        return Demand(what, work, self.figures[figure], at_most)

    def over_network(self, what: str, bytes_: float) -> Phase:
        """No demand where all is on a disk."""
        return (self.demand(what, bytes_, "network"),) if self.work.remote else ()

    def round_trips(self, what: str, trips: float, at_once: int) -> Phase:
        """Requests of the store that the run folder lies on, or the source if no folder is told; none of a disk."""
        remote = is_remote(self.config.out) if self.config.out else self.work.remote
        return (self.demand(what, trips, "round_trips", at_once),) if remote else ()

    def shared_by(self, wish: Actors) -> float:
        """GPUs, or cores, that a pool of models can use; a model takes one GPU, however many its actor has."""
        actors = self.actors(wish)
        if self.cluster.gpus:
            return min(self.cluster.gpus, actors * min(1.0, wish.gpus or 1.0))
        return MODEL_THREADS * actors


def embed_tasks(work: Workload, pixel_bytes: float) -> float:
    """Tasks of Ray Data: a read a shard, a decode a block of encoded pictures, an encode a block of decoded ones."""
    return work.shards + _encoded_blocks(work) + decoded_blocks(work, pixel_bytes)


def _encoded_blocks(work: Workload) -> float:
    return max(work.shards, work.bytes / BLOCK_BYTES)


def decoded_blocks(work: Workload, pixel_bytes: float) -> float:
    """Blocks that the encoders are given; each leaves its tables in the store."""
    return max(_encoded_blocks(work), pixel_bytes / BLOCK_BYTES)


def compared(clusters: int) -> int:
    """Centroids that a vector is compared with: all, or those of two levels."""
    return clusters if clusters <= FLAT_LIMIT else 2 * round(math.sqrt(clusters))


def distance_flop(rows: float, clusters: float, dim: int) -> float:
    """Of the distances (or cosines) of all rows to all centroids."""
    return 2.0 * rows * clusters * dim


def _embed(run: _Run) -> list[Phase]:
    work, together = run.work, run.shared_by(run.config.ray.embed_actors)
    # an actor writes its tables side by side, and encodes meanwhile
    written = WRITE_TRIPS * decoded_blocks(work, run.pixel_bytes)
    phase = (
        run.demand("read", work.images, "read"),
        run.demand("decode and resize", work.images, "preprocess"),
        run.demand("encode images", work.images, "encode_images", together),
        run.demand("encode captions", work.pairs, "encode_captions", together),
        run.demand("commit", work.pairs, "commit"),
        *run.round_trips("write tables", written, run.actors(run.config.ray.embed_actors)),
        run.demand("schedule blocks", embed_tasks(work, run.pixel_bytes), "blocks"),
        *run.over_network("read and write", work.bytes + run.vector_bytes),
    )
    return [phase]


def _prune(run: _Run) -> list[Phase]:
    passes_ = (
        run.demand("four passes over the cosines", run.work.pairs, "prune"),
        run.demand("schedule", 4.0 * run.work.shards, "tasks"),
    )
    return [passes_, _hashes(run, run.work.shards)]


def _hashes(run: _Run, files: int) -> Phase:
    """Of what a stage left, file by file."""
    return run.round_trips("hash the files", READ_TRIPS * files, CALLS_AT_ONCE)


def _sample(run: _Run, space: str) -> tuple[float, int]:
    """Training vectors of a k-means, and their width."""
    rows = run.kept_images if space == "image" else run.kept_pairs
    width = 2 * run.dim if space == "joint" else run.dim
    return rows * sample_share(round(rows), width, run.config.cluster, run.clusters), width


def _cluster(run: _Run) -> list[Phase]:
    config, phases = run.config.cluster, list[Phase]()
    for space in config.spaces:
        stored = run.work.images if space == "image" else run.work.pairs
        sample, width = _sample(run, space)
        flop = (
            distance_flop(sample, compared(run.clusters), width)
            * (config.iterations + 1)
            * config.restarts
        )
        on_gpu = run.figures["fit"].per == "GPU"
        read = run.over_network(f"sample {space} vectors", run.vector_bytes / 2)
        phases.append((run.demand(f"sample {space} vectors", stored, "sample"), *read))
        phases.append(
            (
                run.demand(
                    f"fit {space} k-means", flop, "fit", 1 if on_gpu else run.cluster.node_cpus
                ),
            )
        )
    flop = sum(
        distance_flop(rows, compared(run.clusters), run.dim * (2 if space == "joint" else 1))
        for space in config.spaces
        for rows in (run.work.images if space == "image" else run.work.pairs,)
    )
    labels = (
        run.demand("distances of labels", flop, "label"),
        run.demand("read vectors, write labels", run.work.pairs, "label_rows"),
        run.demand("schedule", run.work.shards, "tasks"),
        *run.over_network("read vectors", run.vector_bytes),
    )
    return [*phases, labels, _hashes(run, run.work.shards)]


def _match(run: _Run) -> list[Phase]:
    dense = run.config.match.solver == "dense" or (
        run.config.match.solver == "auto" and run.clusters <= DENSE_LIMIT
    )
    work = float(run.clusters) ** (3 if dense else 2)
    count = (
        run.demand("count", run.work.pairs, "match"),
        run.demand("schedule", run.work.shards, "tasks"),
    )
    return [count, (run.demand("solve", work, "solve_dense" if dense else "solve_sparse"),)]


def _search(run: _Run, side: str, rows: int) -> Phase:
    """The nearest of all rows for every pair."""
    groups = math.ceil(run.work.shards / (1 + run.clusters // QUERIES_PER_SHARD))
    look_ups = min(run.clusters, run.work.shards)
    return (
        run.demand(f"nearest {side}", distance_flop(rows, run.clusters, run.dim), "search"),
        run.demand(f"read {side}", rows, "search_rows"),
        run.demand("schedule", groups + look_ups, "tasks"),
        *run.over_network(
            f"read {side}", run.vector_bytes * rows / (run.work.images + run.work.pairs)
        ),
    )


def _prototypes(run: _Run) -> list[Phase]:
    sums = (
        run.demand("sum vectors", run.work.pairs, "sums"),
        run.demand("schedule", run.work.shards, "tasks"),
        *run.over_network("read vectors", run.vector_bytes),
    )
    return [sums, _search(run, "captions", run.work.pairs), _search(run, "images", run.work.images)]


def _decode(run: _Run) -> list[Phase]:
    wish, drawn = run.config.ray.decode_actors, run.config.decode.decoder == "unclip"
    actors = run.actors(wish, on_gpu=drawn)
    if drawn:
        work = run.demand("draw", run.clusters, "draw", run.shared_by(wish))
    else:
        images = looked_through(run.clusters, run.config.decode.batch_size, run.work)
        work = run.demand("look pictures up", images, "read", actors)
    trips = (
        LOOK_TRIPS + WRITE_TRIPS
    ) * run.clusters  # each picture by the actor that made it, one after the other
    return [(work,), run.round_trips("write pictures", trips, actors), _hashes(run, run.clusters)]


def looked_through(pairs: int, batch: int, work: Workload) -> float:
    """Images read to find those nearest to the prototypes: each batch reads its shards up to the last one wanted."""
    batch = min(batch, pairs)
    hit = work.shards * (1 - (1 - 1 / work.shards) ** batch)
    wanted = batch / hit
    return pairs / batch * hit * work.images / work.shards * wanted / (wanted + 1)


def _caption(run: _Run) -> list[Phase]:
    if run.config.caption.nearest_to == "prototype":
        return []
    one = 1 if run.figures["encode_images"].per == "GPU" else MODEL_THREADS
    pictures = run.demand("encode pictures", run.clusters, "encode_images", one)
    read = run.round_trips("read pictures", READ_TRIPS * run.clusters, CALLS_AT_ONCE)
    return [read, (pictures,), _search(run, "captions", run.work.pairs)]


def _materialize(run: _Run) -> list[Phase]:
    trips = (READ_TRIPS + WRITE_TRIPS) * run.clusters
    copy = run.round_trips("read and write pictures", trips, CALLS_AT_ONCE)
    return [(run.demand("write the set", run.clusters, "materialize"), *copy)]


PHASES: dict[str, Callable[[_Run], list[Phase]]] = {
    "embed": _embed,
    "prune": _prune,
    "cluster": _cluster,
    "match": _match,
    "prototypes": _prototypes,
    "decode": _decode,
    "caption": _caption,
    "materialize": _materialize,
}


def _disk_bytes(run: _Run) -> dict[str, float]:
    """What each stage leaves."""
    text, picture = run.figures["text"].value, run.figures["picture"].value
    vectors = run.clusters * run.dim * 4.0
    return {
        "embed": run.vector_bytes + run.work.pairs * text,
        "prune": run.work.pairs / 8,
        "cluster": 8.0 * run.work.pairs + 2 * vectors,
        "match": 25.0 * run.clusters,
        "prototypes": 2 * vectors + 3 * run.clusters * text,
        "decode": run.clusters * picture,
        "caption": run.clusters * text,
        "materialize": 2 * run.clusters * picture + 2 * vectors,
    }


def _store_bytes(run: _Run) -> dict[str, float]:
    """Of Ray's object store: blocks and results under way, and what each machine is sent."""
    nodes, tasks = run.cluster.units("node"), 2 * run.cluster.cpus
    queries = run.clusters * run.dim * 4.0
    blocks = (
        run.cluster.cpus + QUEUED_BLOCKS * run.actors(run.config.ray.embed_actors)
    ) * BLOCK_BYTES
    search = (
        nodes * queries + tasks * 12.0 * run.clusters
    )  # an answer holds cosine, shard and row of every query
    return {
        "embed": min(blocks, run.pixel_bytes + run.work.bytes),
        "cluster": max(
            nodes * 2 * queries,
            *(4.0 * math.prod(_sample(run, space)) for space in run.config.cluster.spaces),
        ),
        "prototypes": search,
        "caption": search,
    }


# ---- the plan --------------------------------------------------------------------------------------------------------


def phase_seconds(phase: Phase, cluster: Cluster) -> tuple[float, str]:
    """How long a phase lasts, and what it waits for: the busiest resource and the greatest demand on it."""
    busy = dict.fromkeys((demand.rate.per for demand in phase), 0.0)
    for demand in phase:
        busy[demand.rate.per] += demand.unit_seconds / cluster.units(demand.rate.per)
    spans = [
        (seconds, per, max((d for d in phase if d.rate.per == per), key=lambda d: d.unit_seconds))
        for per, seconds in busy.items()
    ]
    spans += [(d.unit_seconds / d.at_most, d.rate.per, d) for d in phase if d.at_most is not None]
    seconds, per, demand = max(spans, key=lambda span: span[0])
    return seconds, f"{RESOURCES[per]}: {demand.what}"


RESOURCES = {
    "core": "CPU",
    "GPU": "GPU",
    "node": "network",
    "driver": "driver",
    "connection": "round trips",
}


def _plan_stage(name: str, run: _Run, prices: Mapping[str, Any]) -> StagePlan:
    phases, start = tuple(filter(None, PHASES[name](run))), run.figures[f"start_{name}"]
    spans = [(start.value, "start"), *(phase_seconds(phase, run.cluster) for phase in phases)]
    seconds = sum(span for span, _ in spans)
    demands = [demand for phase in phases for demand in phase]

    def hours(per: str) -> float:
        return sum(demand.unit_seconds for demand in demands if demand.rate.per == per) / 3600

    return StagePlan(
        name=name,
        seconds=seconds,
        bottleneck=max(spans, key=lambda span: span[0])[1],
        gpu_hours=hours("GPU"),
        core_hours=hours("core"),
        disk_bytes=_disk_bytes(run)[name],
        traffic_bytes=sum(demand.work for demand in demands if demand.rate.per == "node"),
        store_bytes=_store_bytes(run).get(name, 0.0),
        usd=cost(seconds, run.cluster, prices),
        start=start,
        phases=phases,
    )


def cost(seconds: float, cluster: Cluster, prices: Mapping[str, Any]) -> float | None:
    """USD of the cluster for that long; None if its kind of GPU has no price."""
    if cluster.gpus and cluster.gpu not in prices["gpu_hour"]:
        return None
    extra = max(0, cluster.cpus - cluster.gpus * _assumptions()["machines"]["cores_per_gpu"])
    gpus = cluster.gpus * prices["gpu_hour"][cluster.gpu] if cluster.gpus else 0.0
    return seconds / 3600 * (gpus + extra * prices["core_hour"])


def make_plan(
    config: RunConfig,
    work: Workload,
    cluster: Cluster,
    measured: Measured | None,
    prices: Mapping[str, Any],
) -> Plan:
    """Foretells a run of method pds. Raises ConfigError in one line for what cannot be or is not known."""
    if config.method != "pds":
        raise ConfigError(f"method is {config.method!r}; only runs of pds can be planned")
    if config.pairs > work.images:
        raise ConfigError(
            f"{config.pairs:,} pairs asked for, but there are only {work.images:,} images; lower --pairs"
        )
    _check_room(config, cluster)
    figures = choose_figures(config, cluster, measured)
    shape = encoder_shape(config, measured)

    def stages(case: Case) -> Iterable[StagePlan]:
        run = _Run(
            config,
            work,
            cluster,
            {name: figure.at(case) for name, figure in figures.items()},
            *shape,
        )
        return (_plan_stage(name, run, prices) for name in catalog.method("pds").names)

    def total(case: Case) -> float:
        return figures["start"].at(case).value + sum(stage.seconds for stage in stages(case))

    planned, seconds = tuple(stages("value")), total("value")
    return Plan(
        workload=work,
        cluster=cluster,
        stages=planned,
        start=figures["start"],
        seconds=seconds,
        seconds_worst=total("worst"),
        seconds_best=total("best"),
        usd=cost(seconds, cluster, prices),
        storage_usd_month=sum(stage.disk_bytes for stage in planned)
        / 1e12
        * prices["storage_tb_month"],
        egress_usd=work.bytes / 1e12 * prices["egress_tb"],
        prices=prices["from"],
    )


def _check_room(config: RunConfig, cluster: Cluster) -> None:
    """Raises ConfigError where the actors of a model would wait for ever, or compute on CPUs beside idle GPUs."""
    asked = {"embed": config.ray.embed_gpus}
    if config.decode.decoder == "unclip":
        asked["decode"] = config.ray.decode_gpus
    for stage, gpus in asked.items():
        if gpus == 0 and cluster.gpus:
            raise ConfigError(
                f"ray.{stage}_gpus is 0: a stage on CPUs beside GPUs cannot be planned; leave it out"
            )
        if gpus is not None and gpus > cluster.gpus:
            raise ConfigError(
                f"ray.{stage}_gpus is {gpus:g}, of {cluster.gpus} GPUs; give --gpus for at least one actor"
            )


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain JSON values."""
    return {"schema": SCHEMA_VERSION, **dataclasses.asdict(plan)}
