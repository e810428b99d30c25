"""A whole run on one page: the checks before it, the order of its stages, what is already done, the summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from tqdm import tqdm

from pds_ray import catalog
from pds_ray.config import (
    CaptionConfig,
    ClusterConfig,
    ConfigError,
    DecodeConfig,
    MatchConfig,
    PruneConfig,
    RunConfig,
    SelectConfig,
    flatten,
    to_dict,
)
from pds_ray.decoders.base import DecoderInfo
from pds_ray.encoders.base import EncoderInfo
from pds_ray.errors import first_line, without_secrets
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import Fault, MissingShardsError, Sample, Shard, Source, SourceError
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.heartbeat import beating
from pds_ray.store.manifest import ManifestError, RunManifest, fingerprint, versions
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import STORE_SCHEMA_VERSION
from pds_ray.store.storage import Folder, StorageError, is_remote
from pds_ray.telemetry import log
from pds_ray.telemetry.progress import QUIET_S, progress_bar

STAGES = (
    "embed",
    "prune",
    "cluster",
    "match",
    "prototypes",
    "decode",
    "caption",
    "materialize",
)  # of pds
SELECTION_STAGES = (
    "embed",
    "select",
    "decode",
    "materialize",
)  # of the methods that choose real pairs
# stage -> (what it counts, which entry of its counts says how many the last sitting did)
COUNTED = {
    "embed": ("images", "timed"),
    "select": ("pairs", "prototypes"),
    "prune": ("pairs", "pairs"),
    "cluster": ("", ""),
    "match": ("couples", "couples"),
    "prototypes": ("prototypes", "prototypes"),
    "decode": ("images", "made"),
    "caption": ("pairs", "pairs"),
    "materialize": ("pairs", "pairs"),
}
PICTURES_TOGETHER = (
    256  # chosen pictures looked up at once: each lookup reads the shards they are in
)
LISTING_WAITS_S = (0.0, 1.0, 4.0, 16.0)
PROBE = 10_000  # images looked at before a run; that there are more pairs than this shows only when all are embedded
CAPTIONLESS_PROBE = 1_000  # this many samples in a row without a caption: the source has none
UNREADABLE_PROBE = 10  # the first shards, none of which can be read to its end: nor can the others
FREE_FIELDS = (
    "out",
    "embed.batch_size",
    "embed.store",
    "decode.batch_size",  # while no picture of a model is half of the way
)  # may differ when a run is continued; so may all of ray.*


def stages(method: str) -> tuple[str, ...]:
    """The stages of a method, in order."""
    return STAGES if method == "pds" else SELECTION_STAGES


def relevant(config: RunConfig) -> RunConfig:
    """The configuration with all that its method has no use for at its default, so that nothing depends on it."""
    if config.method == "pds":
        return replace(config, select=SelectConfig())
    decode = DecodeConfig(
        decoder="nearest", image_size=config.decode.image_size, batch_size=PICTURES_TOGETHER
    )
    return replace(
        config,
        prune=PruneConfig(),
        cluster=ClusterConfig(),
        match=MatchConfig(),
        decode=decode,
        caption=CaptionConfig(),
    )


Markers = dict[str, dict[str, Any]]  # shard -> its commit marker


@dataclass(frozen=True)
class Plan:
    """A validated run: everything that can be known before it starts."""

    config: RunConfig
    """What was asked, as far as it is `relevant`."""
    source: Source
    shards: list[Shard]
    encoder: EncoderInfo
    decoder: DecoderInfo
    fingerprints: dict[str, str]
    run: RunFolder
    store: EmbeddingStore

    @property
    def stages(self) -> tuple[str, ...]:
        return stages(self.config.method)


def plan(config: RunConfig, redo: bool = False) -> Plan:
    """Checks source, encoder, decoder, sizes and folders. With `redo` the source is taken as it is now.

    Raises ConfigError, SourceError, StorageError or ManifestError in one line; nothing long has started by then.
    """
    if not config.source:
        raise ConfigError(
            "no source: give --source (tar path, glob or brace range, flickr30k:ROOT, coco:ROOT or scenes:N)"
        )
    if not config.out:
        raise ConfigError("no run folder: give --out FOLDER")
    config = relevant(config)
    source = catalog.make_source(config.source)
    run = RunFolder(Folder(config.out))
    shards = _shards(source, run, config.embed.store, redo)
    encoder = catalog.describe_encoder(config.embed)
    decoder = catalog.describe_decoder(config.decode, encoder)
    _check_enough(source, shards, config)
    prints = _fingerprints(config, shards, encoder, decoder)
    store = run.store(config.embed.store, prints["embed"])
    return Plan(config, source, shards, encoder, decoder, prints, run, store)


def _shards(source: Source, run: RunFolder, elsewhere: str | None, redo: bool) -> list[Shard]:
    """The shards of a source; for a run that has begun those it began with, whatever became of them since.

    One that is gone or was mended must not stand against going on with all the others. Not so if there are new ones,
    or one that is embedded has another size: then it is another source. Raises SourceError.
    """
    begun = [] if redo else [Shard(**row) for row in run.shards()]
    try:
        listed = source.shards()
    except MissingShardsError as error:
        if not begun:
            raise
        listed = error.found
    before, now = {shard.name: shard for shard in begun}, {shard.name: shard for shard in listed}
    store = run.store(elsewhere, "")
    for name, shard in now.items():
        resized = name in before and shard.size != before[name].size
        if name not in before or (resized and store.folder.exists(name + store.MARKER)):
            return listed
    changed = sum(shard.version != before[name].version for name, shard in now.items())
    gone = len(before.keys() - now.keys())
    if changed or gone:
        text = (
            f"pds-ray: of {len(begun):,} shards that {run.folder.shown} began with, {gone:,} are gone and {changed:,} "
            "are newer; what is embedded of them stands (--redo embeds all anew)"
        )
        log.event("source_changed", text, "warning", gone=gone, changed=changed)
    return [replace(shard, location=now.get(shard.name, shard).location) for shard in begun]


def _check_enough(source: Source, shards: list[Shard], config: RunConfig) -> None:
    """Reads just far enough to know that there are `pairs` captioned images, PROBE at most.

    A shard that cannot be read is passed over, unless none can or none of the first UNREADABLE_PROBE.
    """
    wanted = min(config.pairs, PROBE)
    with progress_bar("check", wanted, "images", delay_s=QUIET_S) as bar:
        _look_for(wanted, source, shards, config, bar)


def _look_for(
    wanted: int, source: Source, shards: list[Shard], config: RunConfig, bar: tqdm
) -> None:
    """Reads until there are `wanted` captioned images; moves `bar` on by each."""
    clean = CLEANERS[config.read.captions]
    images = read = unreadable = 0
    bad: Counter[str] = Counter()
    for shard in shards:
        bar.set_postfix_str(shard.name, refresh=False)
        try:
            for item in source.read(shard):
                captioned = isinstance(item, Sample) and any(
                    clean(caption) for caption in item.captions
                )
                images += captioned
                bar.update(captioned)
                if images >= wanted:
                    return
                if isinstance(item, Fault):
                    bad[item.reason] += 1
                if images == 0 and bad["missing_caption"] >= CAPTIONLESS_PROBE:
                    raise ConfigError(
                        f"the first {CAPTIONLESS_PROBE:,} samples of {config.source} have no caption"
                    )
            read += 1
        except (OSError, StorageError) as error:
            unreadable += 1
            if unreadable == min(len(shards), UNREADABLE_PROBE) and not read:
                which = (
                    "no shard"
                    if unreadable == len(shards)
                    else f"none of the first {unreadable} shards"
                )
                raise SourceError(
                    f"{which} of {config.source} can be read: {first_line(error)}"
                ) from error
    bad["unreadable shards"] = unreadable
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in bad.most_common() if count)
    if images == 0:
        raise ConfigError(
            f"no sample of {config.source} has a picture and a caption{reasons and f' ({reasons})'}"
        )
    raise ConfigError(
        f"{config.pairs:,} pairs asked for, but {config.source} has only {images:,} captioned images"
        f"{reasons and f', besides what is bad ({reasons})'}; lower --pairs"
    )


def _fingerprints(
    config: RunConfig, shards: list[Shard], encoder: EncoderInfo, decoder: DecoderInfo
) -> dict[str, str]:
    """Per stage, a hash of all that its bytes depend on; each covers the one before."""
    values = to_dict(config)
    decode = {
        name: value
        for name, value in values["decode"].items()
        if name not in ("model", "revision", "batch_size")
    }
    preprocess = encoder.preprocess
    own: dict[str, Any] = {
        "embed": [
            STORE_SCHEMA_VERSION,
            [(shard.name, shard.size, shard.version) for shard in shards],
            values["read"],
            encoder.identity,
            [preprocess.size, preprocess.interpolation, preprocess.resize_mode, preprocess.fill],
            config.embed.precision,
            config.embed.store_dtype,
        ],
        "select": [config.method, config.pairs, config.seed, values["select"]],
        "prune": values["prune"],
        "cluster": [config.pairs, config.seed, values["cluster"]],
        "match": values["match"],
        "prototypes": [],
        "decode": [config.seed, decode, decoder.identity],
        "caption": values["caption"],
        "materialize": [],
    }
    prints: dict[str, str] = {}
    previous = ""
    for stage in stages(config.method):
        prints[stage] = previous = fingerprint(previous, own[stage])
    return prints


def open_run(plan_: Plan, redo: bool) -> RunManifest:
    """Opens the run folder (which exists and is locked) and its embedding store.

    Raises ManifestError in one line if either belongs to another configuration and `redo` does not allow the change.
    """
    manifest = RunManifest(plan_.run)
    recorded = {stage: entry["fingerprint"] for stage, entry in manifest.stages.items()}
    changed = [
        stage for stage, print_ in recorded.items() if print_ != plan_.fingerprints.get(stage)
    ]
    if "config" in manifest.data and not redo:
        differing = _differences(manifest.data["config"], public(plan_.config))
        if differing:
            raise ManifestError(
                f"{plan_.run.folder.shown} was made with another configuration ({'; '.join(differing)}); give another "
                "--out, or --redo to redo what depends on the change"
            )
        if changed:
            raise ManifestError(
                f"the source, a model or the version of pds-ray changed since {plan_.run.folder.shown} was begun "
                f"(stage {changed[0]} no longer matches); give another --out, or --redo to redo what depends on it"
            )
    _open_store(plan_, redo)
    if redo or not plan_.run.shards():
        shards = [asdict(shard) for shard in plan_.shards]
        public_shards = [
            {**shard, "location": without_secrets(shard["location"])} for shard in shards
        ]
        manifest.update(shards_sha256=plan_.run.save_shards(public_shards))
    if changed:  # what is stale must not look finished, should the redoing be interrupted
        plan_.run.distilled.delete_all()
        manifest.forget(*changed)
    return manifest


def _open_store(plan_: Plan, redo: bool) -> None:
    store, wanted = plan_.store, plan_.fingerprints["embed"]
    store.folder.create()
    if store.folder.exists(store.STORE):
        found = store.folder.read_json(store.STORE)
        if found.get("fingerprint") == wanted:
            return
        shared = plan_.config.embed.store is not None
        if shared or not redo:  # a shared store is never wiped: other runs stand on it
            raise ManifestError(
                f"the embeddings in {store.folder.shown} were made from other data, by another encoder or by "
                f"another version of pds-ray ({found.get('source')}, {found.get('encoder')}); give another "
                + ("--embed.store" if shared else "--out, or --redo")
            )
        store.folder.delete_all()
        store.folder.create()
    about = {
        "source": without_secrets(plan_.config.source),
        "encoder": plan_.encoder.name,
        "space": plan_.encoder.space,
    }
    sizes = {"dim": plan_.encoder.dim, "shards": len(plan_.shards)}
    store.folder.write_json(store.STORE, {"fingerprint": wanted, **about, **sizes})


def public(config: RunConfig) -> dict[str, Any]:
    """The configuration as it may be shown and published; run.json holds it so."""
    values = to_dict(config)
    values["source"], values["out"] = without_secrets(config.source), without_secrets(config.out)
    if config.embed.store:
        values["embed"]["store"] = without_secrets(config.embed.store)
    return values


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    # an option that there was not yet counts as what it is by default
    old, new = {**flatten(to_dict(RunConfig())), **flatten(before)}, flatten(after)
    return [
        f"{name}: {old.get(name)} -> {value}"
        for name, value in new.items()
        if old.get(name) != value and name not in FREE_FIELDS and not name.startswith("ray.")
    ]


@contextmanager
def _recorded(manifest: RunManifest, stage: str, print_: str) -> Iterator[dict[str, Any]]:
    """Books a stage in run.json, however it ends; the block fills in the counts."""
    manifest.start(stage, print_)
    counts: dict[str, Any] = {}
    with log.context(stage=stage):
        log.event("stage_started")
        try:
            yield counts
        except BaseException as error:
            outcome = (
                "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed"
            )
            manifest.stop(stage, outcome)
            log.event(f"stage_{outcome}", level="error")
            raise
        manifest.stop(stage, "done", counts)
        log.event("stage_done", seconds=manifest.stages[stage]["seconds"], counts=counts)


def distill(config: RunConfig, redo: bool = False, only: Collection[str] = ()) -> dict[str, Any]:
    """Runs every stage that is not done yet and returns run.json's content.

    Interrupted at any instant and called again with the same configuration, it continues and ends with the same bytes.
    `redo` allows a run folder of another configuration: what depends on the change is done anew. `only` these stages
    are run, if any are named; those that come before them must be done.

    Raises ConfigError, SourceError, StorageError or ManifestError in one line for what the user can mend.
    """
    plan_ = plan(config, redo)
    unknown = [stage for stage in only if stage not in plan_.stages]
    if unknown:
        raise ConfigError(
            f"--only names {unknown[0]!r}; stages of method {config.method}: {', '.join(plan_.stages)}"
        )
    plan_.run.folder.create()
    with _holding(plan_.run):
        return _run_stages(plan_, open_run(plan_, redo), only)


def redo(
    config: RunConfig, stages_: Iterable[str], prepare: Callable[[Plan], None]
) -> dict[str, Any]:
    """Does some stages of a run anew, then what depends on them if they come out otherwise.

    `config` is that of the run. `prepare` is called when nothing stands against it any more, with run and store locked.
    Returns and raises what `distill` does.
    """
    plan_ = plan(config)
    with _holding(plan_.run):
        manifest = open_run(plan_, redo=False)
        manifest.forget(*stages_)
        with plan_.store.folder.lock():
            prepare(plan_)
        return _run_stages(plan_, manifest)


@contextmanager
def _holding(run: RunFolder) -> Iterator[None]:
    """The run folder is this process's alone."""
    with log.context(run=run.folder.shown), run.folder.lock():
        # before there is a sign of life, which might be half written; the store has a lock of its own
        run.folder.sweep(spare=run.embeddings.name)
        with beating(run):
            yield


