"""Learned parts of a set: what an optimisation made of its images and captions.

learned.safetensors, of K pairs
  images       float32 [K, 3, S, S], pixels normalised with mean and std; any value is allowed
  text         float32 [K, t], vectors of one text encoder, not normalised
  similarity   float32 [K, K], how much text vector j is a target of image i; may leave 0 to 1
  step_sizes   float32 [2], learning rates of the image branch and of the text branch
  metadata     "learned": the fields of `LearnedFor` as JSON

similarity and step_sizes are there only if they were learned. A run folder has the same kind of
file for the set that was improved, and how the optimisation went (see `LearningFiles`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pds_ray.errors import UserError
from pds_ray.store.storage import Folder

LEARNED = "learned.safetensors"
"""Name of the file below a set, and below the run folder."""
LOSSES = ("info_nce", "ence", "wbce", "soft_wbce")
"""Losses that a set can be learned for (training/losses.py)."""
TRAINED = ("all", "heads", "lora")
"""Parts of a model that a set can be learned for."""
METADATA = "learned"
LENGTH_BYTES = 8  # of the head of a safetensors file


class LearnedError(UserError, ValueError):
    """A file of learned parts is damaged."""


@dataclass(frozen=True)
class LearnedFor:
    """The models and the training that parts were learned for."""

    distiller: str
    backbone: str
    backbone_identity: str
    image_size: int
    """The side S of the images in pixels."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in 0 to 1: the images are normalised with mean and std."""
    std: tuple[float, float, float]
    text_encoder: str
    text_encoder_identity: str
    """The encoder whose vectors the text vectors stand for: they are of no use with another."""
    loss: str = "info_nce"
    """One of LOSSES."""
    train: str = "all"
    """One of TRAINED."""


