"""The interface of a data source: shards to read, and the samples or faults found in them.

A source knows where image-caption samples come from and nothing of what is done with them. It hands
out *encoded* image bytes; `modalities.image` decodes them, so that one broken image costs one
sample.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from pds_ray.errors import UserError
from pds_ray.store.storage import StorageError

CAPTION_LINES = "lines"
"""Note on a sample with a text of several lines that was read as one caption."""

READ_RETRY_WAITS_S = (1.0, 5.0, 25.0)


class SourceError(UserError, ValueError):
    """The source as a whole cannot be used: nothing matches, a file is missing."""


class MissingShardsError(SourceError):
    """Some shards that the source names are not there."""

    def __init__(self, message: str, found: Iterable[Shard] = ()) -> None:
        super().__init__(message)
        self.found = list(found)
        """The shards that are there."""


@dataclass(frozen=True)
class Shard:
    """The unit of reading, retry, commit and progress."""

    name: str
    """Unique in its source, made of letters, digits, '.', '_' and '-': files are named after it."""
    location: str = field(repr=False)
    """A path, a URI or a range of rows, by which `Source.read` finds it."""
    size: int = 0
    """Bytes for files, samples otherwise; 0 if unknown."""
    version: str = ""
    """A seed, a digest or a time that the content depends on.

    Name, size and version make the source's fingerprint; the location does not, so that data may
    move.
    """


@dataclass(frozen=True)
class Sample:
    """One image with its captions, as the source has it. (shard, key) is unique in the data set."""

    key: str
    image: bytes
    """Encoded image, in one of `modalities.image.FORMATS`."""
    captions: tuple[str, ...]
    """At least one, not blank, not yet cleaned."""
    notes: tuple[str, ...] = field(default=(), compare=False)
    """CAPTION_LINES, and encodings of captions other than UTF-8."""


@dataclass(frozen=True)
class Fault:
    """One sample, or the rest of one shard, that could not be used."""

    key: str
    reason: str
    """One of `REASONS`."""
    detail: str


REASONS = (
    "not_a_tar",  # the shard is not a tar at all; key is ""
    "not_a_parquet",  # nor a Parquet file with images and captions; key is ""
    "truncated_shard",  # damaged or cut, all before that was read; key: sample cut, or ""
    "missing_shard",  # listed, but gone or unreadable when it was opened; key is ""
    "missing_image",  # no file with a suffix of images, or the file is not there
    "missing_caption",  # no caption file gives a caption that is not blank
    "duplicate_key",  # a second sample under a key already seen in this shard
    "unsafe_member",  # absolute path, '..', link or device: never followed, never written
    "member_too_large",  # a member larger than the limit; not read
    "undecodable_image",  # bytes that no decoder takes, or cut off
    "image_too_large",  # declares more pixels than the limit; never decoded
    "image_too_small",  # a side below the limit
    "nonfinite_embedding",  # the encoder gave NaN or infinity
    "crashed_process",  # decoding or encoding it ended the process, each time
    "timed_out",  # decoding it took longer than the limit
    "out_of_memory",  # decoding it took more memory than the limit
)
"""The closed list of reasons for which a sample is kept out; a summary counts by these."""

SHARD_ENDS = ("not_a_tar", "not_a_parquet", "truncated_shard")
"""Reasons that stand for the rest of a shard, whatever it held."""

RETRYABLE = ("crashed_process", "timed_out", "out_of_memory")
"""Reasons that may not hold on another machine or another day."""


class Source(Protocol):
    """A data set of image-caption samples, cut in shards.

    Instances pickle: they travel to Ray workers.
    """

    uri: str
    validation: str | None
    """URI of the validation split that belongs to this one, if the source knows one."""

    def shards(self) -> list[Shard]:
        """Return every shard, in a stable order. Raises SourceError if there is none."""
        ...

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Yield a shard's samples and faults in stored order. Never raises for bad data."""
        ...


def read_shard(source: Source, shard: Shard) -> Iterator[Sample | Fault]:
    """Yield what `source.read` yields for a shard that must be there.

    A disk that fails is read again, as it says nothing about the data; object stores are asked
    again where they are read (`streams.open_stream`). Raises SourceError naming the shard if it is
    gone or cannot be read to its end.
    """
    done = 0
    for wait_s in (*READ_RETRY_WAITS_S, None):
        try:
            for item in islice(source.read(shard), done, None):
                if isinstance(item, Fault) and item.reason == "missing_shard":
                    # a whole shard, not one bad sample: as a fault it would never be tried again
                    raise SourceError(
                        f"shard {shard.name} was listed but cannot be opened where it is read "
                        f"({item.detail}); every node must see the source"
                    )
                yield item
                done += 1
            return
        except (OSError, StorageError) as error:
            if wait_s is None or isinstance(error, StorageError):
                # of a store, which does not know that the run may go on without the shard
                why = str(error).removesuffix("; the same command continues")
                raise SourceError(f"cannot read shard {shard.name}: {why}") from error
            time.sleep(wait_s)
