"""The distilled set: a folder that other tools read without pds_ray.

distilled/
  README.md                    card: source, method, configuration, counts
  manifest.json                SHA-256 and size of every other file; written last
  imagefolder/metadata.jsonl   file_name, text and metadata of each pair, for Hugging Face
  imagefolder/000000.png ...   `imagefolder`; .jpg or .webp in other formats
  webdataset/000000.tar ...    KEY.json, KEY.png (.jpg, .webp), KEY.txt, for `webdataset`
  prototypes.safetensors       image_prototypes, text_prototypes float32 [B, d]; with soft
                               targets also similarity float32 [B, B]
  learned.safetensors          of an optimised set: see store/learned.py

An export (`store/export.py`) has the same files, in one format alone, which its manifest names:
imagefolder/, webdataset/ or data/train-00000-of-00001.parquet ... with the images in the rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

import numpy as np
from PIL import Image
from safetensors.numpy import load as load_safetensors

from pds_ray.errors import UserError, cause
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.store.learned import LEARNED, Learned, LearnedError, unpack
from pds_ray.store.storage import Folder

SET_SCHEMA_VERSION = 1

DISTILLED = "distilled"
"""Name of the set below its run folder."""
MANIFEST, CARD, PROTOTYPES = "manifest.json", "README.md", "prototypes.safetensors"
IMAGES = "imagefolder"
"""Name of the folder of images and metadata below the set."""
METADATA = f"{IMAGES}/metadata.jsonl"
TARS, TABLES = "webdataset", "data"
"""Names of the folders of tars, and of the Parquet files of an export."""


def image_path(file_name: str) -> str:
    """Return the name of an image below the set, from the file name in its record."""
    return f"{IMAGES}/{file_name}"


def tar_path(number: int) -> str:
    """Return the name of the number-th tar below the set."""
    return f"{TARS}/{number:06d}.tar"


def table_path(number: int, count: int) -> str:
    """Return the name of the number-th of `count` Parquet files below an export."""
    return f"{TABLES}/train-{number:05d}-of-{count:05d}.parquet"


def caption_bytes(text: str) -> int:
    """Return the bytes that a caption counts in a set: UTF-8, with a line end."""
    return len(text.encode()) + 1


def record_bytes(record: Record) -> int:
    """Return the bytes that the captions of a pair count in a set."""
    captions = record.get("captions") or [record.get("text") or ""]
    return sum(map(caption_bytes, captions))


class DistilledSetError(UserError, ValueError):
    """A folder is no distilled set, or a damaged one."""


class _DamageError(Exception):
    """A distilled set is damaged; the message says how."""


class Record(TypedDict, total=False):
    """Metadata of one pair. Fields that a set does not have are None or absent."""

    file_name: str
    pair: int
    text: str
    prompt: str
    """The caption that the image was decoded with, where `text` is another one."""
    captions: list[str]
    """All captions of the image, `text` first, where the set has further ones."""
    cosine: float
    """Cosine between the two prototypes; of a chosen pair, between its image and caption."""
    member_norm: float
    """Mean norm of the averaged image embeddings."""
    caption_shard: str
    caption_key: str
    """Place of `text` in the source; of a chosen pair, its own place."""
    caption_cosine: float
    image_cluster: int | None
    text_cluster: int | None
    shared: int | None
    """Number of pairs in both clusters."""
    nearest_shard: str | None
    nearest_key: str | None
    nearest_cosine: float | None
    """The real image nearest to the image prototype."""
    members: list[str] | None
    """Some of the averaged pairs, as shard/key."""
    origin: str
    """Synthetic or real; this field and those below are there if images were scored."""
    candidate: int | None
    """Number of the image among the pair's candidates."""
    noise_level: int | None
    image_cosine: float
    """Cosine of the image and the image prototype."""
    text_cosine: float
    """Cosine of the image and the text prototype."""
    score: float
    round_trip: bool
    """True if of all image prototypes its own is nearest to the image."""
    learned_captions: list[str]
    """The real captions nearest to the learned text vector, the nearest first, if there is one."""
    learned_cosines: list[float]
    """Cosines of their vectors and the learned one."""


PROTOTYPE_FIELDS = (
    "image_cluster",
    "text_cluster",
    "shared",
    "nearest_shard",
    "nearest_key",
    "nearest_cosine",
    "members",
)
"""Fields that the pairs of a selection do not have: they are no averages of clusters."""


