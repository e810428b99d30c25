"""Values as the page can hold and show them."""

from __future__ import annotations

import math
from typing import Any

from pds_ray.errors import without_secrets

Json = dict[str, Any]


def rounded(value: Any) -> Any:
    """Return a float to four digits, None if it is not finite; anything else as it is."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def public(value: Any) -> Any:
    """Return settings without the credentials in their URIs."""
    if isinstance(value, dict):
        return {str(name): public(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [public(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
