"""The embedding store: three tables and a commit marker per shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pds_ray.config import PRECISIONS
from pds_ray.errors import first_line
from pds_ray.store.schemas import MARKER_FIELDS, SHARD_SCHEMA, STORE_SCHEMA_VERSION
from pds_ray.store.sealed import sealed
from pds_ray.store.storage import Folder, StorageError, is_remote, side_by_side

ADVICE = "verify --repair makes it anew"


def write_shards(folder: Folder, name: str, shards: list[dict[str, Any]]) -> str:
    """Write shards, in order, as SHARD_SCHEMA has them; return the file's SHA-256."""
    return folder.write_table(name, pa.Table.from_pylist(shards, schema=SHARD_SCHEMA))


def read_shards(folder: Folder, name: str, advice: str) -> list[dict[str, Any]]:
    """Return what `write_shards` wrote, an empty list if it wrote nothing.

    Raises StorageError in one line that ends in `advice` if the file cannot be read.
    """
    if not folder.exists(name):
        return []
    try:
        return folder.read_table(name).cast(SHARD_SCHEMA).to_pylist()
    except (OSError, ValueError) as error:
        problem = f"{folder.full(name)} cannot be read ({first_line(error)}); {advice}"
        raise StorageError(problem) from error


@dataclass(frozen=True)
class EmbeddingStore:
    """The embeddings of one source by one encoder; several runs may share one."""

    folder: Folder
    fingerprint: str = ""
    """Hash of what the embeddings are made from; markers with another one are ignored."""

    IMAGES, CAPTIONS, ERRORS = ".images.parquet", ".captions.parquet", ".errors.parquet"
    MARKER = ".json"
    FAILED = ".failed"
    STORE = "store"
    SHARDS = "store.parquet"

    def begin(self, about: dict[str, Any], shards: list[dict[str, Any]]) -> None:
        """Write the shards that the store is begun with, then what it is made from."""
        listed = write_shards(self.folder, self.SHARDS, shards)
        made_from = {"fingerprint": self.fingerprint, **about}
        content = {"shards": len(shards), "shards_sha256": listed}
        self.folder.write_json(self.STORE, sealed(made_from | content))

    def about(self) -> dict[str, Any]:
        """Return what `begin` wrote, fingerprint included; empty if the store is not begun.

        A store of an earlier version has no shards_sha256. Raises StorageError in one line if the
        file is damaged.
        """
        if not self.folder.exists(self.STORE):
            return {}
        try:
            return dict(self.folder.read_json(self.STORE))
        except (ValueError, TypeError) as error:
            place = self.folder.full(self.STORE)
            problem = f"{place} cannot be read ({first_line(error)}); {ADVICE}"
            raise StorageError(problem) from error

    def shards(self) -> list[dict[str, Any]]:
        """Return the shards that the store was begun with, empty if that is not recorded.

        Raises StorageError in one line if the file cannot be read.
        """
        return read_shards(self.folder, self.SHARDS, ADVICE)

    @property
    def parts(self) -> Folder:
        """The parts of shards that are not committed yet."""
        return self.folder / "parts"

    @staticmethod
    def part_name(shard: str, first: int, table: str) -> str:
        """Return the name of one table of a part; `first` is the place of its first sample."""
        return f"{shard}.{first:09d}.{table}.parquet"

    def committed(self, step: Callable[[], object] = lambda: None) -> dict[str, dict[str, Any]]:
        """Return shard name -> marker (counts, hashes) of the committed shards.

        Corrupt markers and markers of another schema version are ignored. `step` is called after
        each marker.
        """
        found = {}
        for shard, marker in self._each(self.MARKER, self._marker):
            if marker.get("fingerprint") == self.fingerprint:
                found[shard] = marker
            step()
        return found

    def _each(
        self, suffix: str, read: Callable[[str], dict[str, Any]]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield shard name and `read(file name)` for every file with that suffix."""
        names = self.folder.names(suffix)
        found = (side_by_side if is_remote(self.folder.path) else map)(read, names)
        return zip((name.removesuffix(suffix) for name in names), found, strict=True)

    def marker(self, shard: str) -> dict[str, Any]:
        """Return a shard's marker of any fingerprint; empty if there is none."""
        return self._marker(shard + self.MARKER)

    def _marker(self, name: str) -> dict[str, Any]:
        """Return a marker; an empty one if it is corrupt or gone."""
        marker, shard = self._read(name), name.removesuffix(self.MARKER)
        valid = (
            all(isinstance(marker.get(field), kind) for field, kind in MARKER_FIELDS.items())
            and marker.get("schema") == STORE_SCHEMA_VERSION
            and marker["shard"] == shard
            and marker["precision"] in PRECISIONS
            and marker["sha256"].keys()
            == {shard + table for table in (self.IMAGES, self.CAPTIONS, self.ERRORS)}
        )
        return marker if valid else {}

    def _read(self, name: str) -> dict[str, Any]:
        """Return a JSON object; an empty one if it is corrupt, unreadable or gone."""
        try:
            found = self.folder.read_json(name)
        except (ValueError, OSError):
            return {}
        return found if isinstance(found, dict) else {}

    def images(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """Return the images of a shard, with the columns of `image_schema`."""
        return self.folder.read_table(shard + self.IMAGES, columns)

    def captions(self, shard: str, columns: list[str] | None = None) -> pa.Table:
        """Return the pairs of a shard, with the columns of `caption_schema`."""
        return self.folder.read_table(shard + self.CAPTIONS, columns)

    def errors(self, shard: str) -> pa.Table:
        """Return the bad samples of a shard, with the columns of `ERROR_SCHEMA`."""
        return self.folder.read_table(shard + self.ERRORS)

    def commit(
        self,
        shard: str,
        images: pa.Table,
        captions: pa.Table,
        errors: pa.Table,
        info: dict[str, Any],
    ) -> None:
        """Write the three files of a shard, then its marker, which commits it.

        `info` holds the counts and the precision, as in MARKER_FIELDS, and the "damage" of the
        shard's file and the "file" itself where they are to be known. The marker of an earlier
        commit is deleted first: no marker ever describes other files than those beside it.
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
        """Record why a shard could not be read."""
        self.folder.write_json(shard + self.FAILED, {"shard": shard, "problem": problem})

    def failed(self) -> dict[str, str]:
        """Return shard name -> why it could not be read. Corrupt records are ignored."""
        notes = self._each(self.FAILED, self._read)
        return {
            shard: note["problem"] for shard, note in notes if isinstance(note.get("problem"), str)
        }

    def forget(self, shard: str) -> None:
        """Delete a shard's marker and failure record, as if it had never been tried."""
        self.folder.delete(shard + self.MARKER)
        self.folder.delete(shard + self.FAILED)
