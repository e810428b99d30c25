"""A whole run on one page: every stage of the method that is not done is run, counted, hashed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from pds_ray.config import ConfigError, RunConfig, public
from pds_ray.distributed.lifetime import session_kept
from pds_ray.engine import state
from pds_ray.engine.plan import check_extras, make_run
from pds_ray.methods.base import Run, Stage
from pds_ray.store.heartbeat import beating
from pds_ray.store.manifest import versions
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import StorageError
from pds_ray.telemetry import log


def distill(config: RunConfig, redo: bool = False, only: Collection[str] = ()) -> dict[str, Any]:
    """Run every stage that is not done yet; return the content of run.json.

    Interrupted at any instant and called again with the same configuration, it continues and ends
    with the same bytes. `redo` allows a run folder of another configuration: what depends on the
    change is done again. `only` names the stages to run, if any; stages before them must be done.
    A Ray that it starts ends with the call; one that runs already is used and stays.

    Raises ConfigError, SourceError, StorageError or ManifestError in one line for user errors, and
    UserError while another thread of the process is at work on a run.
    """
    run = make_run(config, redo)
    unknown = [name for name in only if name not in run.method.names]
    if unknown:
        known = ", ".join(run.method.names)
        raise ConfigError(f"--only names {unknown[0]!r}; stages of method {config.method}: {known}")
    run.folder.check_ours()
    run.folder.folder.create()
    with _locked(run.folder):
        return _run_stages(state.open_run(run, redo), only)


def redo(run: Run, stages: Iterable[str], prepare: Callable[[Run], None]) -> dict[str, Any]:
    """Redo some stages of a run, then what depends on them if they come out otherwise.

    `prepare` is called when all checks have passed, with run folder and store locked. Returns and
    raises what `distill` does.
    """
    with _locked(run.folder):
        run = state.open_run(run, redo=False)
        run.manifest.forget(*stages)
        with run.store.folder.lock():
            prepare(run)
        return _run_stages(run)


@contextmanager
def _locked(folder: RunFolder) -> Iterator[None]:
    """Hold the run lock and the heartbeat."""
    with log.context(run=folder.folder.shown), folder.folder.lock():
        # before the first heartbeat, which might be half written; the store has a lock of its own
        folder.folder.sweep(spare=folder.embeddings.name)
        with beating(folder):
            yield


@session_kept()
def _run_stages(run: Run, only: Collection[str] = ()) -> dict[str, Any]:
    """Run what is not done up to the last wanted stage; return the content of run.json."""
    began = time.monotonic()
    run.manifest.update(
        config=public(run.config),
        versions=versions(),
        encoder=run.encoder.name,
        space=run.encoder.space,
        notes=list(run.decoder.notes),
    )
    run = state.check_store(run)
    wanted = [name for name in run.method.names if not only or name in only]
    last = run.method.names.index(wanted[-1])
    started = False
    for stage in run.method.stages[: last + 1]:
        _check_order(run, wanted)
        if not state.is_done(run, stage):
            if not started:  # Ray is imported and started when the first stage needs it
                _start_ray(run)
                started = True
            _run_stage(run, stage)
        if stage.files is None:
            run = state.read_embeddings(run, stage)
        run = run.after(stage)
        if stage.settles is not None:
            check_extras(run.config, run.method)
    seconds = round(time.monotonic() - began, 3)
    run.manifest.update(finished=time.time(), last_run_seconds=seconds)
    return run.manifest.data


def _start_ray(run: Run) -> None:
    from pds_ray.distributed import session

    run.manifest.update(ray=session.start(run.config.ray, run.folder.folder.shown))


def _run_stage(run: Run, stage: Stage) -> None:
    from pds_ray.distributed import session

    with state.recorded(run, stage) as counts, session.unwrapped_errors():
        if stage is run.method.stages[-1]:
            _check_embeddings(run)
        counts.update(stage.function()(run))
        if stage.files is not None:
            state.keep_hashes(run, stage)


def _check_order(run: Run, wanted: list[str]) -> None:
    """Raise ConfigError if a wanted stage comes after one that is neither done nor wanted."""
    for stage in run.method.stages[: run.method.names.index(wanted[-1])]:
        if stage.name not in wanted and not state.is_done(run, stage):
            raise ConfigError(
                f"stage {wanted[-1]} comes after {stage.name}, which is not done in "
                f"{run.folder.folder.shown}; run that first, or leave out --only"
            )


def _check_embeddings(run: Run) -> None:
    """Raise StorageError if the embeddings changed while the stages read them without a lock."""
    if not state.unchanged(run):
        raise StorageError(
            f"the embeddings in {run.store.folder.shown} changed while they were read, as when "
            "another run tries failed shards again; the same command redoes what depends on them"
        )
