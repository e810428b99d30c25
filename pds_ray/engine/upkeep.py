"""Looking after a run: check what the manifests promise, redo what is missing or failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pds_ray import catalog
from pds_ray.config import ConfigError, RunConfig, flatten, replace
from pds_ray.engine import run as engine
from pds_ray.engine.plan import make_run
from pds_ray.engine.state import begin_store, delete_unproven
from pds_ray.errors import first_line, some_of
from pds_ray.methods.base import Run
from pds_ray.sources.base import RETRYABLE
from pds_ray.stages.embed import file_of, marker_damage, shard_counts, sum_counts
from pds_ray.store.distilled_set import MANIFEST
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import RunManifest
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.sealed import CORRUPT, MISSING, damage
from pds_ray.store.storage import Folder, side_by_side
from pds_ray.telemetry import log
from pds_ray.telemetry.progress import progress_bar

RUN = "run"
"""Stage of a problem with the record of the run itself."""


@dataclass(frozen=True)
class Problem:
    """A file that is not what it should be."""

    stage: str
    name: str
    """Name below the run folder; for embeddings, below their store."""
    what: str
    """Missing, corrupt, or what it disagrees with."""
    shard: str = ""
    """The shard, for embeddings."""


@dataclass(frozen=True)
class _Promise:
    """A file with the hash that a manifest promises."""

    stage: str
    folder: Folder
    name: str
    sha256: str
    shard: str = ""

    def problem(self) -> Problem | None:
        """Return the problem if the file is missing, unreadable or another one."""
        try:
            what = "" if self.folder.sha256(self.name) == self.sha256 else CORRUPT
        except FileNotFoundError:
            what = MISSING
        except OSError as error:
            what = f"unreadable ({first_line(error)})"
        return Problem(self.stage, self.name, what, self.shard) if what else None


@dataclass(frozen=True)
class _Run:
    """A run as its folder has it; neither source nor models are read."""

    folder: RunFolder
    manifest: RunManifest
    config: RunConfig
    """As recorded, with the changes that were given."""
    damaged: Mapping[str, str] = field(default_factory=dict)
    """Problems with run.json and its copy, by name: either is not as it was written."""

    @property
    def done(self) -> list[str]:
        """The names of the finished stages, in order."""
        config = self.config
        method = catalog.method(config.method, config.budget, config.distill.init)
        names, entries = method.names, self.manifest.stages
        return [name for name in names if entries.get(name, {}).get("status") == "done"]

    @property
    def store(self) -> EmbeddingStore:
        fingerprint = self.manifest.stages.get("embed", {}).get("fingerprint", "")
        return self.folder.store(self.config.embed.store, fingerprint)


def _open(path: str, changes: Mapping[str, Any]) -> _Run:
    manifest, damaged = RunManifest.open_whole(path)
    recorded = flatten(manifest.data.get("config", {}))
    config = replace(RunConfig(), {**recorded, "out": path, **changes})
    return _Run(manifest.run, manifest, config, damaged)


def verify(path: str, changes: Mapping[str, Any]) -> tuple[int, list[Problem]]:
    """Check every file and count of the finished stages of a run.

    Returns how many files were checked, and the problems. `changes` to the recorded configuration
    may say where the embedding store is now. Raises ManifestError if `path` is no run folder, or
    one whose run.json is damaged and its copy too.
    """
    run = _open(path, changes)
    markers = run.store.committed() if "embed" in run.done else {}
    problems = [Problem(RUN, name, what) for name, what in run.damaged.items()]
    problems += _disagreements(run, markers) if "embed" in run.done else []
    found = list(_promised(run, markers))
    problems += [each for each in found if isinstance(each, Problem)]
    promises = [each for each in found if isinstance(each, _Promise)]
    with progress_bar("verify", len(promises) + len(markers), "checks") as bar:
        for problem in side_by_side(_Promise.problem, promises):
            problems += [problem] if problem else []
            bar.update()
        broken = {problem.shard for problem in problems}
        whole = [(shard, marker) for shard, marker in markers.items() if shard not in broken]
        for problem in side_by_side(lambda item: _miscounted(run.store, *item), whole):
            problems += [problem] if problem else []
            bar.update()
    return len(promises), problems


def _promised(run: _Run, markers: dict[str, dict[str, Any]]) -> Iterator[_Promise | Problem]:
    """Yield each file that a manifest promises; a problem for a manifest that cannot be read."""
    folder = run.folder.folder
    if recorded := run.manifest.data.get("shards_sha256"):
        yield _Promise("embed", folder, RunFolder.SHARDS, recorded)
    if "embed" in run.done:
        if what := damage(run.store.folder, EmbeddingStore.STORE):
            yield Problem("embed", EmbeddingStore.STORE, what)
        elif recorded := run.store.about().get("shards_sha256"):
            yield _Promise("embed", run.store.folder, EmbeddingStore.SHARDS, recorded)
    for shard, marker in markers.items():
        for name, sha256 in marker["sha256"].items():
            yield _Promise("embed", run.store.folder, name, sha256, shard)
    for stage in run.done:
        if stage == "embed":  # its markers are its manifest
            continue
        problem, hashes = _hashes(run, stage)
        if problem:
            yield problem
        for name, sha256 in hashes.items():
            yield _Promise(stage, folder, name, sha256)
        if stage == "materialize":
            for name, sha256 in _set_files(run):
                yield _Promise(stage, run.folder.distilled, name, sha256)


def _hashes(run: _Run, stage: str) -> tuple[Problem | None, dict[str, str]]:
    """Return the hashes of a stage's files, and the problem if their file is another one.

    Those of a file that is another one are promises too: all but few of them are what they were.
    """
    folder, name = run.folder.folder, RunFolder.hashes_name(stage)
    recorded = run.manifest.data.get("hashes", {}).get(stage)  # none by an earlier version
    problem = _Promise(stage, folder, name, recorded).problem() if recorded else None
    try:
        return problem, dict(folder.read_json(name).items())
    except FileNotFoundError:
        return Problem(stage, name, MISSING), {}
    except (ValueError, AttributeError):
        return Problem(stage, name, CORRUPT), {}


def _set_files(run: _Run) -> list[tuple[str, str]]:
    """Return names and hashes of the files of the distilled set.

    Returns none if its manifest is damaged: that one is promised, and reported, by itself.
    """
    try:
        files = run.folder.distilled.read_json(MANIFEST)["files"]
        return [(name, file["sha256"]) for name, file in files.items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _miscounted(store: EmbeddingStore, shard: str, marker: dict[str, Any]) -> Problem | None:
    """Return a problem if a marker disagrees with the shard's files, whose hashes are good."""
    tables = store.images(shard, []), store.captions(shard, []), store.errors(shard)
    counts = asdict(shard_counts(*tables))
    marked = {name: marker[name] for name in counts}
    if marked == counts:
        return None
    text = f"counts {marked}, its files hold {counts}"
    return Problem("embed", shard + store.MARKER, text, shard)


