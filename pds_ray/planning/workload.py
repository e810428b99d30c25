"""The data to distil and the machines to do it on, as a user names them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pds_ray import catalog
from pds_ray.config import FilesConfig
from pds_ray.errors import ConfigError, first_line
from pds_ray.planning.figures import Measured, assumptions, gpu_kind
from pds_ray.sources.base import Sample, SourceError
from pds_ray.store.storage import is_remote

SHARD_IMAGES = 10_000  # per shard of a source that was not read, as img2dataset writes them
SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Workload:
    """The data to distil."""

    images: int
    pairs: int
    bytes: float
    """Total of all encoded images and captions, rendered ones included."""
    shards: int
    remote: bool
    """True if it is read over a network."""


@dataclass(frozen=True)
class Cluster:
    """The machines that distil it."""

    gpus: int
    gpu: str
    """Their kind, as assumptions.yaml names it; "" without any."""
    cpus: int
    node_cpus: int
    """CPUs of the largest machine."""

    def units(self, per: str) -> float:
        """Return the number of cores, GPUs, nodes, drivers or connections."""
        return {
            "core": self.cpus,
            "GPU": self.gpus,
            "node": max(1.0, self.cpus / self.node_cpus),
            "driver": 1.0,
            "connection": math.inf,
        }[per]


def parse_count(text: str, name: str) -> int:
    """Parse `400M`, `5.85B`, `24k` or `100000` to an integer of at least 1.

    Raises ConfigError in one line, which names the option `name`.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMBGT]?)", text.strip())
    number = float(found[1]) * SUFFIXES[found[2]] if found else 0.0
    if not 1 <= number < 1e18:
        raise ConfigError(
            f"{name} is {text!r}; it must be a positive number such as 24k, 400M or 5.85B"
        )
    return round(number)


def parse_gpus(text: str) -> tuple[int, str]:
    """Parse `64xH100` to (64, "H100") and `0` to (0, "").

    Raises ConfigError in one line, which names the known kinds.
    """
    known = assumptions()["gpus"]
    found = re.fullmatch(r"([0-9]{1,6})x(\w+)", text.strip())
    if text.strip() == "0":
        return 0, ""
    if not found or int(found[1]) == 0 or found[2].upper() not in known:
        raise ConfigError(
            f"--gpus is {text!r}; it must be 0 or NUMBERxKIND such as 64xH100, "
            f"of {', '.join(known)}"
        )
    return int(found[1]), found[2].upper()


def web_workload(pairs: int, captions_per_image: int, bytes_per_pair: int) -> Workload:
    """Return the workload of so many pairs on an object store, in shards of SHARD_IMAGES."""
    images = math.ceil(pairs / captions_per_image)
    size = float(pairs) * bytes_per_pair
    return Workload(images, pairs, size, math.ceil(images / SHARD_IMAGES), remote=True)


def survey(uri: str, read: FilesConfig | None = None) -> Workload:
    """Estimate the size of a source from the list of its shards and the content of the first.

    It is read by the options `read`, by default those of a run.

    Raises SourceError in one line if that cannot be read or holds no captioned image.
    """
    source = catalog.make_source(uri, read)
    shards = source.shards()
    images = pairs = size = 0
    try:
        for item in source.read(shards[0]):
            if isinstance(item, Sample):
                images += 1
                pairs += len(item.captions)
                size += len(item.image) + sum(map(len, item.captions))
    except OSError as error:
        raise SourceError(
            f"shard {shards[0].name} of {uri} cannot be read: {first_line(error)}"
        ) from error
    if not images:
        raise SourceError(f"the first shard of {uri} ({shards[0].name}) holds no captioned image")
    remote = is_remote(shards[0].location)
    scale = sum(shard.size for shard in shards) / shards[0].size if shards[0].size else len(shards)
    return Workload(round(images * scale), round(pairs * scale), size * scale, len(shards), remote)


def make_cluster(gpus: str | None, cpus: int | None, measured: Measured | None) -> Cluster:
    """Return the cluster that the options name or, without `gpus`, the machine that was measured.

    Raises ConfigError in one line.
    """
    if gpus is None:
        if measured is None:
            raise ConfigError(
                "which machines? give --gpus, such as 64xH100 or 0, "
                "or measure this one: pds-ray bench"
            )
        kind = gpu_kind(measured.gpus[0]) if measured.gpus else ""
        own = cpus or measured.cpus
        return Cluster(len(measured.gpus), kind, own, own)
    count, kind = parse_gpus(gpus)
    machines = assumptions()["machines"]
    if not count and cpus is None:
        raise ConfigError("--gpus is 0; give --cpus as well, the CPU cores in all")
    total = cpus or count * machines["cores_per_gpu"]
    return Cluster(count, kind, total, min(total, machines["cores_per_node"]))
