"""Whether weights on the Hugging Face hub can be had, asked before any long work."""

from __future__ import annotations

import logging

from pds_ray.config import ConfigError
from pds_ray.errors import first_line

TIMEOUT_S = 10


def require_repository(
    repository: str, revision: str | None, any_of: tuple[str, ...], who: str, instead: str
) -> None:
    """Passes if one of the files is in the cache, or the hub answers for the repository.

    Raises ConfigError in one line, naming `who` wants it and what to do `instead`.
    """
    import huggingface_hub

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        for name in any_of:  # a name that can be no repository raises here
            if isinstance(
                huggingface_hub.try_to_load_from_cache(repository, name, revision=revision), str
            ):
                return
        huggingface_hub.HfApi().repo_info(repository, revision=revision, timeout=TIMEOUT_S)
    except (
        Exception
    ) as error:  # no network, no such repository, no permission, offline mode: not to be had
        reason = first_line(error)
        raise ConfigError(
            f"{who}: {repository} is not in the cache, and the hub does not give it ({reason}); {instead}"
        ) from error