def _run_stages(plan_: Plan, manifest: RunManifest, only: Collection[str] = ()) -> dict[str, Any]:
    began = time.monotonic()
    manifest.update(
        config=public(plan_.config),
        versions=versions(),
        encoder=plan_.encoder.name,
        space=plan_.encoder.space,
        notes=list(plan_.decoder.notes),
    )
    there: Markers = {}
    if manifest.is_done("embed", plan_.fingerprints["embed"]):
        there = _unchanged(plan_, manifest)
        if not there:
            manifest.forget(
                "embed"
            )  # another run brought shards back, or some are lost: the counts are no longer true
    embedded = cache(
        lambda: there or _embedded(plan_, manifest)
    )  # read once: the same for all stages that follow
    steps = _steps(plan_, manifest, embedded)
    wanted = [stage for stage in plan_.stages if not only or stage in only]
    until = plan_.stages[: 1 + plan_.stages.index(wanted[-1])]

    def check_order() -> None:
        """Nothing wanted may stand on what is neither done nor wanted."""
        for stage in until:
            if stage not in wanted and not manifest.is_done(stage, plan_.fingerprints[stage]):
                raise ConfigError(
                    f"stage {wanted[-1]} comes after {stage}, which is not done in {plan_.run.folder.shown}; run that "
                    "first, or leave out --only"
                )

    started = False
    for stage in until:
        check_order()
        if not manifest.is_done(stage, plan_.fingerprints[stage]):
            from pds_ray.distributed import session

            if not started:
                manifest.update(ray=session.start(plan_.config.ray, plan_.run.folder.shown))
                started = True
            with (
                _recorded(manifest, stage, plan_.fingerprints[stage]) as counts,
                session.unwrapped_errors(),
            ):
                counts.update(steps[stage]())
                if stage != "embed":
                    _book_files(plan_, manifest, stage, list(embedded()))
        if stage == "embed":
            content = _content(embedded())
            if manifest.data.get("store_content") != content:
                _forget_after(plan_, manifest, stage)
            manifest.update(store_content=content)
    manifest.update(finished=time.time(), last_run_seconds=round(time.monotonic() - began, 3))
    return manifest.data


