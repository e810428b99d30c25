"""Read evaluations of a run, and the comparison of a collection of sets."""

from __future__ import annotations

import math
import os
import posixpath
from typing import Any

from pds_ray.errors import UserError, cause
from pds_ray.report.images import data_uri
from pds_ray.report.values import Json
from pds_ray.store.distilled_set import DistilledSetError, load_distilled
from pds_ray.store.evaluation_folder import (
    AVERAGE,
    COMPARISON,
    EVALUATION,
    RECALL_TITLES,
    evaluation_names,
    result_name,
)
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder, is_remote

RECALLS = (*RECALL_TITLES, "r_mean")
COSTS = ("bytes", "pixels", "pixels_per_epoch")
"""Counts of a set, besides its pairs, that a cell has unless an earlier version made it."""
STRIP = 8
"""Pairs shown of each set on the page of a comparison."""
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, OSError)
"""Errors that JSON of another form raises while it is read."""


class ReportError(UserError, ValueError):
    """There is nothing to report on, or it cannot be read."""


def read_evaluations(run: RunFolder) -> tuple[list[Json], list[str]]:
    """Return every evaluation of a run, by name, and a note for each file that is none."""
    folder = run.folder / EVALUATION
    found, notes = [], []
    for name in evaluation_names(run.folder):
        file = result_name(name)
        try:
            found.append({"name": name, **_evaluation(folder.read_json(file))})
        except UNREADABLE:
            notes.append(f"{EVALUATION}/{file} is no evaluation that this version reads.")
    return found, notes


def _evaluation(value: Any) -> Json:
    """Return the parts of an evaluation that the page shows. Raises one of UNREADABLE."""
    backbones = [
        {
            "name": str(backbone["name"]),
            "used": ", ".join(map(str, backbone["used"])) or "none" if "used" in backbone else None,
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
    """Return a finite number, or None: JSON of other programs may hold NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def read_comparison(folder: Folder) -> Json:
    """Return the comparison of a folder. Raises ReportError in one line if there is none."""
    try:
        value = folder.read_json(COMPARISON)
        test = value.get("test") or {}
        return {
            "source": str(value.get("source", "")),
            "test": {name: test.get(name) for name in ("source", "images", "captions")},
            "protocol": str((value.get("protocol") or {}).get("name", "")),
            "seeds": value.get("seeds"),
            "set_seeds": value.get("set_seeds"),
            "cells": [_cell(cell) for cell in value["cells"]],
            "budgets": any(cell.get("budget") for cell in value["cells"]),
            "notes": [str(note) for note in value.get("notes") or []],
        }
    except UNREADABLE as error:
        raise ReportError(
            f"{folder.full(COMPARISON)} cannot be read as a comparison ({cause(error)})"
        ) from error


def _cell(cell: Any) -> Json:
    return {
        "method": str(cell["method"]),
        "pairs": round(cell["pairs"]),
        "size": round(cell.get("budget") or cell["pairs"]),
        **{name: _number(cell.get(name)) for name in COSTS},
        "backbone": str(cell["backbone"]),
        "mean": _recalls(cell["mean"]),
        "std": _recalls(cell.get("std")),
        "set_std": _recalls(cell.get("set_std")),
        "trials": int(cell.get("trials") or 0),
        "set": str(cell.get("set") or ""),
    }


def comparison_beside(run: RunFolder) -> tuple[Json, str] | None:
    """Return the comparison that a run may belong to, and the run's path in it.

    The comparison is looked for in the run folder and up to two levels above; the path is "" if it
    is in the run folder. None if there is no comparison.
    """
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


def set_strips(folder: Folder, comparison: Json) -> tuple[list[Json], list[str]]:
    """Return the first pairs of every set of a comparison, and a note on missing sets."""
    cells: dict[str, Json] = {}
    for cell in comparison["cells"]:
        if cell["set"]:
            cells.setdefault(cell["set"], cell)
    strips = []
    for path, cell in cells.items():
        if (pairs := _first_pairs(folder, path)) is not None:
            about = {"set": path, "method": cell["method"], "pairs": cell["pairs"]}
            strips.append({**about, "first": pairs})
    missing = len(cells) - len(strips)
    note = f"The pairs of {missing:,} sets cannot be shown: the sets are not there."
    return strips, [note] if missing else []


def _first_pairs(folder: Folder, path: str) -> list[Json] | None:
    """Return the first pairs of the set at `path`; None if it is not there.

    Only what lies below the comparison is its own: no other path is followed.
    """
    if posixpath.isabs(path) or ".." in path.split("/") or "://" in path:
        return None
    try:
        distilled = load_distilled((folder / path).path)
        return [
            {"image": data_uri(distilled.image(pair)), "caption": distilled.captions[pair]}
            for pair in range(min(STRIP, len(distilled)))
        ]
    except (DistilledSetError, OSError):
        return None


def baselines(beside: tuple[Json, str] | None, pairs: int, evaluations: list[Json]) -> Json | None:
    """Return this run among the methods of its comparison, at the same pairs or budget.

    `beside` is what `comparison_beside` returned. None if there is nothing to compare with.
    """
    if beside is None:
        return None
    comparison, own = beside
    mine = [cell["size"] for cell in comparison["cells"] if own and cell["set"] == own]
    size = mine[0] if mine else pairs
    bars = [
        {
            "method": cell["method"],
            "mean": cell["mean"],
            "std": cell["std"],
            "own": bool(own) and cell["set"] == own,
        }
        for cell in comparison["cells"]
        if cell["size"] == size and cell["backbone"] == AVERAGE
    ]
    if not bars:
        return None
    if not any(bar["own"] for bar in bars) and evaluations:
        ours = evaluations[0]
        bars.append({"method": "this run", "mean": ours["mean"], "std": ours["std"], "own": True})
    budget = size if mine and comparison["budgets"] else None
    about = {"pairs": pairs, "budget": budget, "protocol": comparison["protocol"]}
    return {"bars": bars, **about}
