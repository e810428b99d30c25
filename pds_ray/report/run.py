"""A run folder opened for a report."""

from __future__ import annotations

from dataclasses import dataclass

from pds_ray import catalog
from pds_ray.config import FilesConfig, options
from pds_ray.methods.base import Method
from pds_ray.report.values import Json
from pds_ray.store.distilled_set import DistilledSet, DistilledSetError, load_distilled
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import RunManifest
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import StorageError

PAIR_LIMIT = 1_000
"""Number of pairs on the page."""


@dataclass(frozen=True)
class OpenRun:
    """A run folder opened for reading."""

    folder: RunFolder
    manifest: Json
    counts: dict[str, Json]
    """Stage -> counts, for the stages that are done."""
    store: EmbeddingStore
    markers: dict[str, Json]
    """Shard -> marker, in the order of names; empty if the embeddings cannot be read."""
    distilled: DistilledSet | None

    @property
    def config(self) -> Json:
        return self.manifest.get("config", {})

    @property
    def read(self) -> FilesConfig:
        """The options by which the source was read; at their default if they are not recorded."""
        recorded = self.config.get("read", {})
        known = options(FilesConfig).keys() & recorded.keys()
        return FilesConfig(**{name: recorded[name] for name in known})

    @property
    def method(self) -> Method:
        return catalog.recorded_method(self.config)

    @property
    def method_name(self) -> str:
        return self.config.get("method", "pds")

    @property
    def shown(self) -> int:
        """Number of pairs on the page."""
        return min(len(self.distilled), PAIR_LIMIT) if self.distilled else 0


def open_run(folder: RunFolder) -> tuple[OpenRun, list[str]]:
    """Open a run folder; return it with a note on everything that is missing or unreadable."""
    manifest = RunManifest(folder).data
    notes = [str(note) for note in manifest.get("notes", [])]
    stages = manifest["stages"]
    counts = {
        name: entry.get("counts", {})
        for name, entry in stages.items()
        if entry.get("status") == "done"
    }
    store = folder.store(
        manifest.get("config", {}).get("embed", {}).get("store"),
        stages.get("embed", {}).get("fingerprint", ""),
    )
    distilled: DistilledSet | None = None
    if "materialize" in counts:
        try:
            distilled = load_distilled(folder.folder.path)
        except DistilledSetError as error:
            notes.append(f"The pairs cannot be shown: {error}.")
    else:
        notes.append(f"The run is not finished: {_last_stage(stages)}.")
    markers = _markers(store) if "embed" in counts else {}
    if "embed" in counts and not markers:
        notes.append(
            "The embeddings are no longer there, cannot be reached or are of another version of "
            "pds-ray: no nearest images, no clusters and no map."
        )
    return OpenRun(folder, manifest, counts, store, markers, distilled), notes


def _markers(store: EmbeddingStore) -> dict[str, Json]:
    try:
        return store.committed()
    except StorageError:  # a shared store whose credentials are not known here
        return {}


def _last_stage(stages: Json) -> str:
    """Return the state of the last stage of an unfinished run that is not done."""
    unfinished = [
        f"stage {name} is {entry.get('status')}"
        for name, entry in stages.items()
        if entry["status"] != "done"
    ]
    return unfinished[-1] if unfinished else "stages are missing"