def _book_files(plan_: Plan, manifest: RunManifest, stage: str, shards: list[str]) -> None:
    """Keeps the hashes of what a stage wrote; what follows stands as long as they are what they were."""
    from pds_ray.stages.cluster import spaces

    pairs = plan_.run.prototypes().num_rows if stage == "decode" else 0
    files = plan_.run.files(stage, shards, spaces(plan_.config.cluster), pairs)
    with progress_bar("hash", len(files), "files", delay_s=QUIET_S) as bar:
        bar.set_postfix_str(f"the files of {stage}", refresh=False)
        hashes = plan_.run.hash_files(files, bar.update)
    if hashes != plan_.run.hashes(stage):
        _forget_after(plan_, manifest, stage)
    plan_.run.save_hashes(stage, hashes)


def _committed(plan_: Plan) -> Markers:
    with progress_bar("list", None, "shards", delay_s=QUIET_S) as bar:
        bar.set_postfix_str(f"the markers in {plan_.store.folder.shown}", refresh=False)
        return plan_.store.committed(bar.update)


def _markers(plan_: Plan, expected: int) -> Markers:
    """The markers of the shards that are embedded, in order: failed ones are not.

    Waits a while for as many as `expected`: a store may list late what it holds.
    """
    found: Markers = {}
    for wait_s in LISTING_WAITS_S if is_remote(plan_.store.folder.path) else LISTING_WAITS_S[:1]:
        time.sleep(wait_s)
        markers = _committed(plan_)
        found = {shard.name: markers[shard.name] for shard in plan_.shards if shard.name in markers}
        if len(found) >= expected:
            break
    return found


