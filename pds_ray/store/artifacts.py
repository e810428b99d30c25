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
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from pds_ray.config import PRECISIONS
from pds_ray.errors import first_line
from pds_ray.store.storage import Folder, StorageError, is_remote, side_by_side

STORE_SCHEMA_VERSION = (
    3  # 2: captions are embedded in contexts of their length; 3: embeddings as bytes
)
MODALITIES = ("image", "text")
MARKER_FIELDS = {  # what a commit marker says besides its fingerprint and the version of its files
    "shard": str,
    "images": int,
    "pairs": int,
    "bad": int,
    "reasons": dict,  # of the bad samples -> how many
    "precision": str,
    "sha256": dict,
}

SHARD_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("location", pa.string()),
        ("size", pa.int64()),
        ("version", pa.string()),
    ]
)
ERROR_SCHEMA = pa.schema([("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
KEEP_SCHEMA = pa.schema([("kept", pa.bool_())])
LABEL_SCHEMA = pa.schema([("image_cluster", pa.int32()), ("text_cluster", pa.int32())])
CHOSEN_CAPTION_SCHEMA = pa.schema(
    [
        ("pair", pa.int32()),
        ("caption", pa.string()),
        ("caption_shard", pa.string()),
        ("caption_key", pa.string()),
        (
            "caption_cosine",
            pa.float32(),
        ),  # to what it was chosen by: the picture, or the text prototype
    ]
)
COUPLE_SCHEMA = pa.schema(
    [
        ("image_cluster", pa.int32()),
        ("text_cluster", pa.int32()),
        ("shared", pa.int64()),
        ("pairless", pa.bool_()),
        ("mean_cosine", pa.float64()),
    ]
)


def embedding_field(dim: int, dtype: str) -> pa.Field:
    """A column of embeddings: the d numbers of each as bytes, little-endian; their dtype is in the field's metadata.

    Parquet reads and writes lists number by number, which takes longer than all that is done with the embeddings;
    prototypes, which are few, stay lists that others can read.
    """
    return pa.field(
        "embedding",
        pa.binary(dim * np.dtype(dtype).itemsize),
        nullable=False,
        metadata={"dtype": dtype},
    )


def image_schema(dim: int, dtype: str) -> pa.Schema:
    """Columns of S.images.parquet."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("index", pa.int32()),
            embedding_field(dim, dtype),
            ("width", pa.int32()),
            ("height", pa.int32()),
        ]
    )


def caption_schema(dim: int, dtype: str) -> pa.Schema:
    """Columns of S.captions.parquet."""
    return pa.schema(
        [
            ("key", pa.string()),
            ("image_row", pa.int32()),
            ("caption_index", pa.int32()),
            ("caption", pa.string()),
            embedding_field(dim, dtype),
            ("similarity", pa.float32()),
        ]
    )


def prototype_schema(dim: int) -> pa.Schema:
    """Columns of prototypes.parquet, one row per distilled pair."""
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            ("pair", pa.int32()),
            ("image_prototype", vector),
            ("text_prototype", vector),
            ("cosine", pa.float64()),  # between the two prototypes; the pairs fall in it
            ("image_cluster", pa.int32()),
            ("text_cluster", pa.int32()),
            (
                "shared",
                pa.int64(),
            ),  # pairs in both clusters: those averaged, if there are any and match.filter is on
            ("member_norm", pa.float64()),  # mean norm of the averaged image embeddings
            ("caption", pa.string()),  # retrieved: the caption nearest to the text prototype
            ("caption_shard", pa.string()),
            ("caption_key", pa.string()),
            ("caption_cosine", pa.float32()),
            ("nearest_shard", pa.string()),  # the real image nearest to the image prototype
            ("nearest_key", pa.string()),
            ("nearest_cosine", pa.float32()),
            (
                "members",
                pa.list_(pa.string()),
            ),  # up to MEMBER_SAMPLE of the averaged pairs, as shard/key
        ]
    )


MEMBER_SAMPLE = 8


def embeddings(table: pa.Table) -> np.ndarray:
    """The embeddings of a table with an `embedding_field`, float32 [rows, d]."""
    field, column = table.schema.field("embedding"), table.column("embedding")
    dtype = np.dtype(field.metadata[b"dtype"].decode()).newbyteorder("<")
    row_bytes = field.type.byte_width
    found = np.empty((len(column), row_bytes // dtype.itemsize), np.float32)
    done = 0
    for chunk in filter(len, column.chunks):
        data = np.frombuffer(
            chunk.buffers()[1], dtype, len(chunk) * found.shape[1], chunk.offset * row_bytes
        )
        found[done : done + len(chunk)] = data.reshape(len(chunk), -1)
        done += len(chunk)
    return found


def embedding_array(values: np.ndarray, dtype: str) -> pa.FixedSizeBinaryArray:
    """[rows, d] as what an `embedding_field` of that `dtype` holds."""
    data = np.ascontiguousarray(values, dtype=np.dtype(dtype).newbyteorder("<"))
    rows, dim = data.shape
    return pa.Array.from_buffers(pa.binary(dim * data.itemsize), rows, [None, pa.py_buffer(data)])


def vectors(table: pa.Table, column: str) -> np.ndarray:
    """A fixed-size-list column as float32 [rows, d]."""
    array = table.column(column).combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    width = array.type.list_size
    return np.asarray(array.flatten()).reshape(-1, width)


def vector_array(values: np.ndarray) -> pa.FixedSizeListArray:
    """[rows, d] as a fixed-size-list array of float32."""
    flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


@dataclass(frozen=True)
class EmbeddingStore:
    """The embeddings of one source by one encoder; several runs may share one."""

    folder: Folder
    fingerprint: str = ""
    """Of what the embeddings are made from; a marker with another one counts for nothing."""

    IMAGES, CAPTIONS, ERRORS, MARKER = (
        ".images.parquet",
        ".captions.parquet",
        ".errors.parquet",
        ".json",
    )
    FAILED = ".failed"
    STORE = "store"

    @property
    def parts(self) -> Folder:
        """Pieces of shards not yet committed."""
        return self.folder / "parts"

    def committed(self, told: Callable[[], object] = lambda: None) -> dict[str, dict[str, Any]]:
        """Shard name -> marker (counts, hashes) of the shards that are there.

        A damaged marker is none, nor is one of files as another version of pds-ray writes them.

        `told` is called after each marker.
        """
        found = {}
        for shard, marker in self._each(self.MARKER, self._marker):
            if marker.get("fingerprint") == self.fingerprint:
                found[shard] = marker
            told()
        return found

    def _each(
        self, suffix: str, read: Callable[[str], dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Shard name and what `read` makes of its file with that suffix, of all shards that have one."""
        names = self.folder.names(suffix)
        found = (side_by_side if is_remote(self.folder.path) else map)(read, names)
        return zip((name.removesuffix(suffix) for name in names), found, strict=True)

    def _marker(self, name: str) -> dict[str, Any]:
        """A marker, empty if it is damaged or gone."""
        marker, shard = self._read(name), name.removesuffix(self.MARKER)
        whole = (
            all(isinstance(marker.get(field), kind) for field, kind in MARKER_FIELDS.items())
            and marker.get("schema") == STORE_SCHEMA_VERSION
            and marker["shard"] == shard
            and marker["precision"] in PRECISIONS
            and marker["sha256"].keys()
            == {shard + table for table in (self.IMAGES, self.CAPTIONS, self.ERRORS)}
        )
        return marker if whole else {}

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON object, empty if it is damaged, cannot be read or is gone."""
        try:
            found = self.folder.read_json(name)
        except (ValueError, OSError):
            return {}
        return found if isinstance(found, dict) else {}

    def images(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        return self.folder.read_table(shard + self.IMAGES, columns)

    def captions(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        return self.folder.read_table(shard + self.CAPTIONS, columns)

    def errors(self, shard: str) -> pa.Table:
        return self.folder.read_table(shard + self.ERRORS)

    def commit(
        self,
        shard: str,
        images: pa.Table,
        captions: pa.Table,
        errors: pa.Table,
        info: dict[str, Any],
    ) -> None:
        """Writes a shard's three files, then its marker: from then on the shard is there.

        `info`: the counts and the precision, as in MARKER_FIELDS.

        One that was there is not, until it is whole again: no marker ever stands beside files that it does not mean.
        """
        self.folder.delete(shard + self.MARKER)
        hashes = {
            shard + self.IMAGES: self.folder.write_table(shard + self.IMAGES, images),
            shard + self.CAPTIONS: self.folder.write_table(shard + self.CAPTIONS, captions),
            shard + self.ERRORS: self.folder.write_table(shard + self.ERRORS, errors),
        }
        own = {"shard": shard, "schema": STORE_SCHEMA_VERSION, "fingerprint": self.fingerprint}
        marker = {**own, **info, "sha256": hashes}
        self.folder.write_json(shard + self.MARKER, marker)
        self.folder.delete(shard + self.FAILED)

    def fail(self, shard: str, problem: str) -> None:
        """Notes why a shard could not be read."""
        self.folder.write_json(shard + self.FAILED, {"shard": shard, "problem": problem})

    def failed(self) -> dict[str, str]:
        """Shard name -> why it could not be read. A damaged note is none."""
        notes = self._each(self.FAILED, self._read)
        return {
            shard: note["problem"] for shard, note in notes if isinstance(note.get("problem"), str)
        }

    def forget(self, shard: str) -> None:
        """Makes a shard look as if it had never been tried."""
        self.folder.delete(shard + self.MARKER)
        self.folder.delete(shard + self.FAILED)


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    folder: Folder

    MANIFEST = "run.json"
    HEARTBEAT = "heartbeat.json"  # there while a driver works
    SHARDS = "shards.parquet"

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

    def files(
        self, stage: str, shards: Iterable[str], spaces: Iterable[str], pairs: int
    ) -> list[str]:
        """The names below the run folder of all that a stage after embedding must leave.

        `shards` that are embedded, `spaces` that are clustered, `pairs` of the distilled set.
        """
        match stage:
            case "prune":
                return [f"pruning/{self.keep_name(shard)}" for shard in shards]
            case "cluster":
                centroids, labels = map(self.centroids_name, spaces), map(self.labels_name, shards)
                return [f"clusters/{name}" for name in ("fits.json", *centroids, *labels)]
            case "decode":
                return [f"images/{self.image_name(pair)}" for pair in range(pairs)]
        return [
            {
                "match": "matching/couples.parquet",
                "select": "prototypes.parquet",
                "prototypes": "prototypes.parquet",
                "caption": "captions.parquet",
                "materialize": "distilled/manifest.json",  # which promises the rest of the set
            }[stage]
        ]

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
