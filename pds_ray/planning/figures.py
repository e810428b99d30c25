"""Rates, durations and sizes for the cost model: measured, published or assumed, read from files.

Measured figures come from `pds-ray bench`, all others from assumptions.yaml; each names its origin.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from pds_ray.errors import ConfigError, cause, first_line

SCHEMA_VERSION = 1
NEEDED = ("encode_images", "encode_captions", "fit")  # in a file of rates; others may be assumed
JPEG = "jpeg"  # the source of a measurement whose images `pds-ray bench` made itself
RANGE = ("value", "worst", "best")

Case = Literal["value", "worst", "best"]


@dataclass(frozen=True)
class Estimate:
    """A rate, a duration or a size, with its range and origin.

    A rate is in `unit` per second and per `per`, a duration in "s", a size in "bytes" per `per`.
    """

    value: float
    worst: float
    """End of the range that makes a run longer; the lowest rate."""
    best: float
    unit: str
    per: str
    """For a rate: core, GPU, node, driver (there is one) or connection (to an object store; each
    demand gives their number). For a duration or a size: the thing that it belongs to."""
    origin: str
    """Measured, published or assumed, with details."""

    def scaled(self, factor: float, origin: str) -> Estimate:
        """Return this estimate times a factor."""
        value, worst, best = (factor * number for number in (self.value, self.worst, self.best))
        return replace(self, value=value, worst=worst, best=best, origin=origin)

    def at(self, case: Case) -> Estimate:
        """Return this estimate with one end of its range as the value."""
        return replace(self, value=getattr(self, case))


Figures = Mapping[str, Estimate]


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
    """UNet passes per image when decoding was measured."""
    sources: dict[str, dict[str, Estimate]]
    figures: dict[str, Estimate]


@cache
def assumptions() -> dict[str, Any]:
    """Return the content of assumptions.yaml."""
    file = resources.files("pds_ray.planning") / "assumptions.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def assumed_figures() -> dict[str, Estimate]:
    """Return the figures of assumptions.yaml."""
    return {
        name: Estimate(**{key: entry[key] for key in (*RANGE, "unit", "per")}, origin=entry["from"])
        for name, entry in assumptions()["figures"].items()
    }


def gpu_kind(gpu: str) -> str:
    """Return the name in assumptions.yaml of a GPU by its driver's name; that name if unknown."""
    return next((kind for kind in assumptions()["gpus"] if re.search(rf"\b{kind}\b", gpu)), gpu)


def default_rates() -> Path:
    """Return the default path of the rates that `pds-ray bench` writes."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache_home).expanduser() / "pds-ray" / "rates.json"


def read_rates(path: Path) -> Measured:
    """Read a file of `pds-ray bench`. Raises ConfigError in one line for any other file."""
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
            f"--rates {path} is not what this version's pds-ray bench writes ({cause(error)})"
        ) from error


def parse_rates(data: Mapping[str, Any]) -> Measured:
    """Parse the content of a file of rates.

    Raises ValueError, KeyError, TypeError or AttributeError if it is none.
    """
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
        sources={uri: _parse_figures(found, origin) for uri, found in data["sources"].items()},
        figures=_parse_figures(data["figures"], origin),
    )


def _parse_figures(found: Mapping[str, Mapping[str, Any]], origin: str) -> dict[str, Estimate]:
    figures = {
        name: Estimate(**{key: entry[key] for key in (*RANGE, "unit", "per")}, origin=origin)
        for name, entry in found.items()
    }
    for name, figure in figures.items():
        positive = figure.value >= 0 if figure.unit == "s" else figure.value > 0
        if not positive or not math.isfinite(figure.value):
            raise ValueError(f"{name} is {figure.value}")
    return figures


def read_prices(path: str | None) -> dict[str, Any]:
    """Read a price file, or the assumed prices. Raises ConfigError in one line."""
    if path is None:
        return assumptions()["prices"]
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
    named = [*prices["gpu_hour"].items(), *((name, prices[name]) for name in wanted[1:])]
    for name, price in named:
        number = isinstance(price, int | float) and not isinstance(price, bool)
        if not number or not 0 <= price < math.inf:
            raise ConfigError(f"--prices {path}: {name} is {price!r}; it must be a number of USD")
    return {"from": path, **prices}
