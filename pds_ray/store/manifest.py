"""What was asked and what is done: fingerprints, and run.json.

A stage's fingerprint covers all that its bytes depend on. A stage is redone exactly when the fingerprint recorded for
it differs from the one the current configuration and data give.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pds_ray.errors import UserError, first_line
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder

PACKAGES = (
    "pds-ray",
    "ray",
    "torch",
    "open_clip_torch",
    "diffusers",
    "transformers",
    "faiss-cpu",
    "faiss-gpu",
    "scipy",
    "numpy",
    "pyarrow",
    "pillow",
)


class ManifestError(UserError, ValueError):
    """A run folder that belongs to something else, or cannot be read."""


def fingerprint(*parts: Any) -> str:
    """Hex digest of JSON values; dictionaries compare without regard to order."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def rate(stage: dict[str, Any], count: str) -> float:
    """Of a stage's entry in run.json: what it counts under that name, a second of its last sitting; 0 if unknown."""
    done, seconds = stage.get("counts", {}).get(count), stage.get("sitting_s")
    return done / seconds if done and seconds else 0.0


class RunManifest:
    """run.json in memory; every change is written at once."""

    def __init__(self, run: RunFolder) -> None:
        self.run = run
        self.data: dict[str, Any] = {"stages": {}}
        if self.run.folder.exists(RunFolder.MANIFEST):
            try:
                self.data = self.run.folder.read_json(RunFolder.MANIFEST)
                self.data["stages"].items()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                where = self.run.folder.full(RunFolder.MANIFEST)
                raise ManifestError(
                    f"{where} is not a run manifest, or a damaged one ({first_line(error)}); give another --out, or "
                    "delete it: a run goes on without it from the shards that are embedded"
                ) from error

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.data["stages"]

    def update(self, **values: Any) -> None:
        """Sets top-level entries and writes."""
        self.data.update(values)
        self.run.folder.write_json(RunFolder.MANIFEST, self.data)

    def is_done(self, stage: str, print_: str) -> bool:
        entry = self.stages.get(stage, {})
        return entry.get("fingerprint") == print_ and entry.get("status") == "done"

    @classmethod
    def open(cls, path: str) -> RunManifest:
        """That of a run which exists. Raises ManifestError in one line if `path` is no run folder or a damaged one."""
        run = RunFolder(Folder(path))
        if not run.folder.exists(RunFolder.MANIFEST):
            raise ManifestError(f"{path} is no run folder: it has no {RunFolder.MANIFEST}")
        return cls(run)

    def forget(self, *stages: str) -> None:
        """Takes stages for never begun."""
        if [stage for stage in stages if self.stages.pop(stage, None) is not None]:
            self.update()

    def start(self, stage: str, print_: str) -> None:
        """Records that a stage is under way; time spent on it by interrupted runs is kept, unless they were killed."""
        entry = self.stages.get(stage, {})
        spent = entry.get("seconds", 0.0) if entry.get("fingerprint") == print_ else 0.0
        self.stages[stage] = {
            "status": "running",
            "fingerprint": print_,
            "seconds": spent,
            "started": time.time(),
        }
        self._began = time.monotonic()  # the wall clock may jump
        self.update()

    def stop(self, stage: str, status: str, counts: dict[str, Any] | None = None) -> None:
        """Records how a stage ended: done, interrupted or failed."""
        entry = self.stages[stage]
        sitting_s = time.monotonic() - self._began
        entry["sitting_s"] = round(
            sitting_s, 3
        )  # for rates: what a killed sitting did is there, its time is not known
        entry["seconds"] = round(entry["seconds"] + sitting_s, 3)
        del entry["started"]
        entry["status"] = status
        if counts is not None:
            entry["counts"] = counts
        self.update()
