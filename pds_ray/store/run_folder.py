"""The data contract: every file of a run folder, its name, columns and meaning. No other module names a file.

N images, M captions (one pair per caption), d embedding width, K clusters, B distilled pairs.

| file | rows | columns (dtype) | meaning |
| --- | --- | --- | --- |
| `run.json` | | | configuration, versions, stage status, counts, timings (see manifest.py) |
| `shards.parquet` | shards | name, location (str), size (int64, null: not known), version (str) | the shards that the run began with, in order |
| `embeddings/store` | | | JSON: what the embeddings were made from; guards reuse (no shard can take its name) |
| `embeddings/S.images.parquet` | images of shard S | key (str), index (int32), embedding (bytes of f16/f32 [d], see `embedding_field`), width, height (int32) | raw, un-normalised CLIP image projections; index is the place in the shard |
| `embeddings/S.captions.parquet` | pairs of shard S | key, image_row (int32), caption_index (int32), caption (str), embedding (as there), similarity (f32) | image_row points into S.images; similarity is the cosine to that image |
| `embeddings/S.errors.parquet` | bad samples | key, reason, detail (str) | reason is one of sources.base.REASONS |
| `embeddings/S.json` | | | commit marker, written last: schema, fingerprint, counts, SHA-256 of the three files |
| `pruning/S.keep.parquet` | pairs of S | kept (bool) | in the row order of S.captions |
| `clusters/image.safetensors`, `text.safetensors` | | centroids (f32 [K, d]) | k-means centroids in the clustered space; where cluster.modality is image or text, that one alone. Of a two-level fit also coarse (f32 [C, d]) and starts (int64 [C + 1]): cell c holds the centroids starts[c] to starts[c + 1] |
| `clusters/joint.safetensors` | | centroids (f32 [K, 2d]) | where cluster.modality is joint, instead of the two |
| `clusters/fits.json` | | | what the folder was made from, and what is to be told of each k-means that is finished |
| `clusters/S.labels.parquet` | pairs of S | image_cluster, text_cluster (int32) | -1 for pairs pruned away; equal unless cluster.modality is separate |
| `matching/couples.parquet` | couples | image_cluster, text_cluster (int32), shared (int64), pairless (bool), mean_cosine (f64) | the assignment |
| `prototypes.parquet` | B | see `prototype_schema` | in the order of the distilled set |
| `captions.parquet` | B | see `CHOSEN_CAPTION_SCHEMA` | the caption that the distilled set gives each pair |
| `images/P.png` | | | the decoded picture of pair P |
| `distilled/` | | | the portable result (stages/materialize.py) |
| `report.html` | | | all of it as one page (report/page.py) |

Pairs are numbered from 0 in the order of falling prototype cosine; real pairs that a method other than pds chose, in the
order of the picks, their own embeddings being their prototypes. Everything but run.json, report.html and shards.parquet (which
tells versions of files) is a function of configuration, data and seed, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pds_ray.errors import first_line
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.schemas import KEEP_SCHEMA, LABEL_SCHEMA, SHARD_SCHEMA
from pds_ray.store.storage import Folder, StorageError, is_remote, side_by_side


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    folder: Folder

    MANIFEST = "run.json"
    HEARTBEAT = "heartbeat.json"  # there while a driver works
    SHARDS = "shards.parquet"
    COUPLES, PROTOTYPES = "matching/couples.parquet", "prototypes.parquet"
    CAPTIONS, SET_MANIFEST = "captions.parquet", "distilled/manifest.json"

    def save_shards(self, shards: list[dict[str, Any]]) -> str:
        """The shards that the run begins with, in order. Returns the SHA-256 of the file."""
        return self.folder.write_table(
            self.SHARDS, pa.Table.from_pylist(shards, schema=SHARD_SCHEMA)
        )

    def shards(self) -> list[dict[str, Any]]:
        """Those that the run began with; none if it has not. Raises StorageError in one line if they cannot be read."""
        if not self.folder.exists(self.SHARDS):
            return []
        try:
            return self.folder.read_table(self.SHARDS).cast(SHARD_SCHEMA).to_pylist()
        except (OSError, ValueError) as error:
            place = self.folder.full(self.SHARDS)
            raise StorageError(
                f"{place} cannot be read ({first_line(error)}); verify --repair makes it anew"
            ) from error

    def keep_files(self, shards: Iterable[str]) -> list[str]:
        """Return the names below the run folder of the keep masks of some shards."""
        return [f"pruning/{self.keep_name(shard)}" for shard in shards]

    def cluster_files(self, spaces: Iterable[str], shards: Iterable[str]) -> list[str]:
        """Return the names below the run folder of what clustering some spaces leaves."""
        centroids, labels = map(self.centroids_name, spaces), map(self.labels_name, shards)
        return [f"clusters/{name}" for name in ("fits.json", *centroids, *labels)]

    def image_files(self, pairs: int) -> list[str]:
        """Return the names below the run folder of the images of the first `pairs` pairs."""
        return [f"images/{self.image_name(pair)}" for pair in range(pairs)]

    def hash_files(
        self, names: list[str], told: Callable[[], object] = lambda: None
    ) -> dict[str, str]:
        """SHA-256 of files by their names below the run folder; parts that killed workers left beside them go.

        `told` is called after each.

        The names are not those that a store lists: it may list one late. Raises StorageError if one is not there.
        """
        for place in {name.rpartition("/")[0] for name in names} - {""}:
            (self.folder / place).sweep()
        try:
            found = {}
            for name, digest in zip(names, side_by_side(self.folder.sha256, names), strict=True):
                found[name] = digest
                told()
            return found
        except FileNotFoundError as error:
            raise StorageError(
                f"a file that was written is not there ({first_line(error)}); the same command continues"
            ) from error

    def save_hashes(self, stage: str, hashes: dict[str, str]) -> None:
        (self.folder / "hashes").write_json(f"{stage}.json", hashes)

    def hashes(self, stage: str) -> dict[str, str]:
        """Those of the stage's files when it ended; none if it never did."""
        folder = self.folder / "hashes"
        return folder.read_json(f"{stage}.json") if folder.exists(f"{stage}.json") else {}

    @property
    def embeddings(self) -> Folder:
        return self.folder / "embeddings"

    def store(self, elsewhere: str | None, fingerprint: str) -> EmbeddingStore:
        """The embedding store of the run; `elsewhere` if it is one that several runs share."""
        return EmbeddingStore(Folder(elsewhere) if elsewhere else self.embeddings, fingerprint)

    @property
    def pruning(self) -> Folder:
        return self.folder / "pruning"

    @property
    def clusters(self) -> Folder:
        return self.folder / "clusters"

    @property
    def matching(self) -> Folder:
        return self.folder / "matching"

    @property
    def images(self) -> Folder:
        return self.folder / "images"

    @property
    def distilled(self) -> Folder:
        return self.folder / "distilled"

    def save_keep(self, shard: str, kept: np.ndarray) -> None:
        self.pruning.write_table(
            self.keep_name(shard), pa.table({"kept": kept}, schema=KEEP_SCHEMA)
        )

    def keep(self, shard: str) -> np.ndarray:
        """bool [pairs of the shard]."""
        return (
            self.pruning.read_table(self.keep_name(shard))
            .column("kept")
            .to_numpy(zero_copy_only=False)
        )

    def save_centroids(self, space: str, centroids: np.ndarray, **cells: np.ndarray) -> None:
        """`cells`: coarse and starts of a two-level fit."""
        self.clusters.write_bytes(
            self.centroids_name(space), save_safetensors({"centroids": centroids, **cells})
        )

    def has_centroids(self, space: str) -> bool:
        return self.clusters.exists(self.centroids_name(space))

    def centroids(self, space: str) -> np.ndarray:
        """float32 [K, d], of "joint" [K, 2d]."""
        return load_safetensors(self.clusters.read_bytes(self.centroids_name(space)))["centroids"]

    def cells(self, space: str) -> dict[str, np.ndarray]:
        """coarse and starts of a two-level fit, nothing of a flat one."""
        tensors = load_safetensors(self.clusters.read_bytes(self.centroids_name(space)))
        return {name: tensor for name, tensor in tensors.items() if name != "centroids"}

    def cell_samples(self, space: str) -> Folder:
        """While a two-level fit is made: the training vectors of each coarse cell."""
        return self.clusters / f"{space}.cells"

    def save_cell_sample(
        self, space: str, cell: int, vectors: np.ndarray, weights: np.ndarray
    ) -> None:
        tensors = {"vectors": vectors, "weights": weights}
        self.cell_samples(space).write_bytes(f"{cell:06d}.safetensors", save_safetensors(tensors))

    def cell_sample(self, space: str, cell: int) -> tuple[np.ndarray, np.ndarray]:
        """float32 [n, d], float32 [n]."""
        tensors = load_safetensors(self.cell_samples(space).read_bytes(f"{cell:06d}.safetensors"))
        return tensors["vectors"], tensors["weights"]

    def save_fits(self, fits: dict[str, Any]) -> None:
        self.clusters.write_json("fits.json", fits)

    def fits(self) -> dict[str, Any]:
        """Empty if nothing was begun."""
        return self.clusters.read_json("fits.json") if self.clusters.exists("fits.json") else {}

    def save_labels(self, shard: str, image_cluster: np.ndarray, text_cluster: np.ndarray) -> None:
        table = pa.table(
            {"image_cluster": image_cluster, "text_cluster": text_cluster}, schema=LABEL_SCHEMA
        )
        self.clusters.write_table(self.labels_name(shard), table)

    def labelled(self) -> set[str]:
        """The shards whose labels are there."""
        suffix = self.labels_name("")
        return {name.removesuffix(suffix) for name in self.clusters.names(suffix)}

    def delete_labels(self, shards: Iterable[str]) -> None:
        """Also those that a store does not list yet, and would list later."""
        self.clusters.delete_each(map(self.labels_name, shards))

    def labels(self, shard: str) -> tuple[np.ndarray, np.ndarray]:
        """Image and text cluster of each pair of the shard, int32, -1 where pruned."""
        table = self.clusters.read_table(self.labels_name(shard))
        return table.column("image_cluster").to_numpy(), table.column("text_cluster").to_numpy()

    def save_couples(self, couples: pa.Table) -> None:
        self.matching.write_table("couples.parquet", couples)

    def couples(self) -> pa.Table:
        return self.matching.read_table("couples.parquet")

    def save_prototypes(self, prototypes: pa.Table) -> None:
        self.folder.write_table("prototypes.parquet", prototypes)

    def prototypes(self) -> pa.Table:
        return self.folder.read_table("prototypes.parquet")

    def delete_images(self, pairs: int) -> None:
        """All pictures; also those that a store does not list yet, of as many pairs as there are now."""
        self.images.delete_all()
        if is_remote(self.images.path):
            self.images.delete_each(map(self.image_name, range(pairs)))

    def save_captions(self, captions: pa.Table) -> None:
        self.folder.write_table("captions.parquet", captions)

    def captions(self) -> pa.Table:
        return self.folder.read_table("captions.parquet")

    @staticmethod
    def keep_name(shard: str) -> str:
        return f"{shard}.keep.parquet"

    @staticmethod
    def centroids_name(space: str) -> str:
        return f"{space}.safetensors"

    @staticmethod
    def labels_name(shard: str) -> str:
        return f"{shard}.labels.parquet"

    @staticmethod
    def image_name(pair: int) -> str:
        return f"{pair:06d}.png"
