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
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from safetensors.numpy import load as load_safetensors

from pds_ray.errors import UserError
from pds_ray.modalities.image import ImageError, decode_image
from pds_ray.store.storage import Folder

SET_SCHEMA_VERSION = 1

MANIFEST, CARD, PROTOTYPES = "manifest.json", "README.md", "prototypes.safetensors"

METADATA = "metadata.jsonl"


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
