"""State of a run: fingerprints, commit markers, hashes; refusal of folders that do not belong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from pds_ray.config import FREE_FIELDS, RunConfig, flatten, public, settled, to_dict
from pds_ray.errors import some_of, without_secrets
from pds_ray.methods.base import Counts, Run, Stage
from pds_ray.sources.base import Shard
from pds_ray.store.manifest import ManifestError, RunManifest, fingerprint
from pds_ray.store.storage import StorageError, json_sha256
from pds_ray.telemetry import log
from pds_ray.telemetry.progress import QUIET_S, progress_bar

Markers = dict[str, dict[str, Any]]  # shard -> its commit marker


def open_run(run: Run, redo: bool) -> Run:
    """Open the run folder (which exists and is locked) and its embedding store; return the run.

    Raises ManifestError in one line if either belongs to another configuration and `redo` does not
    allow the change.
    """
    run = replace(run, manifest=RunManifest(run.folder))
    manifest = run.manifest
    recorded = {stage: entry["fingerprint"] for stage, entry in manifest.stages.items()}
    changed = [name for name, hash_ in recorded.items() if hash_ != run.fingerprints.get(name)]
    if "config" in manifest.data and not redo:
        _refuse_changes(run, changed)
    _open_store(run, redo)
    if redo or not run.folder.shards():
        manifest.update(shards_sha256=run.folder.save_shards(_rows(run.shards)))
    if changed:  # stale stages must not look finished, should redoing them be interrupted
        run.folder.distilled.delete_all()
        manifest.forget(*changed)
    return run


def _rows(shards: list[Shard]) -> list[dict[str, Any]]:
    """Return shards as rows of shards.parquet, without the secrets of their locations."""
    rows = [asdict(shard) for shard in shards]
    return [{**row, "location": without_secrets(row["location"])} for row in rows]


def _refuse_changes(run: Run, changed: list[str]) -> None:
    """Raise ManifestError if configuration, source, models or version are not those recorded.

    `changed`: stages whose fingerprint is not the recorded one.
    """
    place = run.folder.folder.shown
    differing = _differences(run.manifest.data["config"], public(run.config))
    if differing:
        raise ManifestError(
            f"{place} was made with another configuration ({'; '.join(differing)}); give another "
            "--out, or --redo to redo what depends on the change"
        )
    if changed:
        shards = _shards_that_differ(run.folder.shards(), run.shards)
        what = f"the source ({shards})" if shards else "a model or the version of pds-ray"
        raise ManifestError(
            f"{what} changed since {place} was begun (stage {changed[0]} no longer matches); give "
            "another --out, or --redo to redo what depends on it"
        )


def _shards_that_differ(before: list[dict[str, Any]], after: list[Shard]) -> str:
    """Name the shards that differ between two listings of a source, "" if none does.

    `before` holds rows of shards.parquet, none if the earlier listing is not known.
    """
    old = {row["name"]: (row["size"], row["version"]) for row in before}
    new = {shard.name: (shard.size, shard.version) for shard in after} if old else {}
    both = [name for name in new if name in old and new[name] != old[name]]
    resized = [name for name in both if new[name][0] != old[name][0]]
    kinds = {
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
        "of another size": [
            f"{name}: {old[name][0] or 0:,}, now {new[name][0]:,}" for name in resized
        ],
        "newer": [name for name in both if name not in resized],
    }
    return "; ".join(
        f"{len(names):,} shards {kind}: {some_of(names)}" for kind, names in kinds.items() if names
    )


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return a text per option that differs and may not."""
    # an option that the recorded version did not have counts as its default
    old, new = {**flatten(to_dict(settled(RunConfig()))), **flatten(before)}, flatten(after)
    return [
        f"{name}: {old.get(name)} -> {value}"
        for name, value in new.items()
        if old.get(name) != value and name not in FREE_FIELDS and not name.startswith("ray.")
    ]


def _open_store(run: Run, redo: bool) -> None:
    store, wanted = run.store, run.fingerprints["embed"]
    shared = run.config.embed.store is not None
    store.folder.create()
    if found := store.about():
        if found.get("fingerprint") == wanted:
            return
        if shared or not redo:  # a shared store is never wiped: other runs stand on it
            # stores of earlier versions do not list their shards
            shards = _shards_that_differ(store.shards() or run.folder.shards(), run.shards)
            raise ManifestError(
                f"the embeddings in {store.folder.shown} were made from other data, by another "
                f"encoder or by another version of pds-ray ({found.get('source')}, "
                f"{found.get('encoder')}{shards and f'; {shards}'}); give another "
                + ("--embed.store" if shared else "--out, or --redo")
            )
        store.folder.delete_all()
        store.folder.create()
    begin_store(run)


def begin_store(run: Run) -> None:
    """Write what the embedding store of a run is made from, and its shards."""
    about = {
        "source": without_secrets(run.config.source),
        "encoder": run.encoder.name,
        "space": run.encoder.space,
        "dim": run.encoder.dim,
    }
    # without their places, which other runs need not share
    shards = [{**asdict(shard), "location": ""} for shard in run.shards]
    run.store.begin(about, shards)


