"""Writing the distilled set: images, metadata, tars, prototypes, card; the manifest last."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import pyarrow as pa
from PIL import Image

from pds_ray import catalog
from pds_ray.config import FREE_FIELDS, ConfigError, public, sections
from pds_ray.errors import without_secrets
from pds_ray.methods.base import Counts, Run
from pds_ray.methods.pds import judged
from pds_ray.stages.budget import fitting_pairs
from pds_ray.stages.candidates import REAL
from pds_ray.stages.extras import Extras
from pds_ray.stages.prototypes import fewer
from pds_ray.store.card import CardText, card
from pds_ray.store.distilled_set import (
    CARD,
    MANIFEST,
    METADATA,
    PROTOTYPES,
    SET_SCHEMA_VERSION,
    Record,
    SetSize,
    image_path,
    record_bytes,
    tar_path,
)
from pds_ray.store.learned import LEARNED, Learned, pack
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import MODALITIES
from pds_ray.store.set_writer import Files, write, write_tensors, written
from pds_ray.store.storage import Folder, side_by_side
from pds_ray.store.tensors import Tensor
from pds_ray.telemetry.progress import QUIET_S, progress_bar

PAIRS_PER_TAR = 10_000
IMAGES_TOGETHER = 1_000  # copied by one task: some seconds of round trips to an object store
OPTIMISE = "optimise"
"""The stage that leaves learned parts."""

# JSON leaves these as they are, and terminals or readers of lines act on them: C1 controls, line
# separators, text directions
_ACTIVE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def materialize(run: Run, extras: Extras, apply: Apply = map) -> Counts:
    """Write the distilled set of a run whose other stages are done; return its counts.

    `apply` applies a function to parts of the set, in order.
    """
    folder, budget = run.folder, run.config.budget_bytes
    folder.distilled.delete_all()
    captions = folder.captions() if "caption" in run.method.names else None
    choices = folder.choices() if judged(run) else None
    if OPTIMISE in run.method.names:
        folder = folder.of_learned()
        learned, nearest = folder.learning.result(), folder.learning.captions()
        extras = replace(extras, learned=learned, learned_captions=nearest)
    pairs = folder.pair_count()
    asked = folder.budget()["asked"] if budget else 0
    with progress_bar("materialize", pairs, "pairs", delay_s=QUIET_S) as bar:
        text, parts = run.method.card, (extras, choices)
        return write_distilled(
            folder, about(run), text, captions, bar.update, *parts, budget, asked, apply
        )


def describe_extras(extras: Extras) -> dict[str, str]:
    """Return what the card says of the extra parts; nothing where there are none."""
    parts = []
    if extras.captions is not None:
        parts.append(
            f"{sum(map(len, extras.captions)):,} further captions, in the column `captions` after "
            "the pair's own"
        )
    if extras.similarity is not None:
        parts.append(
            "soft targets, in `prototypes.safetensors` as `similarity`: a row per image, a "
            "column per caption"
        )
    found = {"extras": "; ".join(parts)} if parts else {}
    return found if extras.learned is None else {**found, "learned": _sentences(extras.learned[0])}


def _sentences(learned: Learned) -> str:
    """Return what the card says of learned parts, and of their use."""
    about = learned.about
    side = f"{about.image_size} x {about.image_size} pixels"
    mean, std = (", ".join(f"{value:g}" for value in values) for values in (about.mean, about.std))
    parts = [
        f"`images`, {side} as {about.backbone} takes them (pixels from 0 to 1, less {mean}, over "
        f"{std})",
        f"`text`, a vector per pair in the place of that which {about.text_encoder} makes of its "
        "caption, and of use with that encoder alone",
    ]
    if learned.similarity is not None:
        parts.append(
            "`similarity`, a row per image and a column per text vector: the targets of the loss "
            f"{about.loss}"
        )
    if learned.step_sizes is not None:
        parts.append("`step_sizes`, the learning rates of SGD for images and text")
    return (
        f"Images and text vectors were learned by {about.distiller}: `{LEARNED}` holds "
        f"{'; '.join(parts)}. `load_distilled` gives them as `learned` and `learned_images()`. The "
        "pictures are those images cut to 0 to 255, the captions those of the start; a training "
        "may use them alone"
    )


def about(run: Run) -> dict[str, Any]:
    """Return the set's description of its making, equal for all runs of one configuration."""
    config = public(run.config)
    del config["ray"]
    for option in FREE_FIELDS:
        section, _, name = option.rpartition(".")
        del (config[section] if section else config)[name]
    read = {option.partition(".")[0] for option in run.method.options}
    for section in sections().keys() - read - {"ray"}:
        del config[section]
    if config.pop("extras", None) and run.config.extras.used:
        config["extras"] = run.config.extras.used
    decoder, synthetic = run.decoder, run.decoder.dim is not None
    chosen = run.method.chosen
    if config["method"] in catalog.SELECTORS:
        chosen = catalog.selector(config["method"]).DESCRIPTION
    described = {"selection": chosen} if chosen else {}
    return {
        "source": config["source"],
        "method": config["method"],
        **described,
        **_fewer(run),
        "encoder": run.encoder.name,
        "space": run.encoder.space,
        "decoder": f"{decoder.name} {decoder.identity}" if synthetic else decoder.name,
        "picture_origin": _origin(run),
        "counts": {
            label: run.counts(stage.name)[count]
            for stage in run.method.stages
            for label, count in stage.card
        },
        "config": config,
    }


