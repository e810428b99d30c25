"""Availability of weights on the Hugging Face hub, checked before any long work."""

from __future__ import annotations

import logging

from pds_ray.config import ConfigError
from pds_ray.errors import first_line

TIMEOUT_S = 10


def require_repository(
    repository: str, revision: str | None, any_of: tuple[str, ...], who: str, instead: str
) -> None:
    """Return if one of the files `any_of` is in the cache, or the hub knows the repository.

    Raises ConfigError in one line that names `who` needs it and what to do `instead`.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        for name in any_of:  # an invalid repository name raises here
            if isinstance(
                huggingface_hub.try_to_load_from_cache(repository, name, revision=revision), str
            ):
                return
        huggingface_hub.HfApi().repo_info(repository, revision=revision, timeout=TIMEOUT_S)
    # no network, no such repository, no permission or offline mode: the weights are unavailable
    except Exception as error:
        reason = first_line(error)
        raise ConfigError(
            f"{who}: {repository} is not in the cache, and the hub does not give it ({reason}); "
            f"{instead}"
        ) from error
