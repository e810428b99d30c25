"""Counters of a run for Prometheus, through Ray's metrics; each is named `ray_` and then as here.

The driver counts what it records; rates (pairs/s, images/s, the idle share of GPUs) are Prometheus'
to form. All carry the tag `run`, the run folder. A counter that fails is reported once and stops no
work.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from urllib.parse import quote

from ray.util.metrics import Counter

from pds_ray.errors import first_line
from pds_ray.telemetry import log

MAX_LABEL = 255
"""Characters of a label's value that Ray is sure to take."""
COUNTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    # name -> (description, tags besides the run)
    "pds_ray_images_embedded_total": ("Images embedded.", ()),
    "pds_ray_pairs_embedded_total": ("Image-caption pairs embedded.", ()),
    "pds_ray_bad_samples_total": ("Samples refused, by reason.", ("reason",)),
    "pds_ray_shards_committed_total": ("Shards whose embeddings are committed.", ()),
    "pds_ray_shards_failed_total": ("Shards that could not be read, or are damaged.", ()),
    "pds_ray_pictures_decoded_total": ("Images decoded from prototypes.", ()),
    "pds_ray_actor_busy_seconds_total": (
        "Seconds that actors worked, by stage, summed over actors.",
        ("stage",),
    ),
    "pds_ray_actor_idle_seconds_total": (
        "Seconds that actors waited, for input or for their output to be written, by stage.",
        ("stage",),
    ),
}
# Each thread has a value of its own, so that two runs of one process are counted apart.
_run: ContextVar[str] = ContextVar("run", default="")


def count_for(run: str) -> None:
    """Name the run that this thread counts for from now on."""
    _run.set(run)


def count(name: str, amount: float, **tags: str) -> None:
    """Add to a counter of `COUNTERS`."""
    if amount <= 0:  # Ray refuses zero
        return
    labels = {tag: label(value) for tag, value in {"run": _run.get(), **tags}.items()}
    try:
        _counter(name).inc(amount, labels)
    except Exception as error:  # whatever it is: the work is worth more than its figures
        _report(f"{type(error).__name__}: {first_line(error)}")


def label(value: str) -> str:
    """Return a label's value as Ray takes it: ASCII, other bytes as in a URL.

    Of a long one the end is left, where run folders differ.
    """
    return quote(value, safe=string.punctuation + " ", errors="surrogateescape")[-MAX_LABEL:]


@cache
def _report(why: str) -> None:
    """Report once per reason that a counter fails."""
    log.event("no_metrics", f"pds-ray: the metrics are not complete: {why}", "warning", why=why)


@dataclass
class ActorTime:
    """Seconds that a stage's actors worked and waited, summed over them."""

    stage: str
    busy_s: float = 0.0
    idle_s: float = 0.0

    def add(self, row: Mapping[str, float | None]) -> None:
        """Add what an actor reported: `busy_s` and `idle_s`, null in rows without times."""
        busy_s, idle_s = row["busy_s"] or 0.0, row["idle_s"] or 0.0
        self.busy_s += busy_s
        self.idle_s += idle_s
        count("pds_ray_actor_busy_seconds_total", busy_s, stage=self.stage)
        count("pds_ray_actor_idle_seconds_total", idle_s, stage=self.stage)

    def counts(self, actor: str) -> dict[str, float]:
        """Return the times as run.json records them."""
        return {f"{actor}_busy_s": round(self.busy_s, 3), f"{actor}_idle_s": round(self.idle_s, 3)}


@cache
def _counter(name: str) -> Counter:
    description, tags = COUNTERS[name]
    return Counter(name, description, ("run", *tags))
