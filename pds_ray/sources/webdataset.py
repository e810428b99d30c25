"""Image-caption samples in tar shards, the WebDataset layout: `KEY.jpg`, `KEY.txt`, `KEY.json`.

A shard is read once, forwards, member by member (`sources.tar`); nothing is ever extracted to a
path. Memory holds two samples and a digest of every key of the shard. `sources.shard_patterns`
finds shards, `sources.samples` puts their files together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from pds_ray.config import FilesConfig
from pds_ray.sources.base import Fault, MissingShardsError, Sample, Shard
from pds_ray.sources.captions import IMAGE_SUFFIXES, CaptionReader, suffixes
from pds_ray.sources.listing import open_shard
from pds_ray.sources.samples import Files, read_samples
from pds_ray.sources.shard_patterns import find_shards, for_retrieval, shard_names
from pds_ray.sources.tar import TarReader

RETRIEVAL = " retrieval"
"""End of the version of shards whose folder says that each line of a .txt is a caption."""

_GONE = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass(frozen=True)
class WebDatasetSource:
    """Tar shards of image-caption samples.

    `uri` is one or more patterns, separated by white space or `::`. A pattern is a path or an
    object-store URI, in which `{a,b}` and `{00000..00041}` are spelled out and `*`, `?`, `[...]`,
    `**` match files that exist; `@FILE` reads patterns from a list, one per line, relative to that
    file. Settings of a store follow a `?`, as in `s3://bucket/*.tar?region=eu-west-1`; so a `?` in
    a remote pattern is never a wildcard.

    `sources.samples` says which files make a sample, `sources.captions` which of them hold
    captions and in what shapes.
    """

    uri: str = field(repr=False)
    options: FilesConfig = field(default_factory=FilesConfig)
    max_image_bytes: int = 64 * 1024**2
    max_text_bytes: int = 1024**2
    validation: None = None

    def shards(self) -> list[Shard]:
        """Return the shards that exist, sorted by location.

        Raises SourceError if a pattern matches nothing: MissingShardsError, which holds the shards
        found, if it is one of several.
        """
        found, missing = find_shards(self.uri)
        retrieval = for_retrieval(found)
        shards = []
        for location, name in shard_names(sorted(found)).items():
            version = f"{found[location].mtime_ns}{RETRIEVAL if location in retrieval else ''}"
            shards.append(Shard(name, location, found[location].size or 0, version))
        if missing:
            raise MissingShardsError(missing, shards)
        return shards

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of a shard, in stored order.

        A file that is gone or may not be read is a fault. Any other I/O failure (network, disk)
        says nothing about the data: it is raised, for the caller to try again.
        """
        try:
            stream = open_shard(shard.location)
        except _GONE as error:
            yield Fault("", "missing_shard", error.strerror or str(error))
            return
        each_line = self.options.caption_lines == "each" or (
            self.options.caption_lines == "auto" and shard.version.endswith(RETRIEVAL)
        )
        with stream:
            yield from read_samples(TarReader(stream), self.files, each_line)

    @property
    def files(self) -> Files:
        """The files of an archive that are looked at."""
        return Files(
            suffixes(self.options.image_suffixes, IMAGE_SUFFIXES),
            CaptionReader.of(self.options),
            self.max_image_bytes,
            self.max_text_bytes,
        )
