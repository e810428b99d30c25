"""A run beside its plan: a run and rates made up so that both can be computed by hand."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.forecast import table
from pds_ray.methods.pds import PDS

RATES = {
    "read": 100,
    "preprocess": 50,
    "encode_images": 10,
    "encode_captions": 100,
    "commit": 250,
    "draw": 1,
}
REAL = {
    "embed": 10.0,
    "prune": 4.0,
    "cluster": 1.0,
    "match": 2.0,
    "prototypes": 2.0,
    "decode": 2.0,
    "caption": 0.5,
    "materialize": 8.0,
}


def entry(value: float, unit: str = "images", per: str = "core") -> dict[str, object]:
    return {"value": value, "worst": value, "best": value, "unit": unit, "per": per, "repeats": 1}


def make_files(folder: Path) -> tuple[Path, Path]:
    """Write a run of 100 scenes (500 captions) to 4 pairs, and rates of two cores.

    Work that RATES does not name takes no time.
    """
    at_once = ("prune", "fit", "label", "label_rows", "match", "sums", "search", "search_rows")
    by_driver = ("solve_dense", "materialize", "tasks", "blocks")
    figures = {
        **{name: entry(1e18) for name in at_once},
        **{name: entry(1e18, per="driver") for name in by_driver},
        **{name: entry(rate) for name, rate in RATES.items()},
        **{f"start_{name}": entry(2.0, "s", "run") for name in PDS.names},
        "start": entry(5.0, "s", "run"),
    }
    rates = {
        "schema": 1,
        "date": "2026-01-02",
        "machine": {"cpu": "a CPU", "cpus": 2, "gpus": []},
        "encoder": {"name": "demo", "dim": 128, "size": 64},
        "decoder": {"name": "auto for demo", "passes": 40},
        "sources": {"jpeg": {name: figures.pop(name) for name in ("read", "preprocess")}},
        "figures": figures,
    }
    config = {
        "source": "scenes:100",
        "pairs": 4,
        "embed": {"encoder": "demo"},
        "decode": {"steps": 20, "guidance": 3.0},
        "caption": {"nearest_to": "prototype"},
    }
    stages = {name: {"seconds": seconds} for name, seconds in REAL.items()}
    (folder / "rates.json").write_text(json.dumps(rates))
    (folder / "run.json").write_text(
        json.dumps({"config": config, "stages": stages, "last_run_seconds": 44.0})
    )
    return folder, folder / "rates.json"


def test_estimated_beside_real(tmp_path: Path) -> None:
    """Embedding takes 1 + 2 + 10 + 5 + 2 core seconds on two cores, decoding 4.

    Each stage starts for 2 s, Ray for 5.
    """
    assert table(*make_files(tmp_path)).splitlines() == [
        "| stage | estimated, s | real, s | estimated / real |",
        "| --- | --- | --- | --- |",
        "| embed | 12.0 | 10.0 | 1.20 |",
        "| prune | 2.0 | 4.0 | 0.50 |",
        "| cluster | 2.0 | 1.0 | 2.00 |",
        "| match | 2.0 | 2.0 | 1.00 |",
        "| prototypes | 2.0 | 2.0 | 1.00 |",
        "| decode | 4.0 | 2.0 | 2.00 |",
        "| caption | 2.0 | 0.5 | 4.00 |",
        "| materialize | 2.0 | 8.0 | 0.25 |",
        "| all stages | 28.0 | 29.5 | 0.95 |",
        "| with the start of Ray | 33.0 | 44.0 | 0.75 |",
    ]
