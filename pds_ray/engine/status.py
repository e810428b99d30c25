"""How far a run is, from any machine that sees its folder."""

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
    """What a run is doing, as JSON values.

    `state` is finished, running, silent (under way, but its driver gives no sign of life), interrupted, failed, or idle
    (nothing is under way: the next stage has not begun). `stage` is the one under way, or the next; `progress` is as in
    `progress.State`, null where the stage has no bar.

    Raises ManifestError in one line if `path` is no run folder.
    """
    sign = heartbeat.read(
        RunFolder(Folder(path))
    )  # first: a driver takes it away after its last word in the manifest
    manifest = RunManifest.open(path)
    method = manifest.data.get("config", {}).get("method", "pds")
    entries = {
        stage: manifest.stages.get(stage, {}).get("status", "to do")
        for stage in catalog.method(method).names
    }
    open_ = [stage for stage, state in entries.items() if state != "done"]
    state = entries[open_[0]] if open_ else "finished"
    # a sign from far ahead is older than it looks: the clock was set back
    if sign is not None and abs(time.time() - sign["written"]) < SILENT_S:
        state = "running"
    elif state == "running" or (
        sign is not None and open_
    ):  # killed, perhaps before its first sign
        state = "silent"
    progress = sign["progress"] if sign else None
    if progress and entries.get(progress["label"]) == "done":  # the sign is older than the manifest
        progress = None
    return {
        "run": manifest.run.folder.shown,
        "state": "idle" if state == "to do" else state,
        "stage": open_[0] if open_ else None,
        "stages": entries,
        "progress": progress,
        "host": sign["host"] if sign else None,
        "heartbeat_age_s": round(time.time() - sign["written"], 1) if sign else None,
    }
