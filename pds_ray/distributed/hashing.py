"""Hashes of what a stage wrote: tasks share the files where there are many."""

from __future__ import annotations

import math
from collections.abc import Callable

from pds_ray.distributed import tasks
from pds_ray.distributed.sizes import FILES_PER_TASK
from pds_ray.store.run_folder import RunFolder


def hash_files(
    folder: RunFolder, names: list[str], step: Callable[[int], object]
) -> dict[str, str]:
    """Return the SHA-256 of files by their names below the run folder, in the order of the names.

    `step` is called with the number of files that are done. Raises StorageError if one is missing.
    """
    if len(names) <= FILES_PER_TASK:
        return folder.hash_files(names, lambda: step(1))
    groups = tasks.groups(names, math.ceil(len(names) / FILES_PER_TASK))
    found: dict[str, str] = {}
    for part in tasks.map_in_order(_hashed, groups, folder):
        found |= part
        step(len(part))
    return found


def _hashed(names: list[str], folder: RunFolder) -> dict[str, str]:
    return folder.hash_files(names)
