"""What evaluations say: evaluation/*.json of a run, and comparison.json beside a collection of sets."""

from __future__ import annotations

import math
import os
import posixpath
from typing import Any

from pds_ray.errors import UserError
from pds_ray.report.pictures import data_uri
from pds_ray.store.distilled_set import DistilledSetError, load_distilled
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder, is_remote

EVALUATION = "evaluation"
COMPARISON = "comparison.json"
RECALLS = ("tr@1", "tr@5", "tr@10", "ir@1", "ir@5", "ir@10", "r_mean")
AVERAGE = "average"
STRIP = 8
"""Pairs shown of each set on the page of a comparison."""


class ReportError(UserError, ValueError):
    """There is nothing to report on, or it cannot be read."""


def read_evaluations(run: RunFolder) -> tuple[list[dict[str, Any]], list[str]]:
    """Every evaluation of a run, by name, and a note for each file that is none."""
    folder = run.folder / EVALUATION
    found, notes = [], []
    for name in folder.names(".json"):
        try:
            found.append(
                {"name": name.removesuffix(".json"), **_evaluation(folder.read_json(name))}
            )
        except (ValueError, LookupError, TypeError, AttributeError, OSError):
            notes.append(f"{EVALUATION}/{name} is no evaluation that this version reads.")
    return found, notes


def _evaluation(value: Any) -> dict[str, Any]:
    """The parts of an evaluation that the page shows; raises what a missing or wrong part raises."""
    backbones = [
        {
            "name": str(backbone["name"]),
            "trials": len(backbone["trials"]),
            "seconds": sum(_number(trial.get("seconds")) or 0.0 for trial in backbone["trials"]),
            "mean": _recalls(backbone["mean"]),
            "std": _recalls(backbone.get("std")),
        }
        for backbone in value["backbones"]
    ]
    test = value.get("test") or {}
    return {
        "protocol": str((value.get("protocol") or {}).get("name", "")),
        "test": {name: test.get(name) for name in ("source", "images", "captions")},
        "backbones": backbones,
        "mean": _recalls(value["mean"]),
        "std": _recalls(value.get("std")),
        "notes": [str(note) for note in value.get("notes") or []],
    }


def _recalls(value: Any) -> dict[str, float | None]:
    return {name: _number((value or {}).get(name)) for name in RECALLS}


def _number(value: Any) -> float | None:
    """A finite number, or None: JSON of others may hold NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_comparison(folder: Folder) -> dict[str, Any]:
    """comparison.json of a folder. Raises ReportError in one line if it is none."""
    try:
        value = folder.read_json(COMPARISON)
        cells = [
            {
                "method": str(cell["method"]),
                "pairs": int(cell["pairs"]),
                "backbone": str(cell["backbone"]),
                "mean": _recalls(cell["mean"]),
                "std": _recalls(cell.get("std")),
                "trials": int(cell.get("trials") or 0),
                "set": str(cell.get("set") or ""),
            }
            for cell in value["cells"]
        ]
        test = value.get("test") or {}
        return {
            "source": str(value.get("source", "")),
            "test": {name: test.get(name) for name in ("source", "images", "captions")},
            "protocol": str((value.get("protocol") or {}).get("name", "")),
            "seeds": value.get("seeds"),
            "cells": cells,
            "notes": [str(note) for note in value.get("notes") or []],
        }
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        raise ReportError(
            f"{folder.full(COMPARISON)} cannot be read as a comparison ({error!r})"
        ) from error


def comparison_beside(run: RunFolder) -> tuple[dict[str, Any], str] | None:
    """The comparison that a run may be part of, and its own place in it ("" if it is not): here or up to two above."""
    if is_remote(run.folder.path):
        return None
    base = run.folder.path
    for _ in range(3):
        folder = Folder(base)
        if folder.exists(COMPARISON):
            try:
                own = os.path.relpath(run.folder.path, base).replace(os.sep, "/")
                return read_comparison(folder), "" if own == "." else own
            except ReportError:
                return None
        base = os.path.dirname(base)
    return None


def set_strips(
    folder: Folder, comparison: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """The first pairs of every set of a comparison, and a note on those that are not there."""
    strips: list[dict[str, Any]] = []
    missing = 0
    seen: set[str] = set()
    for cell in comparison["cells"]:
        path = cell["set"]
        if not path or path in seen:
            continue
        seen.add(path)
        if posixpath.isabs(path) or ".." in path.split("/") or "://" in path:
            missing += 1  # only what lies below the comparison is its own
            continue
        try:
            distilled = load_distilled((folder / path).path)
            pairs = [
                {"image": data_uri(distilled.image(pair)), "caption": distilled.captions[pair]}
                for pair in range(min(STRIP, len(distilled)))
            ]
        except (DistilledSetError, OSError):
            missing += 1
            continue
        strips.append(
            {"set": path, "method": cell["method"], "pairs": cell["pairs"], "first": pairs}
        )
    notes = (
        [f"The pairs of {missing:,} sets cannot be shown: the sets are not there."]
        if missing
        else []
    )
    return strips, notes
