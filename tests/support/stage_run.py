"""A run for stages that work on a store that is there: no source, no models, no engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from pds_ray import catalog
from pds_ray.config import RunConfig, settled
from pds_ray.decoders.base import DecoderInfo
from pds_ray.encoders.base import EncoderInfo
from pds_ray.methods.base import Counts, Run
from pds_ray.modalities.image import Preprocess
from pds_ray.sources.base import Shard, Source
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import RunManifest
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder


def stage_run(
    store: EmbeddingStore,
    folder: RunFolder,
    config: RunConfig,
    dim: int = 0,
    source: Source | None = None,
    shards: list[Shard] | None = None,
    encoder: EncoderInfo | None = None,
    decoder: DecoderInfo | None = None,
) -> Run:
    """Return a run on all committed shards of `store`, by name, with embeddings of width `dim`."""
    method = catalog.method(config.method)
    markers = store.committed() if Path(store.folder.path).is_dir() else {}
    manifest = RunManifest(folder)
    manifest.data["store_content"] = "content"
    images, pairs = (
        sum(marker[name] for marker in markers.values()) for name in ("images", "pairs")
    )
    manifest.stages["embed"] = {"counts": {"images": images, "pairs": pairs}}
    return Run(
        config=settled(config),
        method=method,
        source=cast(Any, source),
        shards=shards or [],
        encoder=encoder or EncoderInfo("none", dim, "none", "none", Preprocess(8), ()),
        decoder=decoder or DecoderInfo("none", None, "none"),
        folder=folder,
        store=store,
        manifest=manifest,
        fingerprints=dict.fromkeys(method.names, "fingerprint"),
        embedded=dict(sorted(markers.items())),
    )


def embedding_run(path: Path, source: Source, encoder: EncoderInfo, config: RunConfig) -> Run:
    """Return a run that fills a new store at `path` with all shards of `source`."""
    store = EmbeddingStore(Folder(str(path)))
    store.folder.create()
    folder = RunFolder(store.folder / "run")
    return stage_run(store, folder, config, source=source, shards=source.shards(), encoder=encoder)


def do(run: Run, *stages: str) -> dict[str, Counts]:
    """Run some stages one after the other, as the engine does; return what each counted."""
    done = {}
    for name in stages:
        done[name] = run.method.stage(name).function()(run)
        run.manifest.stages[name] = {"counts": done[name]}
    return done
