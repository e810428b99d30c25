"""A data set of the Hugging Face hub whose Parquet files include its images: `hf:ORG/NAME`.

Files are read from the cache where they are in it, and streamed from the hub where not. Their
versions are the hashes by which the hub knows them, and the same either way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pds_ray.config import FilesConfig
from pds_ray.errors import first_line
from pds_ray.sources.base import Fault, Sample, Shard, SourceError
from pds_ray.sources.parquet_rows import RowReader
from pds_ray.sources.shard_patterns import SHARD_SUFFIXES, shard_names
from pds_ray.sources.splits import find_split, find_splits, missing_parts
from pds_ray.telemetry import log

TIMEOUT_S = 10
FORM = "hf:ORG/NAME[@REVISION][:SPLIT]"
PROBE = 3
"""Files that are opened to see what columns there are, as long as none can be."""
_URI = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?(?::([\w.-]+))?")


@dataclass(frozen=True)
class _Repository:
    """The content of a data set at one commit."""

    commit: str
    files: dict[str, tuple[int, str]]
    """Path -> bytes, hash."""
    card: Mapping[str, Any]
    """The header of its card."""
    cached: bool
    """These are the files of the cache, which may not be all."""


class HubSource:
    """`hf:ORG/NAME[@REVISION][:SPLIT]`, by default the train split of the main revision.

    `sources.splits` says which files are of a split, `sources.parquet_rows` which columns are read.
    """

    def __init__(
        self,
        uri: str,
        options: FilesConfig | None = None,
        max_image_bytes: int = 64 * 1024**2,
    ) -> None:
        parts = _URI.fullmatch(uri)
        if parts is None:
            raise SourceError(f"{uri!r} is not {FORM}, such as hf:nlphuji/flickr30k:test")
        self.uri = uri
        self.name, self.revision, self.split = parts[1], parts[2], parts[3]
        self.rows = RowReader(options or FilesConfig(), max_image_bytes)

    @property
    def validation(self) -> str | None:
        """The validation split of the data set, unless this is it. Raises what `shards` raises."""
        split, splits = self._split()
        if find_split(splits, "validation") in ("", split):
            return None
        return f"hf:{self.name}{f'@{self.revision}' if self.revision else ''}:validation"

    def shards(self) -> list[Shard]:
        """Return the files of the split, each a shard.

        Raises SourceError in one line if neither the hub nor the cache has the data set, or if it
        has no such split, no Parquet files, or none with images and captions.
        """
        split, splits = self._split()
        repository = _look_up(self.name, self.revision)
        if repository.cached and (missing := missing_parts(splits[split])):
            raise SourceError(
                f"{self.uri}: {missing:,} of its files are not in the cache, and the hub cannot be "
                f"asked; fetch them with hf download {self.name} --repo-type dataset"
            )
        base = f"hf://datasets/{self.name}@{repository.commit}"
        names = shard_names([f"{base}/{path}" for path in splits[split]])
        sizes = (repository.files[path] for path in splits[split])
        shards = [
            Shard(name, location, size, version)
            for (location, name), (size, version) in zip(names.items(), sizes, strict=True)
        ]
        next(filter(None, (self.rows.check(self._place(each)) for each in shards[:PROBE])), None)
        return shards

    def read(self, shard: Shard) -> Iterator[Sample | Fault]:
        """Yield the samples and faults of a file, row by row. Raises what `RowReader.read` does."""
        return self.rows.read(self._place(shard))

    def _split(self) -> tuple[str, dict[str, list[str]]]:
        """Return the split that is meant, and the files of all."""
        paths = list(_look_up(self.name, self.revision).files)
        place = f"{self.name}@{self.revision}" if self.revision else self.name
        splits = find_splits(paths, _look_up(self.name, self.revision).card, place)
        if not splits:
            raise SourceError(f"{self.name} has no Parquet files; {_instead(self.name, paths)}")
        split = find_split(splits, self.split or "train")
        if not (split or self.split) and len(splits) == 1:
            split = next(iter(splits))
        if not split:
            wrong = f"no split {self.split}" if self.split else "several splits"
            raise SourceError(f"{self.name} has {wrong}; give one of {', '.join(splits)}: {FORM}")
        return split, splits

    def _place(self, shard: Shard) -> str:
        """Return the path of a file in the cache of this machine or, without it, its URI."""
        from huggingface_hub import try_to_load_from_cache

        commit, _, path = shard.location.partition("@")[2].partition("/")
        cached = try_to_load_from_cache(self.name, path, revision=commit, repo_type="dataset")
        return cached if isinstance(cached, str) else shard.location


def _instead(name: str, paths: list[str]) -> str:
    """Say how a data set is read that has no Parquet files."""
    tars = [path for path in paths if path.lower().endswith(SHARD_SUFFIXES)]
    if tars:
        folder = "".join(tars[0].rpartition("/")[:2])
        return f"its tar shards are hf://datasets/{name}/{folder}*.tar"
    return (
        f"fetch it with hf download {name} --repo-type dataset --local-dir FOLDER, and give "
        "folder:FOLDER if it has images and captions"
    )


@lru_cache(maxsize=8)  # one look per process; splits, shards and validation all need it
def _look_up(name: str, revision: str | None) -> _Repository:
    """Return what the hub has or, if it cannot be asked, the cache. Raises SourceError."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        info = HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S, files_metadata=True)
    # no network, no such data set, no permission or offline mode; the client's errors are many
    except Exception as error:
        refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
        if not refused:
            try:
                found = _look_in_cache(name, revision)
            except LocalEntryNotFoundError:
                pass
            else:
                if not isinstance(error, OfflineModeIsEnabled):
                    text = f"pds-ray: the hub cannot be asked; hf:{name} is taken from the cache"
                    log.event("hub_cache", text, "warning", name=name)
                return found
        raise SourceError(
            f"hf:{name} is not in the cache, and the hub does not give it ({first_line(error)}); "
            "check its name, and HF_TOKEN if it is private or gated"
        ) from error
    files = {
        each.rfilename: (each.size or 0, (each.lfs.sha256 if each.lfs else each.blob_id) or "")
        for each in info.siblings or ()
    }
    card = info.card_data.to_dict() if info.card_data else {}
    return _Repository(info.sha or revision or "main", files, card, cached=False)


def _look_in_cache(name: str, revision: str | None) -> _Repository:
    """Return what the cache has. Raises LocalEntryNotFoundError if that is nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.repocard import metadata_load

    folder = Path(
        snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True)
    )
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {  # a file of the cache is a link to one whose name is the hash
        path.relative_to(folder).as_posix(): (
            path.stat().st_size,
            os.path.realpath(path).rpartition("/")[2],
        )
        for path in paths
    }
    readme = folder / "README.md"
    card = metadata_load(readme) if readme.is_file() else {}
    return _Repository(folder.name, files, card or {}, cached=True)
