"""Writing the distilled set: images, metadata, tars, prototypes, card; the manifest last."""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any

import pyarrow as pa
from safetensors.numpy import save as save_safetensors

from pds_ray import catalog
from pds_ray.config import FREE_FIELDS, public, sections
from pds_ray.methods.base import Counts, Run
from pds_ray.modalities.text import clean_basic
from pds_ray.store.distilled_set import CARD, MANIFEST, METADATA, PROTOTYPES, SET_SCHEMA_VERSION
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import vectors
from pds_ray.store.storage import Folder, side_by_side
from pds_ray.telemetry.progress import QUIET_S, progress_bar

Files = dict[str, dict[str, Any]]  # name in the set -> bytes and SHA-256

PAIRS_PER_TAR = 10_000

SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))

# what JSON leaves as it is and terminals or readers of lines act on: C1 controls, line separators, directions
_ACTIVE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

DISTILLED = """Made with pds_ray by Prototype-guided Data Synthesis (Choi, Mo, Chae, ICLR 2026): CLIP embeddings of
images and captions are clustered apart, clusters are matched by the pairs they share, the shared pairs are averaged to
prototypes, and each prototype is decoded to a picture with the nearest caption as prompt."""

DEPARTURES: dict[
    tuple[str, str, object], str
] = {  # (section, option, value) -> what the card says of it
    (
        "cluster",
        "modality",
        "joint",
    ): "one k-means on both embeddings of a pair took the place of two and of the matching",
    (
        "cluster",
        "modality",
        "image",
    ): "one k-means on the images took the place of two and of the matching",
    (
        "cluster",
        "modality",
        "text",
    ): "one k-means on the captions took the place of two and of the matching",
    (
        "match",
        "filter",
        False,
    ): "whole clusters were averaged, not only the pairs that matched ones share",
    ("decode", "condition", "caption"): "pictures were decoded from the captions alone",
    (
        "caption",
        "nearest_to",
        "picture",
    ): "a caption is the real one nearest to the finished picture",
}

SELECTED = """Made with pds_ray by choosing pairs of the source: pictures and captions are real, and belong together; no
picture is chosen twice. The prototypes are the pairs' own embeddings."""


def materialize(run: Run) -> Counts:
    """Write the distilled set of a run whose other stages are done."""
    folder = run.folder
    folder.distilled.delete_all()
    captions = folder.captions() if "caption" in run.method.names else None
    pairs = run.counts("decode")["images"]
    with progress_bar("materialize", pairs, "pairs", delay_s=QUIET_S) as bar:
        return write_distilled(folder, about(run), captions, bar.update)


def about(run: Run) -> dict[str, Any]:
    """Return what the distilled set says of its making: the same for two runs of one configuration."""
    config = public(run.config)
    del config["ray"]
    for option in FREE_FIELDS:
        section, _, name = option.rpartition(".")
        del (config[section] if section else config)[name]
    read = {option.partition(".")[0] for option in run.method.options}
    for section in sections().keys() - read - {"ray"}:
        del config[section]
    decoder, synthetic = run.decoder, run.decoder.dim is not None
    selected = config["method"] in catalog.SELECTORS
    described = {"selection": catalog.selector(config["method"]).DESCRIPTION} if selected else {}
    return {
        "source": config["source"],
        "method": config["method"],
        **described,
        "encoder": run.encoder.name,
        "space": run.encoder.space,
        "decoder": f"{decoder.name} {decoder.identity}" if synthetic else decoder.name,
        "picture_origin": "synthetic" if synthetic else "real pictures of the source",
        "counts": {
            label: run.counts(stage.name)[count]
            for stage in run.method.stages
            for label, count in stage.card
        },
        "config": config,
    }


def records(prototypes: pa.Table, captions: pa.Table | None = None) -> list[dict[str, Any]]:
    """One JSON record a pair, from rows of prototypes.parquet; `captions`, if given, replace those retrieved there.

    The retrieved caption, with which the picture was decoded, is then the record's `prompt`.
    """
    plain = prototypes.drop_columns(["image_prototype", "text_prototype"]).to_pylist()
    if captions is not None:
        chosen = captions.to_pylist()
        plain = [
            {**row, **own, "prompt": row["caption"]} for row, own in zip(plain, chosen, strict=True)
        ]
    return [
        {"file_name": RunFolder.image_name(row["pair"]), "text": row.pop("caption"), **row}
        for row in plain
    ]