def _origin(run: Run) -> str:
    """Return where the images of a set come from."""
    origin = "synthetic" if run.decoder.dim is not None else "real images of the source"
    if OPTIMISE not in run.method.names:
        return origin
    init = run.config.distill.init
    if not run.config.start:
        origin = f"those of {without_secrets(init)}"
    elif init == "noise":
        origin = "noise"
    return f"learned from {origin}"


def _describe_images(about: Mapping[str, Any], rows: list[Record]) -> dict[str, str]:
    """Return where the images of a set come from, if some are real ones in place of decoded."""
    real = sum(row.get("origin") == REAL for row in rows)
    instead = f"{real:,} real images of the source where the decoded one failed"
    return {"picture_origin": f"{about['picture_origin']}, but for {instead}"} if real else {}


def _fewer(run: Run) -> dict[str, str]:
    """Return why the set has fewer pairs than asked for, as the stage counted that found out."""
    counts = (entry.get("counts", {}) for entry in run.manifest.stages.values())
    texts = [each["fewer"] for each in counts if "fewer" in each]
    return {"fewer": texts[0]} if texts else {}


def records(
    prototypes: pa.Table,
    run: RunFolder,
    captions: pa.Table | None = None,
    further: list[list[str]] | None = None,
    choices: pa.Table | None = None,
) -> list[Record]:
    """Return one JSON record per pair, from its facts in prototypes.parquet.

    `run` names the images.

    `captions` (rows of captions.parquet), if given, replace the captions retrieved there. The
    retrieved caption, with which the image was decoded, is then the record's `prompt`. `further`,
    if given, are more captions of each pair. `choices` (rows of choices.parquet), if given, tell
    where the image comes from and how it was scored.
    """
    rows = prototypes.to_pylist()
    if captions is not None:
        chosen = captions.to_pylist()
        rows = [
            {**row, **own, "prompt": row["caption"]} for row, own in zip(rows, chosen, strict=True)
        ]
    if choices is not None:
        rows = [{**row, **own} for row, own in zip(rows, choices.to_pylist(), strict=True)]
    found: list[Record] = [
        {"file_name": run.image_name(row["pair"]), "text": row.pop("caption"), **row}
        for row in rows
    ]
    for record, more in zip(found, further or [], strict=False):
        record["captions"] = [record["text"], *more]
    return found


