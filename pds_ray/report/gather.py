"""Read a run folder, or the folder of a comparison, into plain JSON-able values for the page.

Nothing here knows of HTML. Parts that a run does not have (a selection has no clusters, an
unfinished run no pairs) are None or empty, and what could not be read becomes a note.
"""

from __future__ import annotations

from collections.abc import Callable

from pds_ray.report.clusters import gather_clusters
from pds_ray.report.dropped import gather_dropped
from pds_ray.report.evaluations import (
    ReportError,
    baselines,
    comparison_beside,
    read_comparison,
    read_evaluations,
    set_strips,
)
from pds_ray.report.header import gather_header
from pds_ray.report.learned import gather_learned
from pds_ray.report.pairs import gather_pairs
from pds_ray.report.run import OpenRun, open_run
from pds_ray.report.scan import scan_embeddings
from pds_ray.report.values import Json, public
from pds_ray.store.evaluation_folder import COMPARISON
from pds_ray.store.manifest import rate
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder

QUICK_IMAGES = 1_000_000
"""A quick report scans no more images than this."""

DETAILS = ("ray", "versions", "config")
"""Entries of run.json that are shown as they are."""

Step = Callable[[], object]


def gather(path: str, quick: bool = False, step: Step = lambda: None) -> Json:
    """Return the content of the report of a run folder, or of a folder with a comparison.

    `quick` leaves out what would take long on a very large store. `step` is called after each piece
    of work. Raises ReportError in one line if there is nothing to report on.
    """
    folder = Folder(path)
    if folder.exists(RunFolder.MANIFEST):
        return _gather_run(RunFolder(folder), quick, step)
    if folder.exists(COMPARISON):
        return _gather_comparison(folder)
    raise ReportError(
        f"{path} has neither a {RunFolder.MANIFEST} nor a {COMPARISON}: "
        "there is nothing to report on"
    )


def _gather_comparison(folder: Folder) -> Json:
    comparison = read_comparison(folder)
    strips, notes = set_strips(folder, comparison)
    notes = comparison["notes"] + notes
    return {"kind": "comparison", **comparison, "strips": strips, "notes": notes}


def _gather_run(folder: RunFolder, quick: bool, step: Step) -> Json:
    run, notes = open_run(folder)
    scan = None
    if quick and run.counts.get("embed", {}).get("images", 0) > QUICK_IMAGES and run.markers:
        notes.append(
            f"More than {QUICK_IMAGES:,} images: only the nearest one of each pair is shown, and "
            "no map of the space; the command pds-ray report adds both."
        )
    elif run.markers:
        scan = scan_embeddings(run, step)
    pairs, missing = gather_pairs(run, scan, step)
    clusters = gather_clusters(run, step)
    learned, unlearned = gather_learned(run, step)
    evaluations, unread = read_evaluations(folder)
    total = len(run.distilled) if run.distilled else 0
    return {
        "kind": "run",
        "header": gather_header(run, clusters, evaluations, scan.coverage if scan else {}),
        "notes": notes + missing + unlearned + unread,
        "pairs": pairs,
        "pairs_total": total,
        "learned": learned,
        "clusters": clusters,
        "space": scan and scan.space,
        "dropped": gather_dropped(run),
        "stages": _stages(run),
        "evaluations": evaluations,
        "baselines": baselines(comparison_beside(folder), total, evaluations),
        "details": {name: public(run.manifest.get(name, {})) for name in DETAILS},
    }


def _stages(run: OpenRun) -> list[Json]:
    """Return a row per stage that has begun: status, seconds, rate."""
    rows = []
    entries = run.manifest["stages"]
    for stage in run.method.stages:
        if stage.name not in entries:
            continue
        entry = entries[stage.name]
        per_s = rate(entry, stage.counted)
        rows.append(
            {
                "stage": stage.name,
                "status": entry.get("status", ""),
                "seconds": entry.get("seconds", 0),
                "rate": f"{per_s:,.0f} {stage.unit}/s" if per_s else "",
            }
        )
    return rows
