"""Availability of weights on the Hugging Face hub, checked before any long work."""

from __future__ import annotations

import logging
from pathlib import Path

from pds_ray.config import ConfigError
from pds_ray.errors import first_line

TIMEOUT_S = 10
HASH_LENGTH = 64


def require_repository(
    repository: str, revision: str | None, any_of: tuple[str, ...], who: str, instead: str
) -> Path | None:
    """Return the first of the files `any_of` that is in the cache, None if the hub has to be asked.

    Raises ConfigError in one line that names `who` needs it and what to do `instead`, if none is in
    the cache and the hub does not know the repository.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        found = cached_file(repository, revision, any_of)  # an invalid repository name raises here
        if found is None:
            huggingface_hub.HfApi().repo_info(repository, revision=revision, timeout=TIMEOUT_S)
        return found
    # no network, no such repository, no permission or offline mode: the weights are unavailable
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(
            f"{who}: {repository} is not in the cache, and the hub does not give it ({reason}); "
            f"{instead}"
        ) from error


def cached_file(repository: str, revision: str | None, any_of: tuple[str, ...]) -> Path | None:
    """Return the first of the files `any_of` of a repository that is in the cache."""
    import huggingface_hub

    for name in any_of:
        found = huggingface_hub.try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def cached_sha256(file: Path) -> str | None:
    """Return the hex SHA-256 of a large file of the cache, by which the cache names its copy.

    None where the cache has no links: there it would have to be computed.
    """
    name = file.resolve().name
    return name if len(name) == HASH_LENGTH else None
