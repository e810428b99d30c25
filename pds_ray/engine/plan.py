"""The checks before a run: source, models, sizes and folders. Nothing long starts here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

from tqdm import tqdm

from pds_ray import catalog
from pds_ray.config import ConfigError, RunConfig, flatten, settled, to_dict
from pds_ray.config import replace as configure
from pds_ray.engine.optimisation import check_optimisation, with_own_values
from pds_ray.errors import first_line, some_of, without_secrets
from pds_ray.methods.base import Method, Run
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.advice import Tally
from pds_ray.sources.base import (
    CAPTION_LINES,
    Fault,
    MissingShardsError,
    Shard,
    Source,
    SourceError,
)
from pds_ray.stages.cluster import require_faiss
from pds_ray.stages.embed import file_of, marker_damage
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import RunManifest, fingerprint
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder, StorageError
from pds_ray.telemetry import log
from pds_ray.telemetry.progress import QUIET_S, progress_bar

PROBE = 10_000  # images looked at before a run; the rest is counted while it is embedded
SOFT_TARGETS_LIMIT = 10_000  # pairs, whose similarity takes 400 MB
CAPTIONLESS_PROBE = 1_000  # with so many samples in a row without a caption, the source has none
NO_SOURCE = (
    "no source: give --source (tar path, glob or brace range, a folder, parquet:PATTERN, "
    "hf:ORG/NAME, flickr30k:ROOT, coco:ROOT or scenes:N)"
)
UNREADABLE_PROBE = 10  # with so many unreadable shards at the start, no shard can be read


def make_run(config: RunConfig, redo: bool = False) -> Run:
    """Check source, encoder, decoder, sizes and folders, and return the run.

    With `redo` the source is taken as it is now, not as the run began with it. Raises ConfigError,
    SourceError, StorageError or ManifestError in one line.
    """
    if not config.source:
        raise ConfigError(NO_SOURCE)
    if not config.out:
        raise ConfigError("no run folder: give --out FOLDER")
    method = catalog.method(config.method, config.budget, config.distill.init)
    config = relevant(config, method)
    check_extras(config, method)
    if "cluster" in method.names:
        require_faiss()
    source = catalog.make_source(config.source, config.read)
    folder = RunFolder(Folder(config.out)).of_format(config.decode.format)
    shards, changed = _choose_shards(source, folder, config.embed.store, redo)
    encoder = catalog.describe_encoder(config.embed)
    decoder = catalog.describe_decoder(config.decode, encoder)
    check_enough(source, shards, config)
    run = Run(
        config=config,
        method=method,
        source=source,
        shards=shards,
        encoder=encoder,
        decoder=decoder,
        folder=folder,
        store=folder.store(config.embed.store, ""),
        manifest=RunManifest(folder),
        fingerprints={},
        changed=changed,
    )
    check_optimisation(run)
    hashes = _fingerprints(run)
    return replace(
        run, fingerprints=hashes, store=folder.store(config.embed.store, hashes["embed"])
    )


def check_extras(config: RunConfig, method: Method) -> None:
    """Raise ConfigError if soft targets are asked for that cannot be made or held.

    How many pairs there are is known only when a budget, if there is one, has been settled.
    """
    kind = config.extras.similarity
    if kind == "table" and "match" not in method.names:
        raise ConfigError(
            f"--extras.similarity table counts pairs in clusters, and method {config.method} "
            "matches none; give --extras.similarity clip"
        )
    if kind != "off" and config.pairs > SOFT_TARGETS_LIMIT:
        raise ConfigError(
            f"--extras.similarity {kind} holds a number per image and caption; {config.pairs:,} "
            f"pairs are more than {SOFT_TARGETS_LIMIT:,}; give --extras.similarity off"
        )


def relevant(config: RunConfig, method: Method) -> RunConfig:
    """Return the configuration with every option that the method does not read at its default.

    So nothing depends on such an option. What only a budget would choose is settled without one.
    """
    defaults = flatten(to_dict(RunConfig()))
    read = {*method.options, "ray"}
    unread = {
        name: value
        for name, value in defaults.items()
        if "." in name and name not in read and name.partition(".")[0] not in read
    }
    return with_own_values(method.settled(configure(settled(config), unread)))


def _fingerprints(run: Run) -> dict[str, str]:
    """Return for each stage a hash of all that its bytes depend on; each covers the one before."""
    hashes: dict[str, str] = {}
    previous = ""
    for stage in run.method.stages:
        hashes[stage.name] = previous = fingerprint(previous, stage.depends_on(run))
    return hashes


def _choose_shards(
    source: Source, folder: RunFolder, store_path: str | None, redo: bool
) -> tuple[list[Shard], dict[str, Shard]]:
    """Return the shards of a source, and by name those that changed, as they are now.

    A run that goes on, and one that begins on a store of other runs, keep the shards that these
    began with as long as it is the same source: a shard that was removed, modified or mended must
    not stand against going on with all the others. Else they are those that are there now. Raises
    SourceError.
    """
    store = folder.store(store_path, "")
    own = [] if redo else folder.shards()
    begun = [Shard(**row) for row in own or ([] if redo else store.shards())]
    try:
        listed = source.shards()
    except MissingShardsError as error:
        if not begun:
            raise
        listed = error.found
    before, now = {shard.name: shard for shard in begun}, {shard.name: shard for shard in listed}
    gone = [name for name in before if name not in now]
    changed = {
        name: shard
        for name, shard in now.items()
        if name in before and file_of(shard) != file_of(before[name])
    }
    if (
        now.keys() - before.keys()
        or (gone and not own)
        or not all(
            _stands(shard, before[name], store, bool(own)) for name, shard in changed.items()
        )
    ):
        return listed, {}
    if changed or gone:
        place = folder.folder.shown if own else store.folder.shown
        text = (
            f"pds-ray: of {len(begun):,} shards that {place} began with, {_some(gone, 'gone')} "
            f"and {_some(changed, 'newer')}; what is embedded of them stands: retry-failed reads "
            "those again that had failed, --redo embeds all anew"
        )
        log.event("source_changed", text, "warning", gone=len(gone), changed=len(changed))
    return [
        replace(shard, location=now.get(shard.name, shard).location) for shard in begun
    ], changed


def _stands(now: Shard, before: Shard, store: EmbeddingStore, own: bool) -> bool:
    """Return whether a shard that changed is one of the same source.

    It is if it is not embedded or damaged, or embedded as it is now; to a run of its `own` begun
    earlier, a file of the same size is the same.
    """
    if own and now.size == before.size:
        return True
    marker = store.marker(now.name)
    if not marker or marker_damage(marker):
        return True
    read = marker.get("file", file_of(before))
    return read["size"] == now.size if own else read == file_of(now)


def _some(names: Collection[str], what: str) -> str:
    """Say how many shards are `what`, and name a few."""
    return f"{len(names):,} are {what}{names and f' ({some_of(list(names))})'}"


def check_enough(source: Source, shards: list[Shard], config: RunConfig) -> None:
    """Read just far enough to know that there are `pairs` captioned images, PROBE at most.

    A shard that cannot be read is passed over, unless no shard can be read or none of the first
    UNREADABLE_PROBE. Raises ConfigError or SourceError.
    """
    wanted = min(config.pairs or 1, PROBE)
    with progress_bar("check", wanted, "images", delay_s=QUIET_S) as bar:
        images, bad, notes = _count_captioned(wanted, source, shards, config, bar)
    _tell_of_captions(notes, images, config)
    if images >= wanted:
        return
    reasons = bad.line()
    if images == 0:
        raise ConfigError(
            f"no sample of {config.source} has an image and a caption{reasons and f' ({reasons})'}"
        )
    raise ConfigError(
        f"{config.pairs:,} pairs asked for, but {config.source} has only {images:,} captioned "
        f"images{reasons and f', besides what is bad ({reasons})'}; lower --pairs"
    )


def _tell_of_captions(notes: Counter[str], images: int, config: RunConfig) -> None:
    """Say once how many captions are not UTF-8, and if most files hold several lines.

    `notes` are those of the first samples.
    """
    source, of = without_secrets(config.source), f"of the first {images:,} images looked at"
    encoded = {name: count for name, count in notes.items() if name != CAPTION_LINES}
    if encoded:
        kinds = ", ".join(f"{count:,} as {name}" for name, count in sorted(encoded.items()))
        text = f"pds-ray: captions of {source} are not UTF-8; {of} some are read otherwise: {kinds}"
        log.event("captions_not_utf8", text, "warning", kinds=encoded)
    if 2 * notes[CAPTION_LINES] > images and config.read.caption_lines == "auto":
        text = (
            f"pds-ray: captions of {source} have several lines, {notes[CAPTION_LINES]:,} {of}, and "
            "are read as one caption each; --read.caption-lines each takes every line for a "
            "caption, whole keeps them together without this warning"
        )
        log.event("captions_of_lines", text, "warning", images=notes[CAPTION_LINES])


def _count_captioned(
    wanted: int, source: Source, shards: list[Shard], config: RunConfig, bar: tqdm
) -> tuple[int, Tally, Counter[str]]:
    """Read until there are `wanted` captioned images.

    Returns how many there are, what is bad, and the notes of the source on captions. Moves `bar` on
    by each image.
    """
    clean = CLEANERS[config.read.captions]
    images = read = 0
    bad, notes = Tally(), Counter[str]()
    for shard in shards:
        bar.set_postfix_str(shard.name, refresh=False)
        try:
            for item in source.read(shard):
                if isinstance(item, Fault):
                    bad.add(item.reason, item.key, item.detail)
                elif any(map(clean, item.captions)):
                    images += 1
                    notes.update(item.notes)
                    bar.update()
                if images >= wanted:
                    return images, bad, notes
                if images == 0 and bad.counts["missing_caption"] >= CAPTIONLESS_PROBE:
                    raise ConfigError(
                        f"the first {CAPTIONLESS_PROBE:,} samples of {config.source} have no "
                        f"caption ({bad.line()})"
                    )
            read += 1
        except (OSError, StorageError) as error:
            bad.add("unreadable shards", shard.name, first_line(error))
            unreadable = bad.counts["unreadable shards"]
            if unreadable == min(len(shards), UNREADABLE_PROBE) and not read:
                every = unreadable == len(shards)
                which = "no shard" if every else f"none of the first {unreadable} shards"
                raise SourceError(
                    f"{which} of {config.source} can be read: {first_line(error)}"
                ) from error
    return images, bad, notes
