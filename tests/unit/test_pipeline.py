"""What a change of the configuration or of the data makes stale: exactly the stages from the first that it touches."""

from __future__ import annotations

from typing import Any

import pytest

from pds_ray.config import RunConfig, replace
from pds_ray.pipeline import STAGES, plan
from pds_ray.recipes import recipe

BASE = {"source": "scenes:120", "pairs": 5, "out": "unused", "decode.decoder": "nearest"}


def fingerprints(**changes: Any) -> dict[str, str]:
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return plan(replace(recipe("demo"), {**BASE, **names})).fingerprints


@pytest.fixture(scope="module")
def reference() -> dict[str, str]:
    return fingerprints()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"source": "scenes:121"}, "embed"),
        ({"source": "scenes:120:1"}, "embed"),
        ({"read__captions": "paper"}, "embed"),
        ({"read__min_side": 3}, "embed"),
        ({"embed__store_dtype": "float32"}, "embed"),
        ({"embed__precision": "bf16"}, "embed"),
        ({"prune__ratio": 0.3}, "prune"),
        ({"pairs": 6}, "cluster"),
        ({"seed": 1}, "cluster"),
        ({"cluster__iterations": 3}, "cluster"),
        ({"cluster__normalize": True}, "cluster"),
        ({"cluster__modality": "joint"}, "cluster"),
        ({"match__pairless": "drop"}, "match"),
        ({"match__solver": "sparse"}, "match"),
        ({"match__filter": False}, "match"),
        ({"decode__steps": 3}, "decode"),
        ({"decode__image_size": 32}, "decode"),
        ({"decode__rescale": True}, "decode"),
    ],
)
def test_a_change_makes_stale_what_depends_on_it(
    reference: dict[str, str], changes: dict[str, Any], first: str
) -> None:
    changed = fingerprints(**changes)
    stale = [stage for stage in STAGES if changed[stage] != reference[stage]]
    assert stale == list(STAGES[STAGES.index(first) :])


@pytest.mark.parametrize(
    "changes",
    [
        {"out": "elsewhere"},
        {"embed__batch_size": 16},
        {"embed__store": "shared"},
        {"decode__batch_size": 2},
        {"ray__num_cpus": 1},
        {"ray__embed_workers": 3},
        {"ray__max_bad_share": 0.1},
    ],
)
def test_where_and_how_fast_changes_nothing(reference: dict[str, str], changes: dict[str, Any]) -> None:
    assert fingerprints(**changes) == reference


def test_another_condition_makes_decoding_stale() -> None:
    unclip = {"decode__decoder": "unclip"}
    plain, by_caption = fingerprints(**unclip), fingerprints(**unclip, decode__condition="caption")
    assert [stage for stage in STAGES if plain[stage] != by_caption[stage]] == ["decode", "materialize"]


def test_every_option_is_judged() -> None:
    """A new option must be put on one of the two lists above."""
    from pds_ray.config import flatten, to_dict

    judged = {
        "source", "out", "pairs", "seed", "read.captions", "read.min_side", "read.max_pixels", "embed.encoder",
        "embed.precision", "embed.batch_size", "embed.store", "embed.store_dtype", "prune.ratio", "cluster.iterations",
        "cluster.restarts", "cluster.normalize", "cluster.memory_gib", "cluster.modality", "match.solver",
        "match.pairless", "match.filter", "decode.decoder", "decode.model", "decode.revision", "decode.condition",
        "decode.steps", "decode.guidance", "decode.noise_level", "decode.negative_prompt", "decode.rescale",
        "decode.precision", "decode.batch_size", "decode.image_size",
    }  # fmt: skip
    assert {name for name in flatten(to_dict(RunConfig())) if not name.startswith("ray.")} == judged