def write_distilled(
    run: RunFolder,
    about: dict[str, Any],
    captions: pa.Table | None = None,
    step: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Writes the distilled set of a finished run; `about` is what the card and the manifest say of its making.

    `captions` (rows of captions.parquet) replace those of the prototypes. Returns counts. Few pictures are held
    at a time; `step` is called after each pair. The manifest comes last: without it the folder is no distilled set.
    """
    prototypes = run.prototypes()
    rows = records(prototypes, captions)
    target = run.distilled
    target.delete(MANIFEST)
    pictures: Files = {}
    tars: Files = {}
    others: Files = {}

    def copy(row: dict[str, Any]) -> tuple[bytes, Files]:
        picture, listed = run.images.read_bytes(row["file_name"]), Files()
        _write(target, "imagefolder/" + row["file_name"], picture, listed)
        return picture, listed

    for number, start in enumerate(range(0, len(rows), PAIRS_PER_TAR)):
        with (
            _written(target, f"webdataset/{number:06d}.tar", tars) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.USTAR_FORMAT) as tar,
        ):
            some = rows[start : start + PAIRS_PER_TAR]
            for row, (picture, listed) in zip(some, side_by_side(copy, some), strict=True):
                pictures |= listed
                _add_pair(tar, row, picture)
                step()
    metadata = "".join(_json_line(row) + "\n" for row in rows).encode()
    _write(target, f"imagefolder/{METADATA}", metadata, pictures)
    tensors = {
        "image_prototypes": vectors(prototypes, "image_prototype"),
        "text_prototypes": vectors(prototypes, "text_prototype"),
    }
    _write(target, PROTOTYPES, save_safetensors(tensors), others)
    _write(target, CARD, card(rows, about).encode(), others)
    files = pictures | tars | others
    target.write_json(
        MANIFEST, {"schema": SET_SCHEMA_VERSION, "pairs": len(rows), "about": about, "files": files}
    )
    return {"pairs": len(rows), "bytes": sum(file["bytes"] for file in files.values())}


class _Hashed(io.RawIOBase):
    """A binary stream that counts and hashes what is written to it."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__()
        self._stream = stream
        self._digest = hashlib.sha256()
        self._bytes = 0

    def write(self, data: Any, /) -> int:
        self._digest.update(data)
        self._bytes += len(data)
        return self._stream.write(data)

    def entry(self) -> dict[str, Any]:
        """What the manifest says of the file."""
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


@contextmanager
def _written(target: Folder, name: str, files: Files) -> Iterator[_Hashed]:
    """A stream into a file of the set, which is listed in `files` when the block ends."""
    with target.writer(name) as stream:
        hashed = _Hashed(stream)
        yield hashed
    files[name] = hashed.entry()


def _write(target: Folder, name: str, data: bytes, files: Files) -> None:
    with _written(target, name, files) as stream:
        stream.write(data)


def _add_pair(tar: tarfile.TarFile, row: dict[str, Any], picture: bytes) -> None:
    """One WebDataset sample; no times and no owners, so that the same pairs give the same bytes."""
    record = _json_line(row).encode()
    for suffix, data in (("png", picture), ("txt", row["text"].encode()), ("json", record)):
        member = tarfile.TarInfo(f"{row['pair']:06d}.{suffix}")
        member.size = len(data)
        member.mode = 0o644
        tar.addfile(member, io.BytesIO(data))


def _json_line(row: dict[str, Any]) -> str:
    """A record as JSON in which no terminal and no reader of lines finds anything but one line of text."""
    return _ACTIVE.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(row, ensure_ascii=False))


def card(rows: list[dict[str, Any]], about: dict[str, Any]) -> str:
    """The data-set card: YAML front matter that Hugging Face reads, then prose and tables.

    `about` has a "selection" if the pairs are real ones that were chosen, and then its description.
    """
    chosen = "selection" in about
    making = (
        f"{SELECTED} Method: {about['selection']}."
        if chosen
        else " ".join([DISTILLED, *_departures(about)])
    )
    decoder = "" if chosen else f"- decoder: `{about['decoder']}`\n"
    limits = (
        "A small set leaves out most of its source"
        if chosen
        else "A distilled set keeps what is frequent and loses what is rare"
    )
    size = next((name for limit, name in SIZES if len(rows) < limit), "n>1M")
    counts = "\n".join(f"| {name} | {value} |" for name, value in about["counts"].items())
    examples = "\n".join(
        f"| {row['pair']} | {_cell(row['text'])} | {row['cosine']:.3f} |" for row in rows[:10]
    )
    return f"""---
license: other
license_name: inherits-the-source
task_categories:
- image-to-text
- text-to-image
size_categories:
- {size}
tags:
- {"coreset" if chosen else "dataset-distillation"}
- {about["method"]}
configs:
- config_name: default
  data_dir: imagefolder
---

# {len(rows)} image-caption pairs {"chosen" if chosen else "distilled"} from `{about["source"]}`

{making}

- encoder: `{about["encoder"]}`
{decoder}- pictures are {about["picture_origin"]}; captions are real captions of the source
- licence: that of the source and, for synthetic pictures, of the decoder's weights

| count | value |
| --- | --- |
{counts}

## Use

```python
from datasets import load_dataset
pairs = load_dataset("imagefolder", data_dir="imagefolder", split="train")        # columns: image, text, ...

import webdataset as wds
pairs = wds.WebDataset("webdataset/000000.tar", shardshuffle=False).decode("pil").to_tuple("png", "txt")

from pds_ray import load_distilled
pairs = load_distilled(".")                                                       # with both prototypes
```

| pair | caption | cosine of {"picture and caption" if chosen else "the prototypes"} |
| --- | --- | --- |
{examples}

## Configuration

```json
{json.dumps(about["config"], indent=2)}
```

## Known limits

{limits}. Pictures and captions inherit the biases of the source
and of the models, and were not checked by a person.
"""


def _departures(about: dict[str, Any]) -> list[str]:
    """In what this set was made otherwise, a sentence each."""
    config = about["config"]
    return [
        f"Here {sentence}."
        for (section, option, value), sentence in DEPARTURES.items()
        if config.get(section, {}).get(option) == value
    ]


def _cell(text: str) -> str:
    """Text as text: nothing in it that Markdown, HTML or a terminal could act on."""
    plain = html.escape(clean_basic(text), quote=False).replace("`", "'")
    return re.sub(r"([\\*_{}\[\]()#+!|~:])", r"\\\1", plain)