def _expected(plan_: Plan, manifest: RunManifest) -> int:
    """How many shards are embedded, as the stage counted them."""
    return len(plan_.shards) - manifest.stages["embed"]["counts"].get("failed_shards", 0)


def _embedded(plan_: Plan, manifest: RunManifest) -> Markers:
    """What `_markers` gives. Raises StorageError if some do not show up."""
    expected = _expected(plan_, manifest)
    found = _markers(plan_, expected)
    if len(found) < expected:
        raise StorageError(
            f"{expected - len(found):,} shards that were embedded are not in {plan_.store.folder.shown}; the same "
            "command continues"
        )
    return found


def _content(embedded: Markers) -> str:
    """A digest of all embeddings of the run: they may change under one configuration, as when failed shards succeed."""
    return fingerprint([[shard, marker["sha256"]] for shard, marker in embedded.items()])


def _unchanged(plan_: Plan, manifest: RunManifest) -> Markers:
    """What `_markers` gives, if the store holds the same as when it was looked at last; else nothing."""
    found = _markers(plan_, _expected(plan_, manifest))
    return found if _content(found) == manifest.data.get("store_content") else {}


def _forget_after(plan_: Plan, manifest: RunManifest, stage: str) -> None:
    """What is stale must not look finished, should the redoing be interrupted."""
    later = plan_.stages[plan_.stages.index(stage) + 1 :]
    if manifest.stages.keys() & set(later):
        plan_.run.distilled.delete_all()
        manifest.forget(*later)