def write_distilled(
    run: RunFolder,
    about: dict[str, Any],
    text: CardText,
    captions: pa.Table | None = None,
    step: Callable[[int], object] = lambda _: None,
    extras: Extras | None = None,
    choices: pa.Table | None = None,
    budget: int = 0,
    asked: int = 0,
    apply: Apply = map,
) -> dict[str, Any]:
    """Write the distilled set of a finished run; return its counts.

    With a `budget` of bytes the set ends before the first pair that does not fit; that there are
    fewer than `asked` is then said.

    `about` is what card and manifest say of the making, `text` the method's part of the card.
    `captions` (rows of captions.parquet) replace those of the prototypes; `choices` (rows of
    choices.parquet) go into the records. `step` is called with the number of pairs that were
    written, `extras` are more parts. `apply` applies a function to parts of the set, in order. Few
    images are in memory at a time. The manifest comes last: a folder without it is no distilled
    set. Raises FileNotFoundError if an image of the run is missing.
    """
    extras, short = extras or Extras(), {}
    rows = records(run.prototype_facts(), run, captions, extras.captions, choices)
    if extras.learned_captions is not None:
        nearest = extras.learned_captions.drop_columns("pair").to_pylist()
        rows = [{**row, **found} for row, found in zip(rows, nearest, strict=True)]
    if budget:
        rows = rows[: _fitting(run.images, rows, budget)]
        extras = extras.first(len(rows))
        short = fewer(asked, len(rows), "no more fit in the budget")
        about = {**about, **short, "counts": {**about["counts"], "distilled pairs": len(rows)}}
    about = {**about, **_describe_images(about, rows), **describe_extras(extras)}
    target = run.distilled
    target.delete(MANIFEST)
    images, tars, pixels = _write_images(run.images, target, rows, step, apply)
    others: Files = {}
    if extras.learned is not None:
        write(target, LEARNED, pack(*extras.learned), others)
    size = SetSize(
        pairs=len(rows),
        image_bytes=sum(file["bytes"] for file in images.values()),
        caption_bytes=sum(map(record_bytes, rows)),
        pixels=pixels,
        learned_bytes=others.get(LEARNED, {}).get("bytes", 0),
    )
    metadata = "".join(_json_line(row) + "\n" for row in rows).encode()
    write(target, METADATA, metadata, images)
    tensors = {
        f"{modality}_prototypes": run.prototype_vectors(modality).first(len(rows))
        for modality in MODALITIES
    }
    if extras.similarity is not None:
        tensors["similarity"] = Tensor.of(extras.similarity)
    write_tensors(target, PROTOTYPES, tensors, others)
    write(target, CARD, card(rows, _with_size(about, size), text).encode(), others)
    files = images | tars | others
    manifest = {"schema": SET_SCHEMA_VERSION, "pairs": len(rows), "size": size.to_json()}
    target.write_json(MANIFEST, {**manifest, "about": about, "files": files})
    together = sum(file["bytes"] for file in files.values())
    return {"pairs": len(rows), "bytes": together, "size": size.to_json(), **short}


def _fitting(images: Folder, rows: list[Record], budget: int) -> int:
    """Return how many of the first pairs fit into a budget. Raises ConfigError if none does."""
    data = side_by_side(images.read_bytes, [row["file_name"] for row in rows])
    sizes = [len(image) + record_bytes(row) for image, row in zip(data, rows, strict=True)]
    count = fitting_pairs(sizes, budget)
    if not count:
        raise ConfigError(
            f"budget is {budget:,} bytes; the first pair alone has {sizes[0]:,}; give more"
        )
    return count


def _with_size(about: dict[str, Any], size: SetSize) -> dict[str, Any]:
    """Return the description of a set with its size among its counts, as the card has them."""
    counted = {
        "distilled pairs": size.pairs,
        "bytes of images and captions": size.bytes,
        "bytes of images": size.image_bytes,
        "bytes of captions": size.caption_bytes,
        "pixels": size.pixels,
        **({"bytes of learned parts": size.learned_bytes} if size.learned_bytes else {}),
    }
    return {**about, "counts": {**about["counts"], **counted}}


