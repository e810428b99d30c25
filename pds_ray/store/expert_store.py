"""The expert store: images and captions made ready for training, and the weights of experts.

manifest.json
    JSON: what the experts are made from, which guards reuse; the widths of features and text
    vectors; the layout of both branches, for each of their tensors name, shape and offset
data/S.safetensors: images (u8 [n, 3, side, side]), text (f32 [m, t]), owner (i64 [m])
    images of shard S at training size, the vectors of their captions, and the image of each caption
data/S.parquet: caption (str)
    the captions of shard S, in the order of their vectors
data/S.json
    commit marker, written last: SHA-256 of the file, images, captions, bad samples by reason
features/S.safetensors: features (f32 [n, f]), and features/S.json
    only where the backbone is frozen: its features of the images of shard S, and their marker
experts/E/P.safetensors: BRANCH/NAME (f32), for each parameter that is trained
    snapshot: the weights of expert E after epoch P; 000 are those it started from
experts/E/manifest.json
    JSON: epoch, SHA-256 and loss of each snapshot, in order; a snapshot counts once it is here
experts/E/state.safetensors
    the state from which expert E goes on to its next epoch (see training/loop.py)

Branches are "image", of backbone and image head, and "text", of the text head. All but the states
is a function of configuration, data and seed, byte for byte on the same machine.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from safetensors.torch import load, save
from torch import Tensor

from pds_ray.errors import UserError, first_line
from pds_ray.store.flat import Layout, Snapshot
from pds_ray.store.storage import Folder, is_remote

MANIFEST, STATE = "manifest.json", "state.safetensors"
SUFFIX, MARKER, CAPTIONS = ".safetensors", ".json", ".parquet"
CAPTION_SCHEMA = pa.schema([("caption", pa.string())])


class ExpertStoreError(UserError, ValueError):
    """A folder of experts is of other experts, incomplete or damaged."""


def expert_name(number: int) -> str:
    """Return the name of the number-th expert."""
    return f"{number:03d}"


def snapshot_name(epoch: int) -> str:
    """Return the file name of the snapshot after an epoch, below its expert."""
    return f"{epoch:03d}{SUFFIX}"


@dataclass(frozen=True)
class ExpertStore:
    """The experts of one source, backbone, text encoder and training; several runs may share it."""

    folder: Folder

    @property
    def data(self) -> Folder:
        """The images and captions of each shard."""
        return self.folder / "data"

    @property
    def features(self) -> Folder:
        """The features of the frozen backbone, of each shard."""
        return self.folder / "features"

    def expert(self, name: str) -> Folder:
        """The snapshots of one expert."""
        return self.folder / f"experts/{name}"

    def begin(self, made_from: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        """Write what the experts are made from, and what is known of their weights."""
        self.folder.write_json(MANIFEST, {"made_from": dict(made_from), **about})

    def about(self) -> dict[str, Any]:
        """Return what `begin` wrote, with "made_from"; empty if no expert store is begun.

        Raises ExpertStoreError in one line if it cannot be read.
        """
        if not self.folder.exists(MANIFEST):
            return {}
        try:
            found = self.folder.read_json(MANIFEST)
            found["made_from"].items()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ExpertStoreError(
                f"{self.folder.full(MANIFEST)} is no manifest of experts, or a damaged one "
                f"({first_line(error)}); give another --experts.store"
            ) from error
        return found

    def check(self, made_from: Mapping[str, Any]) -> None:
        """Raise ExpertStoreError in one line if the store holds experts made from anything else."""
        found = self.about()
        before = found.get("made_from", made_from)
        for name in {**made_from, **before}:
            if before.get(name) != made_from.get(name):
                raise ExpertStoreError(
                    f"the experts in {self.folder.shown} are of another {name.replace('_', ' ')} "
                    f"({before.get(name)}, now {made_from.get(name)}); give another --experts.store"
                )

    def free_bytes(self) -> int | None:
        """Return the bytes that are free on the store's disk; None for an object store."""
        return None if is_remote(self.folder.path) else shutil.disk_usage(self.folder.path).free

    # ---- images, captions, features

    @staticmethod
    def commit(place: Folder, shard: str, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Write the tensors of a shard to `data` or `features`, then the marker, with `info`."""
        content = save({name: value.contiguous() for name, value in tensors.items()})
        place.write_bytes(shard + SUFFIX, content)
        marker = {**info, "sha256": hashlib.sha256(content).hexdigest()}
        place.write_json(shard + MARKER, marker)

    @staticmethod
    def committed(place: Folder) -> dict[str, dict[str, Any]]:
        """Return shard -> marker of the shards that `commit` wrote to `data` or `features`."""
        names = place.names(MARKER)
        return {name.removesuffix(MARKER): place.read_json(name) for name in names}

    @staticmethod
    def read(place: Folder, shard: str) -> dict[str, Tensor]:
        """Return the tensors that `commit` wrote.

        Raises ExpertStoreError in one line if the file is gone or damaged.
        """
        sha256 = place.read_json(shard + MARKER)["sha256"]
        advice = f"delete {place.shown}; the same command makes it again"
        return _verified(place, shard + SUFFIX, sha256, advice)

    def save_captions(self, shard: str, captions: list[str]) -> None:
        """Write the captions of a shard, before it is committed."""
        self.data.write_table(shard + CAPTIONS, pa.table({"caption": captions}, CAPTION_SCHEMA))

    def captions(self, shard: str) -> list[str]:
        """Return the captions of a shard, in the order of their vectors."""
        return self.data.read_table(shard + CAPTIONS).column("caption").to_pylist()

    # ---- experts

    def snapshots(self, name: str) -> list[dict[str, Any]]:
        """Return epoch, SHA-256 and loss of each snapshot of an expert; empty if it has none.

        Raises ExpertStoreError in one line if their list is damaged.
        """
        place = self.expert(name)
        try:
            return list(place.read_json(MANIFEST)["snapshots"]) if place.exists(MANIFEST) else []
        except (ValueError, KeyError, TypeError) as error:
            raise ExpertStoreError(
                f"{place.full(MANIFEST)} is damaged ({first_line(error)}); delete {place.shown}; "
                "the same command trains the expert again"
            ) from error

    def epochs(self, name: str) -> int:
        """Return the epochs of which an expert has snapshots; -1 if it has none at all."""
        return len(self.snapshots(name)) - 1

    def save_snapshot(self, name: str, epoch: int, layout: Layout, snapshot: Snapshot) -> str:
        """Write a snapshot, which does not count yet; return its SHA-256."""
        content = save({name: part.clone() for name, part in _named(layout, snapshot).items()})
        self.expert(name).write_bytes(snapshot_name(epoch), content)
        return hashlib.sha256(content).hexdigest()

    def save_snapshots(self, name: str, snapshots: Sequence[Mapping[str, Any]]) -> None:
        """Write epoch, SHA-256 and loss of the snapshots of an expert that count."""
        self.expert(name).write_json(MANIFEST, {"snapshots": list(snapshots)})

    def layout(self) -> Layout:
        """Return which part of the flat vectors of a snapshot is which tensor."""
        return Layout.from_json(self.about()["layout"])

    def snapshot(self, name: str, epoch: int, layout: Layout) -> Snapshot:
        """Return the weights of an expert after an epoch, float32.

        Raises ExpertStoreError in one line if they are not there, damaged, or of another layout.
        """
        place, file, known = self.expert(name), snapshot_name(epoch), self.snapshots(name)
        if epoch >= len(known):
            raise ExpertStoreError(
                f"expert {name} in {self.folder.shown} has no snapshot of epoch {epoch}; "
                "`pds-ray experts` makes it"
            )
        advice = f"delete {place.shown}; the same command trains the expert again"
        tensors = _verified(place, file, known[epoch]["sha256"], advice)
        flat = Snapshot(*map(torch.empty, layout.sizes))
        views = _named(layout, flat)
        if {key: t.shape for key, t in tensors.items()} != {k: v.shape for k, v in views.items()}:
            raise ExpertStoreError(
                f"{place.full(file)} has tensors of other names or shapes than the manifest says; "
                + advice
            )
        for key, view in views.items():
            view.copy_(tensors[key])
        return flat

    def save_state(self, name: str, state: bytes) -> None:
        self.expert(name).write_bytes(STATE, state)

    def state(self, name: str) -> bytes:
        """Return the state of an expert; empty if it has none."""
        place = self.expert(name)
        return place.read_bytes(STATE) if place.exists(STATE) else b""

    def require(self, count: int, epochs: int) -> None:
        """Raise ExpertStoreError in one line unless `count` experts have all files of `epochs`."""
        for name in map(expert_name, range(count)):
            there = set(self.expert(name).names(SUFFIX))
            lost = [file for file in map(snapshot_name, range(epochs + 1)) if file not in there]
            known = self.epochs(name)
            if known >= epochs and lost:
                raise ExpertStoreError(
                    f"{self.expert(name).full(lost[0])} is missing; delete "
                    f"{self.expert(name).shown}; the same command trains the expert again"
                )
            if known < epochs:
                raise ExpertStoreError(
                    f"{count} experts of {epochs} epochs are asked for, but {self.folder.shown} "
                    f"has {max(known, 0)} epochs of expert {name}; `pds-ray experts` makes the "
                    "others, or lower --experts.count or --experts.epochs"
                )


@dataclass(frozen=True)
class StoredExperts:
    """Experts of a store: the first `count` of them, up to an epoch. Opened by `open_experts`."""

    store: ExpertStore
    count: int
    epochs: int

    @property
    def names(self) -> list[str]:
        """The names of the experts, in order."""
        return list(map(expert_name, range(self.count)))

    @cached_property
    def layout(self) -> Layout:
        """The tensors of the flat vectors."""
        return self.store.layout()

    def snapshot(self, expert: str, epoch: int) -> Snapshot:
        """Return the weights of one expert after some epochs. Raises ExpertStoreError."""
        return self.store.snapshot(expert, epoch, self.layout)


def open_experts(store: ExpertStore, count: int, epochs: int) -> StoredExperts:
    """Return experts of a store that is complete. Raises what `ExpertStore.require` raises."""
    store.require(count, epochs)
    return StoredExperts(store, count, epochs)


def _named(layout: Layout, snapshot: Snapshot) -> dict[str, Tensor]:
    """Return BRANCH/NAME -> view of a snapshot's flat vectors."""
    pairs = (("image", layout.image, snapshot.theta), ("text", layout.text, snapshot.phi))
    return {f"{b}/{e.name}": e.view(flat) for b, entries, flat in pairs for e in entries}


def _verified(place: Folder, name: str, sha256: str, advice: str) -> dict[str, Tensor]:
    """Return the tensors of a file. Raises ExpertStoreError if it is gone or of another hash."""
    try:
        content = place.read_bytes(name)
    except FileNotFoundError as error:
        raise ExpertStoreError(f"{place.full(name)} is missing; {advice}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ExpertStoreError(f"{place.full(name)} is damaged: its hash is another one; {advice}")
    return load(content)
