"""Is everything there that the manifests promise, to the byte? And redoing just what is not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pds_ray.artifacts import HASH_THREADS, EmbeddingStore, RunFolder
from pds_ray.config import ConfigError
from pds_ray.manifest import RunManifest
from pds_ray.pipeline import recorded_config, redo, stages
from pds_ray.progress import progress_bar
from pds_ray.stages.embed import shard_counts
from pds_ray.stages.materialize import MANIFEST
from pds_ray.storage import Folder


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be."""

    stage: str
    name: str
    """Below the run folder; of embeddings, below their store."""
    what: str
    """missing, corrupt, or in what its content disagrees with the manifest."""
    shard: str = ""
    """Of embeddings."""


@dataclass(frozen=True)
class _File:
    stage: str
    folder: Folder
    name: str
    sha256: str
    shard: str = ""

    def problem(self) -> Problem | None:
        try:
            found = self.folder.sha256(self.name)
        except OSError:
            return Problem(self.stage, self.name, "missing", self.shard)
        return None if found == self.sha256 else Problem(self.stage, self.name, "corrupt", self.shard)


def verify(path: str) -> tuple[int, list[Problem]]:
    """Checks every file of the finished stages of a run; returns how many were looked at, and what is wrong.

    Raises ConfigError if `path` is no run folder, ManifestError if its manifest cannot be read.
    """
    run = RunFolder(Folder(path))
    if not run.folder.exists(RunFolder.MANIFEST):
        raise ConfigError(f"{path} is no run folder: it has no {RunFolder.MANIFEST}")
    manifest = RunManifest(run)
    config = recorded_config(manifest, path)
    done = [stage for stage in stages(config.method) if manifest.stages.get(stage, {}).get("status") == "done"]
    problems: list[Problem] = []
    files: list[_File] = []
    if "embed" in done:
        print_ = manifest.stages["embed"]["fingerprint"]
        store = EmbeddingStore(Folder(config.embed.store) if config.embed.store else run.embeddings, print_)
        markers = store.committed()
        problems += _counts(markers, manifest.stages["embed"]["counts"])
        files += [
            _File("embed", store.folder, name, sha256, shard)
            for shard, marker in markers.items()
            for name, sha256 in marker["sha256"].items()
        ]
    for stage in done:
        files += [_File(stage, run.folder, name, sha256) for name, sha256 in run.hashes(stage).items()]
    if "materialize" in done:
        files += list(_distilled(run, problems))
    with ThreadPoolExecutor(HASH_THREADS) as threads, progress_bar("verify", len(files), "files") as bar:
        for problem in threads.map(_File.problem, files):
            problems += [problem] if problem else []
            bar.update()
    return len(files), problems
