"""The run manifest, run.json: configuration, versions, and the status of each stage.

A stage's fingerprint covers everything its bytes depend on. A stage is redone exactly if its
recorded fingerprint differs from that of the current configuration and data.
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
from pds_ray.store.sealed import SEAL, damage, sealed
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
    """A run folder belongs to another configuration, or cannot be read."""


def fingerprint(*parts: Any) -> str:
    """Return a hex digest of JSON values; the order of a dictionary does not count."""
    canonical = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:32]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _damaged(run: RunFolder, name: str, why: str) -> ManifestError:
    return ManifestError(
        f"{run.folder.full(name)} is not a run manifest, or a damaged one ({why}); pds-ray verify "
        "RUN --repair takes its copy; or give another --out, or delete it: a run goes on without "
        "it from the shards that are embedded"
    )


def rate(stage: dict[str, Any], count: str) -> float:
    """Return the rate of a stage's last session: its count of that name per second, 0 if unknown.

    `stage` is its entry in run.json.
    """
    done, seconds = stage.get("counts", {}).get(count), stage.get("sitting_s")
    return done / seconds if done and seconds else 0.0


class RunManifest:
    """A run.json in memory; every change is written at once, and a copy of the file with it.

    Raises ManifestError in one line if the file is damaged or no run manifest.
    """

    def __init__(self, run: RunFolder, name: str = RunFolder.MANIFEST) -> None:
        self.run = run
        self.data: dict[str, Any] = {"stages": {}}
        if self.run.folder.exists(name):
            try:
                self.data = self.run.folder.read_json(name)
                self.data["stages"].items()
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise _damaged(run, name, first_line(error)) from error
        self.sealed = self.data.pop(SEAL, None) is not None
        """It has a seal and a copy: an earlier version wrote neither."""

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        return self.data["stages"]

    def update(self, **values: Any) -> None:
        """Set top-level entries and write the file."""
        self.data.update(values)
        record = sealed(self.data)
        for name in (RunFolder.MANIFEST, RunFolder.MANIFEST_COPY):
            self.run.folder.write_json(name, record)

    def is_done(self, stage: str, fingerprint: str) -> bool:
        entry = self.stages.get(stage, {})
        return entry.get("fingerprint") == fingerprint and entry.get("status") == "done"

    @classmethod
    def open(cls, path: str) -> RunManifest:
        """Open the manifest of an existing run.

        Raises ManifestError in one line if `path` is no run folder or a damaged one.
        """
        run = RunFolder(Folder(path))
        if not run.folder.exists(RunFolder.MANIFEST):
            raise ManifestError(
                f"{path} is no run folder: it has no {RunFolder.MANIFEST}; give the --out of a run"
            )
        return cls(run)

    @classmethod
    def open_whole(cls, path: str) -> tuple[RunManifest, dict[str, str]]:
        """Open the manifest of an existing run, or the copy where the manifest is damaged.

        Returns it with what is wrong, if anything, by the name of the file. Raises ManifestError as
        `open` does, and if neither is as it was written.
        """
        run = RunFolder(Folder(path))
        names = (RunFolder.MANIFEST, RunFolder.MANIFEST_COPY)
        found = {name: what for name in names if (what := damage(run.folder, name))}
        if len(found) == len(names):
            cls.open(path)
            raise _damaged(run, RunFolder.MANIFEST, "it has changed since it was written")
        manifest = cls(run, next(name for name in names if name not in found))
        return manifest, found if manifest.sealed else {}

    def forget(self, *stages: str) -> None:
        """Clear the recorded status of stages."""
        if [stage for stage in stages if self.stages.pop(stage, None) is not None]:
            self.update()

    def start(self, stage: str, fingerprint: str) -> None:
        """Record that a stage is running.

        The time that interrupted sessions spent on it is kept; that of killed ones is not known.
        """
        entry = self.stages.get(stage, {})
        spent = entry.get("seconds", 0.0) if entry.get("fingerprint") == fingerprint else 0.0
        self.stages[stage] = {
            "status": "running",
            "fingerprint": fingerprint,
            "seconds": spent,
            "started": time.time(),
        }
        self._began = time.monotonic()  # the wall clock may jump
        self.update()

    def stop(self, stage: str, status: str, counts: dict[str, Any] | None = None) -> None:
        """Record the end of a stage: done, interrupted or failed."""
        entry = self.stages[stage]
        session_s = time.monotonic() - self._began
        # rates need it: the work of a killed session is counted in the stage, its time is not
        entry["sitting_s"] = round(session_s, 3)
        entry["seconds"] = round(entry["seconds"] + session_s, 3)
        del entry["started"]
        entry["status"] = status
        if counts is not None:
            entry["counts"] = counts
        self.update()