def _steps(
    plan_: Plan, manifest: RunManifest, embedded: Callable[[], Markers]
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What each stage calls. Ray is imported when the first stage runs, not before.

    `embedded` gives, once that is done, the markers of the shards that are.
    """
    config, run, store = plan_.config, plan_.run, plan_.store
    dim = plan_.encoder.dim

    def names() -> list[str]:
        return list(embedded())

    def counts(stage: str) -> dict[str, Any]:
        return manifest.stages[stage]["counts"]

    def embed() -> dict[str, Any]:
        from pds_ray.distributed.embed import embed as stage

        with store.folder.lock():  # a shared store is filled by one run at a time
            found = stage(plan_.source, plan_.shards, plan_.encoder, config, store)
        if found["images"] < config.pairs:
            raise ConfigError(
                f"{config.pairs:,} pairs asked for, but only {found['images']:,} images of {config.source} are good "
                f"({found['bad']:,} bad: {found['reasons']}); lower --pairs"
            )
        return found

    def select() -> dict[str, Any]:
        from pds_ray.distributed.select import select as stage

        return stage(names(), counts("embed"), dim, store, run, config)

    def prune() -> dict[str, Any]:
        from pds_ray.distributed.prune import prune as stage

        return stage(names(), counts("embed")["pairs"], config.prune.ratio, store, run)

    def cluster() -> dict[str, Any]:
        from pds_ray.distributed.cluster import cluster as stage

        kept = counts("prune")
        left = min(kept["images_kept"], kept["kept"])
        if left < config.pairs:
            raise ConfigError(
                f"{config.pairs:,} clusters asked for, but pruning leaves {kept['kept']:,} pairs of "
                f"{kept['images_kept']:,} images; lower --pairs or --prune.ratio"
            )
        belongs_to = fingerprint(plan_.fingerprints["cluster"], manifest.data["store_content"])
        return stage(names(), kept, dim, store, run, config, belongs_to)

    def match() -> dict[str, Any]:
        from pds_ray.distributed.match import match as stage

        return stage(names(), store, run, config)

    def prototypes() -> dict[str, Any]:
        from pds_ray.distributed.prototypes import make_prototypes as stage

        return stage(names(), dim, store, run, config)

    def decode() -> dict[str, Any]:
        from pds_ray.distributed import synthesize as stage

        precision = stage.precision(plan_.decoder, config)
        _keep_pictures_alike(plan_, manifest, precision)
        settled = replace(config, decode=replace(config.decode, precision=precision))
        return stage.synthesize(plan_.source, plan_.decoder, settled, run)

    def caption() -> dict[str, Any]:
        from pds_ray.distributed.caption import caption as stage

        # the pictures are compared with what is in the store, hence embedded in its precision
        settled = replace(config.embed, precision=next(iter(embedded().values()))["precision"])
        return stage(names(), plan_.encoder, store, run, replace(config, embed=settled))

    def materialize() -> dict[str, Any]:
        from pds_ray.stages.materialize import write_distilled

        if not _unchanged(
            plan_, manifest
        ):  # under readers, who take no lock: they may have seen a mixture
            raise StorageError(
                f"the embeddings in {store.folder.shown} changed while they were read, as when another run tries "
                "failed shards again; the same command redoes what depends on them"
            )
        run.distilled.delete_all()
        captions = run.captions() if "caption" in plan_.stages else None
        with progress_bar(
            "materialize", counts("decode")["images"], "pairs", delay_s=QUIET_S
        ) as bar:
            return write_distilled(run, _about(plan_, manifest), captions, bar.update)

    return {
        "embed": embed,
        "select": select,
        "prune": prune,
        "cluster": cluster,
        "match": match,
        "prototypes": prototypes,
        "decode": decode,
        "caption": caption,
        "materialize": materialize,
    }


def _keep_pictures_alike(plan_: Plan, manifest: RunManifest, precision: str) -> None:
    """Deletes the pictures of another configuration or of other prototypes.

    Raises ConfigError if those that stay were begun otherwise than they would go on.
    """
    run, batch = plan_.run, plan_.config.decode.batch_size
    before = plan_.stages[plan_.stages.index("decode") - 1]
    wanted = fingerprint(plan_.fingerprints["decode"], run.hashes(before))
    made = f"{precision}, batches of {batch}" if plan_.decoder.dim is not None else "no model"
    drawn_for = manifest.data.get("images_fingerprint")
    if drawn_for != wanted:
        run.delete_images(run.prototypes().num_rows if drawn_for else 0)
        manifest.update(images_fingerprint=wanted, images_made=made)
    begun = manifest.data.get("images_made", made)
    if begun != made and not run.images.names(".png"):
        manifest.update(images_made=made)
    elif begun != made:  # last bits depend on both: a set must not be made of two kinds of pictures
        raise ConfigError(
            f"the pictures in {run.folder.shown} were begun in {begun}, here they would go on in {made}; go on as they "
            "were begun, or say --decode.precision or --decode.batch_size, and give another --out"
        )


def _about(plan_: Plan, manifest: RunManifest) -> dict[str, Any]:
    """What the distilled set says of its making: nothing that differs between two runs of one configuration."""
    config = public(plan_.config)
    del config["ray"]
    for field in FREE_FIELDS:
        section, _, name = field.rpartition(".")
        del (config[section] if section else config)[name]
    for section in ("select", "prune", "cluster", "match", "caption"):
        if section not in plan_.stages:
            del config[section]
    decoder, synthetic = plan_.decoder, plan_.decoder.dim is not None
    selected = config["method"] in catalog.SELECTORS
    return {
        "source": config["source"],
        "method": config["method"],
        **({"selection": catalog.selector(config["method"]).DESCRIPTION} if selected else {}),
        "encoder": plan_.encoder.name,
        "space": plan_.encoder.space,
        "decoder": f"{decoder.name} {decoder.identity}" if synthetic else decoder.name,
        "picture_origin": "synthetic" if synthetic else "real pictures of the source",
        "counts": {
            name: manifest.stages[stage]["counts"][count]
            for name, stage, count in (
                ("images embedded", "embed", "images"),
                ("pairs embedded", "embed", "pairs"),
                ("bad samples", "embed", "bad"),
                ("shards not read", "embed", "failed_shards"),
                ("pairs pruned", "prune", "dropped"),
                ("pairs in matched clusters", "match", "shared_pairs"),
                ("pairless couples", "match", "pairless"),
                ("distilled pairs", "decode", "images"),
            )
            if stage in plan_.stages
        },
        "config": config,
    }
