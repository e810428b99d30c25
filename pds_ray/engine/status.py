"""Status of a run, from any machine that sees its folder."""

from __future__ import annotations

import time
from typing import Any

from pds_ray import catalog
from pds_ray.store import heartbeat
from pds_ray.store.heartbeat import SILENT_S
from pds_ray.store.manifest import RunManifest
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder


def status(path: str) -> dict[str, Any]:
    """Return what a run is doing, as JSON values.

    `state` is finished, running, silent (a stage is running, but its driver's heartbeat is stale),
    interrupted, failed, or idle (no stage is running: the next has not begun). `stage` is the one
    that runs, or the next; `progress` is as in `progress.State`, null where the stage has no bar.

    Raises ManifestError in one line if `path` is no run folder.
    """
    # before the manifest: a driver removes its heartbeat after its last entry there
    sign = heartbeat.read(RunFolder(Folder(path)))
    manifest = RunManifest.open(path)
    method = catalog.recorded_method(manifest.data.get("config", {}))
    entries = {
        stage: manifest.stages.get(stage, {}).get("status", "to do") for stage in method.names
    }
    unfinished = [stage for stage, state in entries.items() if state != "done"]
    state = entries[unfinished[0]] if unfinished else "finished"
    # a heartbeat from far ahead is older than it looks: the clock was set back
    if sign is not None and abs(time.time() - sign["written"]) < SILENT_S:
        state = "running"
    elif state == "running" or (sign is not None and unfinished):
        state = "silent"  # killed, perhaps before its first heartbeat
    progress = sign["progress"] if sign else None
    if progress and entries.get(progress["label"]) == "done":  # older than the manifest
        progress = None
    return {
        "run": manifest.run.folder.shown,
        "state": "idle" if state == "to do" else state,
        "stage": unfinished[0] if unfinished else None,
        "stages": entries,
        "progress": progress,
        "host": sign["host"] if sign else None,
        "heartbeat_age_s": round(time.time() - sign["written"], 1) if sign else None,
    }
