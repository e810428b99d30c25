"""Exporting a distilled set in one format, for other programs: Parquet, tars or loose images.

`distilled_set.py` names the files. The manifest comes last, so that a folder without it is no
export, and the same set gives the same bytes. One that is interrupted leaves what it wrote, with
UNFINISHED beside it, and the next one replaces that.
"""

from __future__ import annotations

import json
import os
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pds_ray.errors import ConfigError, first_line
from pds_ray.store.calls import StorageError, side_by_side
from pds_ray.store.card import LAYOUTS, bare_card, card_of_export, image_kind
from pds_ray.store.distilled_set import (
    CARD,
    IMAGES,
    MANIFEST,
    METADATA,
    PROTOTYPES,
    TABLES,
    TARS,
    DistilledSet,
    DistilledSetError,
    image_path,
    load_distilled,
    table_path,
)
from pds_ray.store.learned import LEARNED
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.set_writer import Files, copy, write, written
from pds_ray.store.storage import Folder
from pds_ray.telemetry.progress import QUIET_S, progress_bar

FORMATS = tuple(LAYOUTS)
UNFINISHED = ".unfinished-export"
"""Name of an empty file that is there while an export is written."""
ROWS_PER_GROUP = 100
"""Rows of Parquet that are in memory at a time, and that a reader gets at once."""
BYTES_PER_TABLE = 500 * 10**6
"""Bytes of images after which the next Parquet file begins: what the Hugging Face hub advises."""
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# `datasets` takes the column for images by this entry, and infers the other columns
IMAGE_FEATURE = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})}