@dataclass(frozen=True)
class SetSize:
    """The size of a set as it is counted against a budget: its images and captions, no more.

    Prototypes, metadata and the heads of archives are left out: training on the set needs none.
    Learned parts are a number of their own, and in no budget: a training may do without them.
    """

    pairs: int
    image_bytes: int
    """Bytes of the image files."""
    caption_bytes: int
    """Bytes of the captions in UTF-8, with a line end each."""
    pixels: int
    """Pixels of the images as stored."""
    learned_bytes: int = 0
    """Bytes of the file of learned parts; 0 if there are none."""

    @property
    def bytes(self) -> int:
        """All bytes that count against a budget."""
        return self.image_bytes + self.caption_bytes

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, as the manifest of a set holds it."""
        counts = {"bytes": self.bytes, **asdict(self)}
        if not self.learned_bytes:
            del counts["learned_bytes"]
        return counts


@dataclass(frozen=True)
class DistilledSet:
    """A distilled set in memory, except for its images, which are read on demand."""

    folder: Folder
    captions: list[str]
    """B captions, in order; "" for a pair that has none."""
    image_prototypes: np.ndarray
    """float32 [B, d], un-normalised."""
    text_prototypes: np.ndarray
    """float32 [B, d], un-normalised."""
    records: list[Record]
    """The metadata of each pair."""
    manifest: dict[str, Any]
    similarity: np.ndarray | None = None
    """Soft targets, float32 [B, B], none negative: how much caption j is a target of image i."""
    learned: Learned | None = None
    """Learned parts, if there are any; `learned_images` reads the images that belong to them."""

    @property
    def caption_lists(self) -> list[list[str]]:
        """All captions of each pair, the one in `captions` first."""
        rows = zip(self.captions, self.records, strict=True)
        return [record.get("captions") or [own] for own, record in rows]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def is_selection(self) -> bool:
        """True if the pairs are real ones that were chosen, so that nothing was averaged."""
        return _is_selection(self.manifest)

    def size(self) -> SetSize:
        """Return the pairs, bytes and pixels of the set.

        The images are read if an earlier version wrote the set, or another program: its manifest
        then lacks the pixels. Raises DistilledSetError as `image` does.
        """
        # an image that several pairs share is one file
        pair_of = {row["file_name"]: pair for pair, row in enumerate(self.records)}
        recorded, files = self.manifest.get("size") or {}, self.manifest["files"]
        pixels = recorded.get("pixels") or sum(
            math.prod(self.image(pair).size) for pair in pair_of.values()
        )
        images = sum(files[image_path(name)]["bytes"] for name in pair_of)
        captions, learned = sum(map(record_bytes, self.records)), files.get(LEARNED, {})
        return SetSize(len(self), images, captions, pixels, learned.get("bytes", 0))

    def image(self, pair: int) -> Image.Image:
        """Return the RGB image of one pair.

        Raises DistilledSetError in one line if it is gone or not the one that was written.
        """
        try:
            return decode_image(self.image_bytes(pair), min_side=1)
        except ImageError as error:
            place = self.folder.full(image_path(self.records[pair]["file_name"]))
            raise DistilledSetError(f"{place} is no usable image ({error})") from error

    def image_bytes(self, pair: int) -> bytes:
        """Return the encoded image of one pair. Raises DistilledSetError as `image` does."""
        name = image_path(self.records[pair]["file_name"])
        place = self.folder.full(name)
        try:
            data = self.folder.read_bytes(name)
        except OSError as error:
            raise DistilledSetError(f"{place} cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise DistilledSetError(f"{place} is not the image that was written")
        return data

    def learned_images(self) -> np.ndarray:
        """Return the images as they were learned, normalised, float32 [B, 3, S, S].

        Raises DistilledSetError in one line if the set has none, or if the file is damaged.
        """
        place = self.folder.full(LEARNED)
        if self.learned is None:
            raise DistilledSetError(f"{self.folder.shown} has no learned parts")
        try:
            return unpack(_as_written(self.folder, LEARNED, self.manifest))[1]
        except (OSError, _DamageError, LearnedError) as error:
            raise DistilledSetError(f"{place} cannot be read ({cause(error)})") from error


def load_distilled(path: str) -> DistilledSet:
    """Read a distilled set, or the one in a run folder.

    Raises DistilledSetError in one line if there is none, or if it is damaged.
    """
    folder = Folder(path)
    if not folder.exists(MANIFEST) and (folder / DISTILLED).exists(MANIFEST):
        folder = folder / DISTILLED
    if not folder.exists(MANIFEST):
        raise DistilledSetError(
            f"{path} is no distilled set: it has no {MANIFEST} (is the run finished?)"
        )
    try:
        return _read(folder)
    except DistilledSetError:
        raise
    except _DamageError as damage:
        raise DistilledSetError(
            f"{path} is a damaged distilled set: {damage}; pds-ray verify RUN --repair mends it"
        ) from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DistilledSetError(
            f"{path} is a damaged distilled set ({cause(error)}); pds-ray verify RUN --repair "
            "mends it"
        ) from error


def _read(folder: Folder) -> DistilledSet:
    manifest = folder.read_json(MANIFEST)
    if "format" in manifest and manifest["format"] != IMAGES:
        raise DistilledSetError(
            f"{folder.shown} is an export as {manifest['format']}, for other programs; give the "
            f"run folder, or an export as {IMAGES}"
        )
    metadata, prototypes = (_as_written(folder, name, manifest) for name in (METADATA, PROTOTYPES))
    rows = [json.loads(line) for line in metadata.decode().split("\n") if line]
    tensors = load_safetensors(prototypes)
    image, text = tensors["image_prototypes"], tensors["text_prototypes"]
    file_names = {row["file_name"] for row in rows}
    if unlisted := set(map(image_path, file_names)).difference(manifest["files"]):
        raise _DamageError(f"its manifest does not list {min(unlisted)}")
    if not isinstance(manifest["about"], dict):
        raise _DamageError("its manifest does not say what it is about")
    captions = [row.get("text") or "" for row in rows]
    if not len(rows) == manifest["pairs"] == len(image) == len(text):
        raise _DamageError("its files disagree on the number of pairs")
    if missing := file_names.difference((folder / IMAGES).names()):
        raise _DamageError(f"{len(missing)} images are gone ({min(missing)})")
    if not all(_are_captions(row.get("captions")) for row in rows):
        raise _DamageError("its further captions are no lists of texts")
    similarity = tensors.get("similarity")
    if similarity is not None and not _are_targets(similarity, len(rows)):
        raise _DamageError("its similarity is no table of soft targets")
    learned = _learned(folder, manifest, len(rows))
    if _is_selection(manifest):  # its rows hold the chosen pair in place of what it does not have
        rows = [{**row, **dict.fromkeys(PROTOTYPE_FIELDS)} for row in rows]
    return DistilledSet(folder, captions, image, text, rows, manifest, similarity, learned)


def _as_written(folder: Folder, name: str, manifest: dict[str, Any]) -> bytes:
    """Return a file of a set. Raises _DamageError if its hash is not that of the manifest."""
    data = folder.read_bytes(name)
    if hashlib.sha256(data).hexdigest() != manifest["files"][name]["sha256"]:
        raise _DamageError(f"{name} is not the file that was written")
    return data


def _learned(folder: Folder, manifest: dict[str, Any], pairs: int) -> Learned | None:
    """Return the learned parts of a set, if it has any. Raises _DamageError."""
    if LEARNED not in manifest["files"]:
        return None
    try:
        learned, _ = unpack(_as_written(folder, LEARNED, manifest))
    except LearnedError as error:
        raise _DamageError(str(error)) from error
    if len(learned.text) != pairs:
        raise _DamageError(f"its {LEARNED} holds {len(learned.text)} pairs, not {pairs}")
    return learned


def _are_captions(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and all(isinstance(caption, str) for caption in value)
    )


def _are_targets(similarity: np.ndarray, pairs: int) -> bool:
    """Return whether every image and every caption of B pairs has targets that can be weighed."""
    return bool(
        similarity.shape == (pairs, pairs)
        and np.isfinite(similarity).all()
        and (similarity >= 0).all()
        and (similarity.sum(axis=0) > 0).all()
        and (similarity.sum(axis=1) > 0).all()
    )


def _is_selection(manifest: dict[str, Any]) -> bool:
    return "selection" in manifest["about"]
