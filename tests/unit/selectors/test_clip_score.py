"""The best agreeing pairs: a sort."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tests.support.select_oracle import make_candidates, picks


def test_it_equals_sorting():
    candidates = make_candidates(40, 2)
    best: dict[int, tuple[float, int]] = {}  # image -> its best pair
    for pair in range(len(candidates)):
        image, score = int(candidates.owner[pair]), float(candidates.similarity[pair])
        if image not in best or score > best[image][0]:
            best[image] = (score, pair)
    expected = [pair for _, pair in sorted(best.values(), key=lambda entry: (-entry[0], entry[1]))]
    assert picks("clip_score", candidates, 40) == expected


def test_of_equals_the_first_is_taken():
    candidates = make_candidates(20, 2)
    level = replace(candidates, similarity=np.ones(len(candidates), np.float32))
    first = [int(np.flatnonzero(candidates.owner == image)[0]) for image in range(20)]
    assert picks("clip_score", level, 20) == sorted(first)