def export(path: str, format: str, to: str, place: str = ".") -> dict[str, Any]:
    """Write a distilled set in the format `format` to the folder `to`; return the new manifest.

    `path` is a run folder or a distilled set, `to` is local or on an object store; an export that
    is there is replaced. `place` is what the card tells people to read. The data of the set are
    compared with their hashes before anything is written; the card is taken as it is, so that a
    person may edit it.

    Raises ConfigError if the format is unknown, DistilledSetError if the set is none, damaged or
    without files of the format, and StorageError if `to` holds files of anything else or cannot
    be written to.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format is {format!r}; it must be one of {', '.join(FORMATS)}")
    pairs, target = load_distilled(path), Folder(to)
    names, card = _data_names(pairs, format), _card(pairs, format, place)
    _require_room(target, pairs)
    target.create()
    _check(pairs, names)
    target.write_bytes(UNFINISHED, b"")
    _clear(target)
    files: Files = {}
    if format == "parquet":
        _write_tables(pairs, target, files)
        names = _tensor_names(pairs)
    _copy_files(pairs, names, target, files)
    write(target, CARD, card.encode(), files)
    manifest = {**pairs.manifest, "format": format, "files": files}
    target.write_json(MANIFEST, manifest)
    target.delete(UNFINISHED)
    return manifest


def _data_names(pairs: DistilledSet, format: str) -> list[str]:
    """Return the names of the files of the set that the export is made of, but for the card.

    Raises DistilledSetError if the set has no files of the format.
    """
    if format != "webdataset":
        images = (image_path(row["file_name"]) for row in pairs.records)
        return [*images, METADATA, *_tensor_names(pairs)]
    there = [f"{TARS}/{name}" for name in (pairs.folder / TARS).names(".tar")]
    tars = [name for name in pairs.manifest["files"] if name.startswith(f"{TARS}/")]
    if not tars or set(tars) - set(there):
        raise DistilledSetError(
            f"{pairs.folder.shown} has not all of its tars; export it as parquet or imagefolder"
        )
    return [*tars, *_tensor_names(pairs)]


def _tensor_names(pairs: DistilledSet) -> list[str]:
    """Return the names of the files of tensors, which every export has."""
    return [PROTOTYPES] if pairs.learned is None else [PROTOTYPES, LEARNED]


def _card(pairs: DistilledSet, format: str, place: str) -> str:
    """Return the card of the export. Raises DistilledSetError if that of the set is no card."""
    try:
        has_card = pairs.folder.exists(CARD)
        text = pairs.folder.read_bytes(CARD).decode("utf-8-sig") if has_card else ""
        text = text or bare_card(len(pairs))
        return card_of_export(text, format, place, image_kind(pairs.records))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise DistilledSetError(
            f"{pairs.folder.full(CARD)} is no data-set card ({first_line(error)}); mend it"
        ) from error


def _require_room(target: Folder, pairs: DistilledSet) -> None:
    """Raise StorageError if anything but an earlier export is where the export goes."""
    same = os.path.realpath(target.place) == os.path.realpath(pairs.folder.place)
    if same or target.exists(RunFolder.MANIFEST):
        what = "the set itself" if same else "a run folder"
        raise StorageError(f"{target.shown} is {what}; give another --to")
    earlier = files_of_export(target)
    foreign = [name for name in _there(target) if name not in earlier]
    if foreign and not target.exists(UNFINISHED):
        raise StorageError(
            f"{target.full(foreign[0])} is in the way, and no export wrote it; give another --to"
        )


def files_of_export(target: Folder) -> set[str]:
    """Return the names that the manifest of an export lists, and its own; none if there is none."""
    if not target.exists(MANIFEST):
        return set()
    try:
        manifest = target.read_json(MANIFEST)
        return {MANIFEST, *manifest["files"]} if manifest["format"] in FORMATS else set()
    except (ValueError, LookupError, TypeError):
        return set()


def _there(target: Folder) -> list[str]:
    """Return the files that are where an export goes, the manifest first."""
    top = [name for name in (MANIFEST, CARD, PROTOTYPES, LEARNED) if target.exists(name)]
    parts = [(part, (target / part).names()) for part in (IMAGES, TARS, TABLES)]
    return [*top, *(f"{part}/{name}" for part, names in parts for name in names)]


def _clear(target: Folder) -> None:
    """Delete the export that is in `target`, finished or not."""
    target.delete(MANIFEST)
    target.delete_each(_there(target))


def _check(pairs: DistilledSet, names: list[str]) -> None:
    """Compare files of a set with their hashes. Raises DistilledSetError at the first other one."""
    digests = side_by_side(pairs.folder.sha256, names)
    with progress_bar("check", len(names), "files", delay_s=QUIET_S) as bar:
        for name, digest in zip(names, digests, strict=True):
            if digest != pairs.manifest["files"][name]["sha256"]:
                raise DistilledSetError(
                    f"{pairs.folder.full(name)} is not the file that was written; "
                    "pds-ray verify RUN --repair makes it anew"
                )
            bar.update()


def _copy_files(pairs: DistilledSet, names: list[str], target: Folder, files: Files) -> None:
    """Copy files of the set, and enter them in `files`."""

    def copied(name: str) -> Files:
        one: Files = {}
        copy(pairs.folder, target, name, one)
        return one

    with progress_bar("export", len(names), "files", delay_s=QUIET_S) as bar:
        for one in side_by_side(copied, names):
            files |= one
            bar.update()


def _write_tables(pairs: DistilledSet, target: Folder, files: Files) -> None:
    """Write the pairs as Parquet, a row each with its image, and enter the files in `files`."""
    columns, starts = _columns(pairs), _starts(pairs)
    schema = columns.schema.insert(0, pa.field("image", IMAGE_TYPE)).with_metadata(IMAGE_FEATURE)

    def image(pair: int) -> dict[str, Any]:
        return {"bytes": pairs.image_bytes(pair), "path": pairs.records[pair]["file_name"]}

    with progress_bar("export", len(pairs), "pairs", delay_s=QUIET_S) as bar:
        for number, (start, stop) in enumerate(pairwise([*starts, len(pairs)])):
            with (
                written(target, table_path(number, len(starts)), files) as stream,
                pa.PythonFile(stream, mode="w") as file,
                pq.ParquetWriter(file, schema) as writer,
            ):
                for first in range(start, stop, ROWS_PER_GROUP):
                    group = range(first, min(first + ROWS_PER_GROUP, stop))
                    images = pa.array(side_by_side(image, group), IMAGE_TYPE)
                    some = columns.slice(first, len(group)).columns
                    writer.write_table(pa.table([images, *some], schema))
                    bar.update(len(group))


def _columns(pairs: DistilledSet) -> pa.Table:
    """Return the records as a table, without the fields that no pair has.

    Raises DistilledSetError if the values of a field are of several kinds.
    """
    rows: list[dict[str, Any]] = [dict(record) for record in pairs.records]
    fields = dict.fromkeys(field for row in rows for field in row if field != "file_name")
    try:
        columns = {field: pa.array([row.get(field) for row in rows]) for field in fields}
    except ValueError as error:
        place = pairs.folder.full(METADATA)
        raise DistilledSetError(f"{place} is no table ({first_line(error)})") from error
    return pa.table({name: col for name, col in columns.items() if not pa.types.is_null(col.type)})


def _starts(pairs: DistilledSet) -> list[int]:
    """Return the first pair of each Parquet file, none of which has too many bytes of images."""
    starts, size = [0], 0
    for pair, record in enumerate(pairs.records):
        more = pairs.manifest["files"][image_path(record["file_name"])]["bytes"]
        if size and size + more > BYTES_PER_TABLE:
            starts.append(pair)
            size = 0
        size += more
    return starts
