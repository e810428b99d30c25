"""JSON records that tell whether they are as they were written: each ends with a hash of the rest.

Nothing else promises what is in them: they are where promises begin.
"""

from __future__ import annotations

import json
from typing import Any

from pds_ray.store.storage import Folder, json_bytes, json_sha256

SEAL = "sha256"
"""The last entry of a sealed record."""
MISSING, CORRUPT = "missing", "corrupt"


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its seal, the hex SHA-256 of the bytes that it has without, last."""
    rest = {name: value for name, value in record.items() if name != SEAL}
    return {**rest, SEAL: json_sha256(rest)}


def damage(folder: Folder, name: str) -> str:
    """Return MISSING, or CORRUPT where any byte of the record `name` has changed; else "".

    A record of an earlier version, which has no seal, passes if it is JSON.
    """
    try:
        data = folder.read_bytes(name)
        record = json.loads(data)
    except FileNotFoundError:
        return MISSING
    except (ValueError, RecursionError):
        return CORRUPT
    if not isinstance(record, dict) or not record:
        return CORRUPT
    *_, last = record
    rest = {key: value for key, value in record.items() if key != last}
    # the seal under another name is a seal whose name has changed
    if SEAL not in record and record[last] != json_sha256(rest):
        return ""
    return "" if data == json_bytes(sealed(record)) else CORRUPT