@dataclass(frozen=True)
class Learned:
    """The learned parts of a set of K pairs, without its images; None for one not learned."""

    about: LearnedFor
    text: np.ndarray
    """float32 [K, t]."""
    similarity: np.ndarray | None = None
    """float32 [K, K]."""
    step_sizes: np.ndarray | None = None
    """float32 [2]: of the image branch and of the text branch."""

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the parts that are there, as evaluations give them."""
        there = {"similarity": self.similarity, "steps": self.step_sizes}
        return ("images", "text", *(name for name, part in there.items() if part is not None))

    def first(self, pairs: int) -> Learned:
        """Return the parts of the first pairs alone."""
        similarity = self.similarity
        if similarity is not None:
            similarity = np.ascontiguousarray(similarity[:pairs, :pairs])
        return Learned(self.about, self.text[:pairs], similarity, self.step_sizes)


def pack(learned: Learned, images: np.ndarray) -> bytes:
    """Return learned parts and their images, float32 [K, 3, S, S], as a safetensors file.

    Raises LearnedError if their shapes or values do not fit each other.
    """
    tensors = {
        "images": images,
        "text": learned.text,
        "similarity": learned.similarity,
        "step_sizes": learned.step_sizes,
    }
    there = {name: np.ascontiguousarray(t) for name, t in tensors.items() if t is not None}
    _check(there, learned.about)
    metadata = {METADATA: json.dumps(asdict(learned.about), sort_keys=True)}
    return save_safetensors(there, metadata=metadata)


def unpack(data: bytes) -> tuple[Learned, np.ndarray]:
    """Return learned parts and their images, float32 [K, 3, S, S], from a file.

    Raises LearnedError, whose message completes "its ...".
    """
    try:
        tensors = load_safetensors(data)
        length = int.from_bytes(data[:LENGTH_BYTES], "little")
        header = json.loads(data[LENGTH_BYTES : LENGTH_BYTES + length])
        about = _about(json.loads(header["__metadata__"][METADATA]))
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise LearnedError(
            f"its {LEARNED} cannot be read, or does not say what it was learned for"
        ) from error
    _check(tensors, about)
    similarity, steps = tensors.get("similarity"), tensors.get("step_sizes")
    return Learned(about, tensors["text"], similarity, steps), tensors["images"]


def _about(value: Mapping[str, Any]) -> LearnedFor:
    """Return what parts were learned for. Raises LookupError, TypeError or ValueError."""
    known = {field.name: value[field.name] for field in fields(LearnedFor)}
    for name in ("mean", "std"):
        red, green, blue = map(float, known[name])
        known[name] = red, green, blue
    for field in fields(LearnedFor):
        kind = {"int": int, "str": str}.get(str(field.type), tuple)
        if not isinstance(known[field.name], kind):
            raise TypeError(field.name)
    constants = np.array([*known["mean"], *known["std"]])
    if not np.isfinite(constants).all() or min(known["std"]) <= 0 or known["image_size"] < 1:
        raise ValueError("images that no backbone takes")
    if known["loss"] not in LOSSES or known["train"] not in TRAINED:
        raise ValueError("a loss or training that does not exist")
    return LearnedFor(**known)


def _check(tensors: Mapping[str, np.ndarray], about: LearnedFor) -> None:
    """Raise LearnedError unless tensors have the shapes and values of learned parts."""
    nothing, side = np.empty((0, 0)), about.image_size
    (pairs, *_), (*_, width) = (
        tensors.get(name, nothing).shape or (0,) for name in ("images", "text")
    )
    shapes = {
        "images": (pairs, 3, side, side),
        "text": (pairs, width),
        "similarity": (pairs, pairs),
        "step_sizes": (2,),
    }
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        if tensor is None and name in ("similarity", "step_sizes"):
            continue
        if tensor is None or tensor.dtype != np.float32 or tensor.shape != shape:
            raise LearnedError(f"its learned {name} are no float32 {list(shape)}")
        if not np.isfinite(tensor).all():
            raise LearnedError(f"its learned {name} hold values that are not finite")
    if "step_sizes" in tensors and (tensors["step_sizes"] <= 0).any():
        raise LearnedError("its learned step_sizes are not positive")


LEARNED_CAPTION_SCHEMA = pa.schema(
    [
        ("pair", pa.int32()),
        # real captions nearest to the learned text vector, the nearest first
        ("learned_captions", pa.list_(pa.string())),
        ("learned_cosines", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class LearningFiles:
    """The files of an optimisation below a run folder."""

    folder: Folder

    RESULT, START = LEARNED, "start.safetensors"
    HISTORY, CAPTIONS = "history.parquet", "learned_captions.parquet"

    def save_result(self, learned: Learned, images: np.ndarray) -> None:
        self.folder.write_bytes(self.RESULT, pack(learned, images))

    def result(self) -> tuple[Learned, np.ndarray]:
        """Return the learned parts and their images. Raises LearnedError."""
        return self._read(self.RESULT)

    def save_start(self, learned: Learned, images: np.ndarray) -> None:
        self.folder.write_bytes(self.START, pack(learned, images))

    def start(self) -> tuple[Learned, np.ndarray]:
        """Return the set that was improved, in the form of the result. Raises LearnedError."""
        return self._read(self.START)

    def _read(self, name: str) -> tuple[Learned, np.ndarray]:
        try:
            return unpack(self.folder.read_bytes(name))
        except LearnedError as error:
            place = self.folder.full(name)
            raise LearnedError(
                f"{place} is damaged: {error}; pds-ray verify RUN --repair mends it"
            ) from error

    def save_history(self, history: pa.Table) -> None:
        self.folder.write_table(self.HISTORY, history)

    def history(self) -> pa.Table:
        """Return a row per iteration: iteration (int), and a column per loss (float)."""
        return self.folder.read_table(self.HISTORY)

    def save_captions(self, captions: pa.Table) -> None:
        self.folder.write_table(self.CAPTIONS, captions)

    def captions(self) -> pa.Table:
        """Return rows of LEARNED_CAPTION_SCHEMA, one per pair."""
        return self.folder.read_table(self.CAPTIONS)
