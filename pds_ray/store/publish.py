"""Publishing a distilled set as a data set of the Hugging Face hub, in one commit."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pds_ray.errors import ConfigError, UserError, first_line
from pds_ray.store.distilled_set import CARD, IMAGES, MANIFEST, load_distilled
from pds_ray.store.export import export, files_of_export
from pds_ray.store.storage import Folder
from pds_ray.telemetry import log

if TYPE_CHECKING:  # it costs a quarter of a second
    from huggingface_hub import HfApi

KIND = "dataset"
"""The hub's name for a repository of data."""
TIMEOUT_S = 10
FILES_PER_FOLDER = 10_000
"""Maximum that the hub takes."""
OFTEN_THERE = {CARD, ".gitattributes"}
"""Files of a data set that somebody made on the hub and did not fill."""

_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)")


class PublishError(UserError):
    """The hub cannot be reached, or refuses."""


@dataclass(frozen=True)
class _Place:
    """A data set of the hub and a branch of it."""

    name: str
    branch: str | None
    """None for the main one."""

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        branch = f"/tree/{self.branch}" if self.branch else ""
        return f"{constants.ENDPOINT}/datasets/{self.name}{branch}"


def push(
    path: str,
    to: str,
    format: str = "parquet",
    private: bool = False,
    revision: str | None = None,
    dry_run: bool = False,
) -> tuple[str, dict[str, int]]:
    """Publish a distilled set as `to`, hf:ORG/NAME; return its URL and the bytes of each file.

    It is exported in the format `format` into a temporary folder and uploaded from there, in one
    commit to the branch `revision`. What an earlier push left there is replaced. With `dry_run` the
    hub is asked nothing.

    Raises ConfigError or PublishError in one line, and what `export` raises.
    """
    found = _NAME.fullmatch(to)
    if found is None:
        raise ConfigError(f"push to {to!r}? give hf:ORG/NAME, such as hf:my-group/my-pairs")
    place = _Place(found[1], revision)
    # before the hub is asked and anything is written; the metadata are one file more
    if len(load_distilled(path)) >= FILES_PER_FOLDER and format == IMAGES:
        raise ConfigError(
            f"the hub takes {FILES_PER_FOLDER:,} files per folder, this set has more; "
            "give --format parquet"
        )
    earlier = set() if dry_run else _earlier_push(place, private)
    with tempfile.TemporaryDirectory(prefix="pds-ray-push-") as folder:
        files = export(path, format, folder, place=place.name)["files"]
        sizes = {name: file["bytes"] for name, file in files.items()}
        sizes[MANIFEST] = Path(folder, MANIFEST).stat().st_size
        if not dry_run:
            size = f"{len(sizes):,} files, {sum(sizes.values()):,} bytes"
            log.event("uploading", f"pds-ray: uploading {size}", to=place.url, bytes=sizes)
            _upload(place, private, Path(folder), set(sizes), earlier - set(sizes))
    return place.url, sizes


@contextmanager
def _hub(place: _Place) -> Iterator[HfApi]:
    """Yield the hub's client; turn what it and the network raise into PublishErrors."""
    import huggingface_hub
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    what = f"cannot push to hf:{place.name}"
    try:
        yield huggingface_hub.HfApi()
    except LocalTokenNotFoundError as error:
        raise PublishError(
            f"{what}: there is no token of the hub; `hf auth login` keeps one, HF_TOKEN gives one, "
            "and --dry-run needs none"
        ) from error
    except OfflineModeIsEnabled as error:
        raise PublishError(f"{what}: HF_HUB_OFFLINE is set; unset it, or give --dry-run") from error
    except UserError:
        raise
    # the client raises errors of its own, of its HTTP library, and plain ValueErrors
    except Exception as error:
        raise PublishError(
            f"{what}: {first_line(error)}; check the network, HF_ENDPOINT, and that your token may "
            "write there"
        ) from error


def _earlier_push(place: _Place, private: bool) -> set[str]:
    """Return the files of an earlier push to the place; none if it is empty or not there yet.

    Raises PublishError if the hub cannot be used, or the place holds anything else.
    """
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with _hub(place) as api:
        api.whoami()
        branch = place.branch
        try:
            info = api.dataset_info(place.name, revision=branch, timeout=TIMEOUT_S)
        except RevisionNotFoundError:  # a new branch begins with what the main one has
            branch = None
            info = api.dataset_info(place.name, timeout=TIMEOUT_S)
        except RepositoryNotFoundError:
            return set()
        there = {file.rfilename for file in info.siblings or ()}
        pushed = _files_of_push(api, place.name, branch) if MANIFEST in there else set()
    if private and not info.private:
        raise PublishError(f"hf:{place.name} is public; make it private on the hub first")
    if not pushed and (others := sorted(there - OFTEN_THERE)):
        raise PublishError(
            f"hf:{place.name} holds {others[0]}, and no push wrote it; give another name"
        )
    return pushed & there


def _files_of_push(api: HfApi, name: str, branch: str | None) -> set[str]:
    with tempfile.TemporaryDirectory(prefix="pds-ray-push-") as folder:
        api.hf_hub_download(name, MANIFEST, repo_type=KIND, revision=branch, local_dir=folder)
        return files_of_export(Folder(folder))


def _upload(place: _Place, private: bool, folder: Path, names: set[str], stale: set[str]) -> None:
    """Add files of a folder and delete others, in one commit: nobody sees a half of it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    added = [CommitOperationAdd(name, folder / name) for name in sorted(names)]
    deleted = [CommitOperationDelete(name) for name in sorted(stale)]
    with _hub(place) as api:
        api.create_repo(place.name, repo_type=KIND, private=private or None, exist_ok=True)
        if place.branch:
            api.create_branch(place.name, repo_type=KIND, branch=place.branch, exist_ok=True)
        api.create_commit(
            place.name,
            [*deleted, *added],
            repo_type=KIND,
            revision=place.branch,
            commit_message="Distilled pairs, by pds-ray push",
        )
