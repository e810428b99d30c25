"""Herding (Welling, 2009): pairs whose mean follows the mean of all.

The rule stands in docs/methods.md, "Selectors".
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from pds_ray.config import SelectConfig
from pds_ray.selectors.base import Candidates

DESCRIPTION = (
    "herding (Welling, 2009): one by one, "
    "so that the mean joint embedding stays nearest to that of all pairs"
)


def select(
    candidates: Candidates,
    pairs: int,
    seed: int,  # noqa: ARG001
    config: SelectConfig,  # noqa: ARG001
) -> Iterator[int]:
    """Yield picks x that each bring the mean of the picks nearest to the mean m of all.

    With S the sum of t picks, |(S + x) / (t + 1) - m| is least where x . ((t + 1) m - S) is
    greatest: all x have length 1.
    """
    mean = candidates.joint_mean()
    lag = mean.copy()
    taken = np.zeros(len(candidates), bool)
    for _ in range(pairs):
        gain = candidates.joint_dots(lag)
        gain[taken] = -np.inf
        pick = int(gain.argmax())
        yield pick
        taken |= candidates.same_image(pick)
        lag += mean - candidates.joint(pick)
