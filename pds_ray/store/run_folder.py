"""The data contract: every file of a run folder, its name, columns and meaning.

Every file that a run leaves is named in pds_ray/store; the evaluation's and comparison's are in
evaluation_folder.py, those of the portable result in distilled_set.py.

N images, M captions (one pair per caption), d embedding width, K clusters, B distilled pairs.

run.json, hashes/run.json
    configuration, versions, stage status, counts and times (see manifest.py), and a copy of it
heartbeat.json
    progress of the driver while one works (see heartbeat.py)
shards.parquet, one row per shard:
name, location (str), size (int64, null if not known), version (str)
    the shards that the run began with, in order
hashes/STAGE.json
    SHA-256 of each file that a finished stage left, by its name below the run folder; run.json has
    that of this file

embeddings/S.images.parquet, one row per image of shard S:
key (str), index (int32), embedding (bytes of f16/f32 [d], see `embedding_field`),
width, height (int32)
    raw, un-normalised CLIP image projections; index is the place in the shard
embeddings/S.captions.parquet, one row per pair of S:
key (str), image_row (int32), caption_index (int32), caption (str), embedding (as above),
similarity (f32)
    image_row points into S.images; similarity is the cosine to that image
embeddings/S.errors.parquet, one row per bad sample: key, reason, detail (str)
    reason is one of sources.base.REASONS
embeddings/S.json
    commit marker, written last: schema, fingerprint, counts, SHA-256 of the three files; of a shard
    whose file is damaged or not the one that the store began with, also that
embeddings/S.failed
    JSON: why shard S could not be read
embeddings/store, embeddings/store.parquet
    JSON: what the embeddings are made from, which guards their reuse (no shard can take its name);
    the shards that the store began with, as above
embeddings/parts/
    the parts of shards that are not committed yet

budget.json, of a run with a budget
    what was chosen for it, and what was measured to choose it (see stages/budget.py)
pruning/S.keep.parquet, one row per pair of S: kept (bool)
    in the row order of S.captions
clusters/image.safetensors, text.safetensors: centroids (f32 [K, d])
    k-means centroids in the clustered space; where cluster.modality is image or text, only that
    one
clusters/joint.safetensors: centroids (f32 [K, 2d])
    instead of the two, where cluster.modality is joint
clusters/fits.json
    what the folder was made from, and the figures of each finished k-means
clusters/S.labels.parquet, one row per pair of S: image_cluster, text_cluster (int32)
    -1 for pairs pruned away; equal unless cluster.modality is separate
matching/couples.parquet, one row per image cluster and the text cluster matched to it:
image_cluster, text_cluster (int32), shared (int64), pairless (bool), mean_cosine (f64)
    the assignment

whitening.safetensors: image_mean, text_mean (f32 [d]), image_matrix, text_matrix (f32 [d, d])
    of method coverage: the whitening of each modality

prototypes.parquet, B rows, see `prototype_schema`
    in the order of the distilled set
images/P.png, P.jpg or P.webp
    the decoded image of pair P
images/P.choice, choices.parquet, B rows, see `CHOICE_SCHEMA`
    only if images were scored (decode.candidates, decode.real_fallback): which one of pair P was
    kept, with its scores, first by itself as JSON, then of all pairs
captions.parquet, B rows, see `CHOSEN_CAPTION_SCHEMA`
    the caption that the distilled set gives each pair
experts/
    the experts of a method that optimises a set (see expert_store.py), unless runs share them
experts.json
    what the experts are made from, and the SHA-256 of each snapshot
start.safetensors, learned.safetensors, of methods that optimise a set
    the set that was improved and what became of it (see store/learned.py)
history.parquet, one row per iteration: iteration (int), a column per loss (float)
    `image` and `text` are the ratios of the two branches
learned/P.png, P.jpg or P.webp
    the learned image of pair P, cut to what a file can hold
optimisation.safetensors
    the state from which an optimisation goes on, while it is under way
learned_captions.parquet, B rows, see `LEARNED_CAPTION_SCHEMA`
    the real captions nearest to the learned text vectors
distilled/
    the portable result (see distilled_set.py)
report.html
    all of it as one page (report/page.py)

Pairs are numbered from 0 by falling prototype cosine. Real pairs that a selection chose are
numbered in the order of the picks, and their own embeddings are their prototypes. Everything but
run.json and its copy, report.html, and shards.parquet and the two files of embeddings/store, which
record versions of files, is a function of configuration, data and seed, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pds_ray.errors import first_line
from pds_ray.store.distilled_set import DISTILLED, PROTOTYPES
from pds_ray.store.distilled_set import MANIFEST as SET_MANIFEST
from pds_ray.store.embeddings import EmbeddingStore, read_shards, write_shards
from pds_ray.store.learned import LearningFiles
from pds_ray.store.row_groups import RowGroups
from pds_ray.store.schemas import (
    CHOICE_SCHEMA,
    KEEP_SCHEMA,
    LABEL_SCHEMA,
    PROTOTYPE_VECTORS,
    vectors,
)
from pds_ray.store.storage import Folder, StorageError, side_by_side
from pds_ray.store.tensors import Tensor

SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
"""Format of saved images -> suffix of their files."""
IMAGES, LEARNED_IMAGES = "images", "learned"
"""Names of the folders of images below the run folder."""


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    folder: Folder
    image_suffix: str = SUFFIXES["png"]
    """Suffix of its images."""
    image_folder: str = IMAGES
    """Name of the folder of its images: decoded, or learned."""

    MANIFEST, MANIFEST_COPY = "run.json", "hashes/run.json"
    HEARTBEAT = "heartbeat.json"
    SHARDS = "shards.parquet"
    REPORT = "report.html"
    COUPLES, PROTOTYPES = "matching/couples.parquet", "prototypes.parquet"
    CHOICES = "choices.parquet"
    CAPTIONS, SET_MANIFEST = "captions.parquet", f"{DISTILLED}/{SET_MANIFEST}"
    FITS = "fits.json"
    BUDGET = "budget.json"
    WHITENING = "whitening.safetensors"
    EXPERTS, OPTIMISATION = "experts.json", "optimisation.safetensors"

    def of_format(self, format: str) -> RunFolder:
        """Return the folder with images of a format, png while it is not chosen yet."""
        return replace(self, image_suffix=SUFFIXES.get(format, SUFFIXES["png"]))

    def of_learned(self) -> RunFolder:
        """Return the folder with the images that an optimisation left."""
        return replace(self, image_folder=LEARNED_IMAGES)

    def check_ours(self) -> None:
        """Raise StorageError if this is no run folder and a run would delete what lies in it."""
        if self.folder.exists(self.MANIFEST) or self.folder.exists(self.MANIFEST_COPY):
            return
        learned = self.of_learned().images
        for replaced in (self.distilled, self.images, self.clusters, learned):
            if not replaced.is_empty():
                raise StorageError(
                    f"{self.folder.shown} is no run folder, and a run would delete the "
                    f"{replaced.name} in it; give another --out"
                )

    def save_shards(self, shards: list[dict[str, Any]]) -> str:
        """Write the shards that the run begins with, in order; return the file's SHA-256."""
        return write_shards(self.folder, self.SHARDS, shards)

    def shards(self) -> list[dict[str, Any]]:
        """Return the shards that the run began with, an empty list if it has not begun.

        Raises StorageError in one line if the file cannot be read.
        """
        return read_shards(self.folder, self.SHARDS, "verify --repair makes it anew")

    def keep_files(self, shards: Iterable[str]) -> list[str]:
        """Return the names below the run folder of the keep masks of some shards."""
        return [f"pruning/{self.keep_name(shard)}" for shard in shards]

    def cluster_files(self, spaces: Iterable[str], shards: Iterable[str]) -> list[str]:
        """Return the names below the run folder of what clustering some spaces leaves."""
        centroids, labels = map(self.centroids_name, spaces), map(self.labels_name, shards)
        return [f"clusters/{name}" for name in (self.FITS, *centroids, *labels)]

    def image_files(self, pairs: int) -> list[str]:
        """Return the names below the run folder of the images of the first `pairs` pairs."""
        return [f"{self.image_folder}/{self.image_name(pair)}" for pair in range(pairs)]

    def sweep_beside(self, names: Iterable[str]) -> None:
        """Delete the temporary files that killed workers left beside files of these names."""
        for place in {name.rpartition("/")[0] for name in names} - {""}:
            (self.folder / place).sweep()

    def choice_files(self, pairs: int) -> list[str]:
        """Return the names below the run folder of what tells how images were chosen."""
        single = [f"{self.image_folder}/{self.choice_name(pair)}" for pair in range(pairs)]
        return [*single, self.CHOICES]

    def hash_files(
        self, names: list[str], step: Callable[[], object] = lambda: None
    ) -> dict[str, str]:
        """Return the SHA-256 of files by their names below the run folder.

        `step` is called after each file. The names are given, not listed, so that a lost file is
        noticed. Raises StorageError if one is missing.
        """
        try:
            found = {}
            for name, digest in zip(names, side_by_side(self.folder.sha256, names), strict=True):
                found[name] = digest
                step()
            return found
        except FileNotFoundError as error:
            raise StorageError(
                f"a file that was written is not there ({first_line(error)}); "
                "the same command continues"
            ) from error

    def save_hashes(self, stage: str, hashes: dict[str, str]) -> None:
        self.folder.write_json(self.hashes_name(stage), hashes)

    def hashes(self, stage: str) -> dict[str, str]:
        """Return the hashes of a stage's files from when it ended; empty if it never did."""
        name = self.hashes_name(stage)
        return self.folder.read_json(name) if self.folder.exists(name) else {}

    @property
    def embeddings(self) -> Folder:
        return self.folder / "embeddings"

    def store(self, elsewhere: str | None, fingerprint: str) -> EmbeddingStore:
        """Return the embedding store of the run: at `elsewhere` if several runs share one."""
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
        return self.folder / self.image_folder

    @property
    def distilled(self) -> Folder:
        return self.folder / DISTILLED

    @property
    def learning(self) -> LearningFiles:
        return LearningFiles(self.folder)

    @property
    def experts(self) -> Folder:
        return self.folder / "experts"

    def save_experts(self, used: dict[str, Any]) -> None:
        self.folder.write_json(self.EXPERTS, used)

    def save_budget(self, choice: dict[str, Any]) -> None:
        self.folder.write_json(self.BUDGET, choice)

    def budget(self) -> dict[str, Any]:
        """Return what was chosen for a budget, and what was measured to choose it."""
        return self.folder.read_json(self.BUDGET)

    def save_keep(self, shard: str, kept: np.ndarray) -> None:
        self.pruning.write_table(
            self.keep_name(shard), pa.table({"kept": kept}, schema=KEEP_SCHEMA)
        )

    def keep(self, shard: str) -> np.ndarray:
        """Return which pairs of the shard are kept, bool [pairs]."""
        return (
            self.pruning.read_table(self.keep_name(shard))
            .column("kept")
            .to_numpy(zero_copy_only=False)
        )

    def masked(self) -> set[str]:
        """Return the shards that have keep masks."""
        suffix = self.keep_name("")
        return {name.removesuffix(suffix) for name in self.pruning.names(suffix)}

    def delete_masks(self) -> None:
        """Delete the keep masks of all shards."""
        self.pruning.delete_each(map(self.keep_name, self.masked()))

    def save_centroids(self, space: str, centroids: np.ndarray) -> None:
        self.clusters.write_bytes(
            self.centroids_name(space), save_safetensors({"centroids": centroids})
        )

    def has_centroids(self, space: str) -> bool:
        return self.clusters.exists(self.centroids_name(space))

    def centroids(self, space: str) -> np.ndarray:
        """Return the centroids, float32 [K, d]; [K, 2d] for "joint"."""
        return load_safetensors(self.clusters.read_bytes(self.centroids_name(space)))["centroids"]

    def save_fits(self, fits: dict[str, Any]) -> None:
        self.clusters.write_json(self.FITS, fits)

    def fits(self) -> dict[str, Any]:
        """Return what `save_fits` wrote; empty if no fit has begun."""
        return self.clusters.read_json(self.FITS) if self.clusters.exists(self.FITS) else {}

    def save_labels(self, shard: str, image_cluster: np.ndarray, text_cluster: np.ndarray) -> None:
        table = pa.table(
            {"image_cluster": image_cluster, "text_cluster": text_cluster}, schema=LABEL_SCHEMA
        )
        self.clusters.write_table(self.labels_name(shard), table)

    def labelled(self) -> set[str]:
        """Return the shards that have labels."""
        suffix = self.labels_name("")
        return {name.removesuffix(suffix) for name in self.clusters.names(suffix)}

    def delete_labels(self) -> None:
        """Delete the labels of all shards."""
        self.clusters.delete_each(map(self.labels_name, self.labelled()))

    def labels(self, shard: str) -> tuple[np.ndarray, np.ndarray]:
        """Return image and text cluster of each pair of the shard, int32; -1 where pruned."""
        table = self.clusters.read_table(self.labels_name(shard))
        return table.column("image_cluster").to_numpy(), table.column("text_cluster").to_numpy()

    def save_couples(self, couples: pa.Table) -> None:
        self.folder.write_table(self.COUPLES, couples)

    def couples(self) -> pa.Table:
        return self.folder.read_table(self.COUPLES)

    def save_whitening(self, tensors: dict[str, np.ndarray]) -> None:
        self.folder.write_bytes(self.WHITENING, save_safetensors(tensors))

    def whitening(self) -> dict[str, np.ndarray]:
        """Return what `save_whitening` wrote."""
        return load_safetensors(self.folder.read_bytes(self.WHITENING))

    def save_prototypes(self, prototypes: pa.Table) -> None:
        self.folder.write_table(self.PROTOTYPES, prototypes)

    def prototypes(self, columns: list[str] | None = None) -> pa.Table:
        return self.folder.read_table(self.PROTOTYPES, columns)

    def pair_count(self) -> int:
        """Return the number of prototypes."""
        return self.prototypes(["pair"]).num_rows

    def prototype_facts(self) -> pa.Table:
        """Return what is known of the prototypes besides their vectors, which are large."""
        names = self.folder.table_schema(self.PROTOTYPES).names
        return self.prototypes([name for name in names if name not in PROTOTYPE_VECTORS])

    def prototype_vectors(self, modality: str) -> Tensor:
        """Return the vectors of the prototypes of a modality, float32 [pairs, d]."""
        column = f"{modality}_prototype"
        width = self.folder.table_schema(self.PROTOTYPES).field(column).type.list_size
        parts = self.prototype_parts([column])
        return Tensor((self.pair_count(), width), (vectors(part, column) for part in parts))

    def prototype_rows(self, columns: list[str]) -> RowGroups:
        """Return some columns of the prototypes, of which few rows are in memory at a time."""
        return RowGroups(self.folder, self.PROTOTYPES, columns)

    def prototype_parts(self, columns: list[str]) -> Iterator[pa.Table]:
        """Yield some columns of the prototypes, some rows at a time."""
        return self.folder.read_parts(self.PROTOTYPES, columns)

    def image_names(self) -> list[str]:
        """Return the names of the images that are decoded, in the order of pairs."""
        return self.images.names(self.image_suffix)

    def images_done(self, pairs: int, judged: bool) -> set[str]:
        """Return the names of the images that are there, with their choice if `judged`."""
        names = set(self.images.names())
        return {
            self.image_name(pair)
            for pair in range(pairs)
            if self.image_name(pair) in names and (not judged or self.choice_name(pair) in names)
        }

    def save_choice(self, choice: dict[str, Any]) -> None:
        """Write how an image was chosen, before the image itself."""
        self.images.write_json(self.choice_name(choice["pair"]), choice)

    def gather_choices(self, pairs: int) -> pa.Table:
        """Write choices.parquet from what `save_choice` wrote of the first `pairs` pairs."""
        names = map(self.choice_name, range(pairs))
        rows = list(side_by_side(self.images.read_json, names))
        choices = pa.Table.from_pylist(rows, schema=CHOICE_SCHEMA)
        self.folder.write_table(self.CHOICES, choices)
        return choices

    def choices(self) -> pa.Table:
        return self.folder.read_table(self.CHOICES)

    def save_captions(self, captions: pa.Table) -> None:
        self.folder.write_table(self.CAPTIONS, captions)

    def captions(self) -> pa.Table:
        return self.folder.read_table(self.CAPTIONS)

    @staticmethod
    def hashes_name(stage: str) -> str:
        return f"hashes/{stage}.json"

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
    def choice_name(pair: int) -> str:
        return f"{pair:06d}.choice"

    def image_name(self, pair: int) -> str:
        return f"{pair:06d}{self.image_suffix}"


def result_in(names: Set[str]) -> str:
    """Return what a folder with files of these names is, if it is a result, and "" if it is none.

    Two files tell it, as one alone may belong to somebody's image called run.
    """
    if names >= {RunFolder.MANIFEST, RunFolder.SHARDS}:
        return "the folder of a run"
    return "a distilled set" if names >= {SET_MANIFEST, PROTOTYPES} else ""
