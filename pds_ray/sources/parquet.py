"""Image-caption samples in Parquet files that include their images: `parquet:PATTERN`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pds_ray.config import FilesConfig
from pds_ray.sources.base import Fault, MissingShardsError, Sample, Shard
from pds_ray.sources.parquet_rows import RowReader
from pds_ray.sources.shard_patterns import PARQUET, find_shards, shard_names

PROBE = 3
"""Files that are opened to see what columns there are, as long as none can be."""


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files, each a shard: those of Hugging Face, img2dataset's, any with images in them.

    PATTERN is one or more paths or URIs with wildcards, braces and lists, as for tar shards.
    `sources.parquet_rows` says which columns are read.
    """

    uri: str = field(repr=False)
    options: FilesConfig = field(default_factory=FilesConfig)
    max_image_bytes: int = 64 * 1024**2
    validation: None = None

    def shards(self) -> list[Shard]:
        """Return the files that exist, sorted by location.

        Raises SourceError if a pattern matches nothing (MissingShardsError, which holds the shards
        found, if it is one of several) or if there are no columns of images and captions.
        """
        found, missing = find_shards(self.uri.removeprefix("parquet:"), PARQUET)
        shards = [
            Shard(name, location, found[location].size or 0, str(found[location].mtime_ns))
            for location, name in shard_names(sorted(found)).items()
        ]
        next(filter(None, (self._rows.check(shard.location) for shard in shards[:PROBE])), None)
        if missing:
            raise MissingShardsError(missing, shards)
        return shards

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of a file, row by row. Raises what `RowReader.read` does."""
        return self._rows.read(shard.location)

    @property
    def _rows(self) -> RowReader:
        return RowReader(self.options, self.max_image_bytes)