def is_done(run: Run, stage: Stage) -> bool:
    """Return whether a stage ended with what its bytes depend on as it is now."""
    return run.manifest.is_done(stage.name, run.fingerprints[stage.name])


@contextmanager
def recorded(run: Run, stage: Stage) -> Iterator[Counts]:
    """Record a stage in run.json, however it ends; the block fills in the counts."""
    manifest, name = run.manifest, stage.name
    manifest.start(name, run.fingerprints[name])
    counts: Counts = {}
    with log.context(stage=name):
        log.event("stage_started")
        try:
            yield counts
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | SystemExit)
            outcome = "interrupted" if stopped else "failed"
            manifest.stop(name, outcome)
            log.event(f"stage_{outcome}", level="error")
            raise
        manifest.stop(name, "done", counts)
        log.event("stage_done", seconds=manifest.stages[name]["seconds"], counts=counts)


def keep_hashes(run: Run, stage: Stage) -> None:
    """Keep the hashes of what a stage wrote; later stages stand as long as these do not change."""
    from pds_ray.distributed.hashing import hash_files

    assert stage.files is not None
    files = stage.files(run)
    run.folder.sweep_beside(files)
    with progress_bar("hash", len(files), "files", delay_s=QUIET_S) as bar:
        bar.set_postfix_str(f"the files of {stage.name}", refresh=False)
        hashes = hash_files(run.folder, files, bar.update)
    known, digest = run.manifest.data.get("hashes", {}), json_sha256(hashes)
    if stage.name in known:
        same = known[stage.name] == digest
    else:  # an earlier version recorded no hash of the file
        same = run.folder.hashes(stage.name) == hashes
    if not same:
        forget_after(run, stage)
    run.folder.save_hashes(stage.name, hashes)
    run.manifest.update(hashes={**known, stage.name: digest})


def delete_unproven(run: Run, stage: Stage) -> None:
    """Delete the files of a stage whose hashes are lost, unless they are those that it left."""
    recorded = run.manifest.data.get("hashes", {}).get(stage.name)
    if not recorded:  # by an earlier version: files that are there are taken for good
        return
    assert stage.files is not None
    try:
        names = stage.files(replace(run, embedded=_markers(run)))
    except (OSError, ValueError):  # they are as many as a file says that is damaged too
        return
    try:
        proven = json_sha256(run.folder.hash_files(names)) == recorded
    except StorageError:
        proven = False
    if not proven:
        run.folder.folder.delete_each(names)


def forget_after(run: Run, stage: Stage) -> None:
    """Clear the status of later stages, lest they look finished if redoing is interrupted."""
    later = [after.name for after in run.method.after(stage.name)]
    if run.manifest.stages.keys() & set(later):
        run.folder.distilled.delete_all()
        run.manifest.forget(*later)


def read_embeddings(run: Run, stage: Stage) -> Run:
    """Return the run with the markers of its embedded shards; what stood on others is forgotten.

    Raises StorageError if some are lost.
    """
    expected = _expected(run)
    found = run.embedded or _markers(run)
    if len(found) < expected:
        raise StorageError(
            f"{expected - len(found):,} shards that were embedded are not in "
            f"{run.store.folder.shown}; the same command continues"
        )
    content = _content(found)
    if run.manifest.data.get("store_content") != content:
        forget_after(run, stage)
    run.manifest.update(store_content=content)
    return replace(run, embedded=found)


def check_store(run: Run) -> Run:
    """Return the run with its markers if its embeddings are done and those that were last read.

    Otherwise their stage is forgotten: another run brought shards back, or some are lost.
    """
    stage = run.method.stages[0]
    if not is_done(run, stage):
        return run
    found = unchanged(run)
    if not found:
        run.manifest.forget(stage.name)
    return replace(run, embedded=found)


def unchanged(run: Run) -> Markers:
    """Return the markers if the store holds the same as when it was last read; else nothing."""
    found = _markers(run)
    return found if _content(found) == run.manifest.data.get("store_content") else {}


def _expected(run: Run) -> int:
    """Return how many shards are embedded, as the stage counted them."""
    counts = run.counts("embed")
    # earlier versions did not count damaged shards as failed
    return counts.get("shards_embedded", len(run.shards) - counts.get("failed_shards", 0))


def _markers(run: Run) -> Markers:
    """Return the markers of the embedded shards, in order; failed shards have none."""
    markers = _committed(run)
    return {shard.name: markers[shard.name] for shard in run.shards if shard.name in markers}


def _committed(run: Run) -> Markers:
    with progress_bar("list", None, "shards", delay_s=QUIET_S) as bar:
        bar.set_postfix_str(f"the markers in {run.store.folder.shown}", refresh=False)
        return run.store.committed(bar.update)


def _content(embedded: Mapping[str, dict[str, Any]]) -> str:
    """Return a digest of all embeddings of the run.

    They may change under one configuration, as when failed shards succeed.
    """
    return fingerprint([[shard, marker["sha256"]] for shard, marker in embedded.items()])