def _disagreements(run: _Run, markers: dict[str, dict[str, Any]]) -> Iterator[Problem]:
    """Yield where the markers of the store and run.json disagree."""
    store, counts = run.store, run.manifest.stages["embed"]["counts"]
    failed = store.failed().keys() - markers.keys()
    for name in store.folder.names(store.IMAGES):
        shard = name.removesuffix(store.IMAGES)
        if shard not in markers and shard not in failed:
            yield Problem("embed", shard + store.MARKER, "missing or corrupt", shard)
    damaged = sum(marker_damage(marker) != "" for marker in markers.values())
    found = {
        "shards": len(markers) + len(failed),
        "failed_shards": len(failed) + damaged,
        **asdict(sum_counts(markers.values())),
    }
    # earlier versions did not count damaged shards as failed
    failures = ("failed_shards",) if "shards_embedded" in counts else ()
    for what in ("shards", *failures, "images", "pairs", "bad"):
        if found[what] != counts[what]:
            yield Problem(
                "embed",
                store.STORE,
                f"holds {found[what]:,} {what}, run.json says {counts[what]:,}",
            )


def repair(path: str, problems: list[Problem], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Redo what `verify` found wrong, and nothing else unless it comes out otherwise.

    Raises what `engine.run.distill` does: source and models are needed again.
    """
    found = Counter(problem.stage for problem in problems)

    def prepare(run: Run) -> None:
        for problem in problems:
            if problem.stage == RUN:
                continue
            if problem.name == RunFolder.hashes_name(problem.stage) and found[problem.stage] == 1:
                delete_unproven(run, run.method.stage(problem.stage))
            if problem.name == EmbeddingStore.SHARDS:
                begin_store(run)
            elif problem.shard:
                run.store.forget(problem.shard)
            elif problem.stage not in ("embed", "materialize"):
                run.folder.folder.delete(problem.name)  # a file that is there is taken for good

    run = _open(path, changes)
    names = {problem.name for problem in problems}
    if run.damaged:
        with run.folder.folder.lock():
            run.manifest.update()
    if RunFolder.SHARDS in names:
        run.folder.folder.delete(RunFolder.SHARDS)  # written again from the source
    for name in names & {EmbeddingStore.SHARDS, EmbeddingStore.STORE}:
        run.store.folder.delete(name)  # the store is begun again, with the shards that it has
    stages = {problem.stage for problem in problems}
    return engine.redo(make_run(run.config), stages, prepare)


def retry_failed(path: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Retry what failed, then what depends on it.

    That is shards that could not be read, damaged ones whose file has changed since, and samples
    that killed their process. `changes` to the configuration of the run may say how the source is
    reached now, or anything of `ray.*`.

    Raises what `engine.run.distill` does, and ConfigError if there is nothing to try again.
    """
    found = _open(path, changes)
    run = make_run(found.config)
    again, unchanged = _failed(run, found.store)
    named = f"{len(unchanged):,} damaged shards ({some_of(unchanged)})"
    if not again and not unchanged:
        raise ConfigError(
            f"nothing to try again: no shard of {path} failed, no sample killed its process"
        )
    if not again:
        raise ConfigError(
            f"nothing to try again: {named} of {path} have not changed since they were read; mend "
            "the files first (a new modification time counts as a change)"
        )
    if unchanged:
        text = f"pds-ray: not tried again: {named}, which have not changed since they were read"
        log.event("shards_unchanged", text, "warning", shards=len(unchanged))

    def prepare(run: Run) -> None:
        for shard in again:
            # what is embedded of the shard stands until it succeeds
            run.store.fail(shard, "to be tried again")

    return engine.redo(run, ["embed"], prepare)


def _failed(run: Run, store: EmbeddingStore) -> tuple[list[str], list[str]]:
    """Return the shards to try again, and those that are damaged as they were when they were read.

    A shard that an earlier version found damaged is to be tried again: its file is not recorded.
    """
    markers = store.committed()
    noted, again, unchanged = store.failed(), [], []
    for begun in run.shards:
        shard, marker = run.changed.get(begun.name, begun), markers.get(begun.name, {})
        deadly = bool(marker) and not marker["reasons"].keys().isdisjoint(RETRYABLE)
        damaged = bool(marker) and marker_damage(marker) != ""
        if begun.name in noted or deadly or (damaged and marker.get("file") != file_of(shard)):
            again.append(begun.name)
        elif damaged:
            unchanged.append(begun.name)
    return again, unchanged
