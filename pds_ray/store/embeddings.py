"""The store of embeddings: three tables and a commit marker per shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pds_ray.config import PRECISIONS
from pds_ray.store.schemas import MARKER_FIELDS, STORE_SCHEMA_VERSION
from pds_ray.store.storage import Folder, is_remote, side_by_side


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
