"""The distilled set: a folder that other people's tools read without us.

distilled/
  README.md                    card: source, method, configuration, counts
  manifest.json                SHA-256 and size of every other file; written last
  imagefolder/metadata.jsonl   file_name, text, and what is known of each pair   (Hugging Face `imagefolder`)
  imagefolder/000000.png ...
  webdataset/000000.tar ...    KEY.png, KEY.txt, KEY.json                        (`webdataset`)
  prototypes.safetensors       image_prototypes, text_prototypes float32 [B, d]
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
from PIL import Image
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pds_ray.errors import UserError
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.modalities.text import clean_basic
from pds_ray.store.artifacts import RunFolder, vectors
from pds_ray.store.storage import Folder, side_by_side

Files = dict[str, dict[str, Any]]  # name in the set -> bytes and SHA-256

SET_SCHEMA_VERSION = 1
PAIRS_PER_TAR = 10_000
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
# what JSON leaves as it is and terminals or readers of lines act on: C1 controls, line separators, directions
_ACTIVE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
MANIFEST, CARD, PROTOTYPES = "manifest.json", "README.md", "prototypes.safetensors"
METADATA = "metadata.jsonl"
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


class DistilledSetError(UserError, ValueError):
    """A folder that is no distilled set, or a damaged one."""


@dataclass(frozen=True)
class DistilledSet:
    """A distilled set in memory but for its pictures, which are read on demand."""

    folder: Folder
    captions: list[str]
    """B captions, in order; "" where a set has none."""
    image_prototypes: np.ndarray
    """float32 [B, d], un-normalised."""
    text_prototypes: np.ndarray
    """float32 [B, d], un-normalised."""
    records: list[dict[str, Any]]
    """The metadata of each pair."""
    manifest: dict[str, Any]

    def __len__(self) -> int:
        return len(self.captions)

    def image(self, pair: int) -> Image.Image:
        """RGB picture of one pair. Raises DistilledSetError in one line if it is not the one that was written."""
        name = "imagefolder/" + self.records[pair]["file_name"]
        try:
            data = self.folder.read_bytes(name)
        except OSError as error:
            raise DistilledSetError(
                f"{self.folder.full(name)} cannot be read ({error.strerror})"
            ) from error
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise DistilledSetError(f"{self.folder.full(name)} is not the picture that was written")
        try:
            return decode_image(data, min_side=1)
        except ImageError as error:
            raise DistilledSetError(
                f"{self.folder.full(name)} is no usable picture ({error})"
            ) from error


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


def load_distilled(path: str) -> DistilledSet:
    """Reads a distilled set, or the one in a run folder. Raises DistilledSetError in one line if there is none."""
    folder = Folder(path)
    if not folder.exists(MANIFEST) and (folder / "distilled").exists(MANIFEST):
        folder = folder / "distilled"
    if not folder.exists(MANIFEST):
        raise DistilledSetError(
            f"{path} is no distilled set: it has no {MANIFEST} (is the run finished?)"
        )
    try:
        manifest = folder.read_json(MANIFEST)
        metadata, prototypes = (
            (folder / "imagefolder").read_bytes(METADATA),
            folder.read_bytes(PROTOTYPES),
        )
        files, pairs = manifest["files"], manifest["pairs"]
        for name, data in ((f"imagefolder/{METADATA}", metadata), (PROTOTYPES, prototypes)):
            if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
                raise DistilledSetError(
                    f"{path} is a damaged distilled set: {name} is not the file that was written"
                )
        rows = [json.loads(line) for line in metadata.decode().split("\n") if line]
        tensors = load_safetensors(prototypes)
        image, text = tensors["image_prototypes"], tensors["text_prototypes"]
        pictures = {row["file_name"] for row in rows}
        if unlisted := {f"imagefolder/{name}" for name in pictures}.difference(files):
            raise DistilledSetError(
                f"{path} is a damaged distilled set: its manifest does not list {min(unlisted)}"
            )
        if not isinstance(manifest["about"], dict):
            raise DistilledSetError(
                f"{path} is a damaged distilled set: its manifest does not say what it is about"
            )
        images = folder / "imagefolder"  # listings of object stores may be behind
        missing = {
            name for name in pictures.difference(images.names(".png")) if not images.exists(name)
        }
        captions = [row.get("text") or "" for row in rows]
    except DistilledSetError:
        raise
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DistilledSetError(f"{path} is a damaged distilled set ({error!r})") from error
    if not len(rows) == pairs == len(image) == len(text):
        raise DistilledSetError(
            f"{path} is a damaged distilled set: its files disagree on the number of pairs"
        )
    if missing:
        raise DistilledSetError(
            f"{path} is a damaged distilled set: {len(missing)} pictures are gone ({min(missing)})"
        )
    return DistilledSet(folder, captions, image, text, rows, manifest)