@dataclass(frozen=True)
class Images:
    """Some images, to be copied into the set."""

    names: list[str]
    """Their names in `source`."""
    source: Folder
    target: Folder

    def __str__(self) -> str:
        """Return the first name, by which a person knows what is waited for."""
        return image_path(self.names[0])


@dataclass(frozen=True)
class Tar:
    """Some pairs, to be written into one tar of the set."""

    number: int
    rows: list[Record]
    source: Folder
    target: Folder

    def __str__(self) -> str:
        """Return its name, by which a person knows what is waited for."""
        return tar_path(self.number)


Item = TypeVar("Item")
Result = TypeVar("Result")


class Apply(Protocol):
    """A `map` over lists, which may be one over a cluster."""

    def __call__(
        self, function: Callable[[Item], Result], items: list[Item], /
    ) -> Iterable[Result]: ...


def copy_images(images: Images) -> tuple[Files, int]:
    """Copy images into the set; return their files, and the pixels of all of them.

    Raises FileNotFoundError if one is missing.
    """

    def copy(name: str) -> tuple[Files, int]:
        image, listed = images.source.read_bytes(name), Files()
        write(images.target, image_path(name), image, listed)
        with Image.open(io.BytesIO(image)) as opened:
            return listed, math.prod(opened.size)

    files, pixels = Files(), 0
    for listed, own in side_by_side(copy, images.names):
        files |= listed
        pixels += own
    return files, pixels


def write_tar(tar: Tar, step: Callable[[int], object] = lambda _: None) -> Files:
    """Write images into a tar with text and metadata; return its entry.

    `step` is called with 1 after each. Raises FileNotFoundError if one is missing.
    """
    from webdataset import TarWriter

    files = Files()
    images = side_by_side(tar.source.read_bytes, [row["file_name"] for row in tar.rows])
    with (
        written(tar.target, tar_path(tar.number), files) as stream,
        # without times and owners: the same pairs give the same bytes
        TarWriter(stream, user="", group="", mode=0o644, mtime=0, encoder=False) as writer,
    ):
        for row, image in zip(tar.rows, images, strict=True):
            text, record = row["text"].encode(), _json_line(row).encode()
            key, _, kind = row["file_name"].rpartition(".")
            writer.write({"__key__": key, kind: image, "txt": text, "json": record})
            step(1)
    return files


def _write_images(
    source: Folder,
    target: Folder,
    rows: list[Record],
    step: Callable[[int], object],
    apply: Apply,
) -> tuple[Files, Files, int]:
    """Write the images of the set, then its tars; `apply` makes several.

    Images are read twice: many tasks copy them, where a tar has one. Returns the files of both, and
    the pixels of all images.
    """
    names = [row["file_name"] for row in rows]
    copies = [
        Images(names[start : start + IMAGES_TOGETHER], source, target)
        for start in range(0, len(rows), IMAGES_TOGETHER)
    ]
    tars = [
        Tar(number, rows[start : start + PAIRS_PER_TAR], source, target)
        for number, start in enumerate(range(0, len(rows), PAIRS_PER_TAR))
    ]
    images, files, pixels = Files(), Files(), 0
    for listed, own in (map if len(copies) < 2 else apply)(copy_images, copies):
        images |= listed
        pixels += own
    alone = len(tars) < 2
    written_tars = map(partial(write_tar, step=step), tars) if alone else apply(write_tar, tars)
    for tar, entry in zip(tars, written_tars, strict=True):
        files |= entry
        if not alone:
            step(len(tar.rows))
    return images, files, pixels


def _json_line(row: Record) -> str:
    """Return a record as JSON that is one line for every terminal and reader of lines."""
    return _ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(row, ensure_ascii=False))
