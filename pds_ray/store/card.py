"""The data-set card of a distilled set: README.md, as Hugging Face reads it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from string import Template
from typing import Any

from pds_ray.modalities.text import clean_basic
from pds_ray.store.distilled_set import Record

EXAMPLES = 10
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""Exclusive upper bound on the number of pairs -> size category of Hugging Face."""
FIELDS = ["license", "license_name", "task_categories", "size_categories", "tags", "configs"]


@dataclass(frozen=True)
class CardText:
    """A method's part of the card."""

    making: str
    """Sentences on the making of the pairs."""
    verb: str
    """Completes "10 pairs ... from SOURCE"."""
    tag: str
    """Tag on Hugging Face, besides the method's name."""
    cosine_of: str
    """The two things that a pair's cosine compares."""
    limits: str
    """A sentence on the limits of the set, without its full stop."""
    models: tuple[str, ...] = ("encoder", "decoder")
    """Models to name."""
    deviations: Mapping[tuple[str, str, object], str] = field(default_factory=dict)
    """(section, option, value) -> deviation of such a configuration from the method."""


def card(rows: Sequence[Record], about: Mapping[str, Any], text: CardText) -> str:
    """Return the card: YAML front matter that Hugging Face reads, then prose and tables.

    `about` is what the manifest says of the making; its "selection", if there is one, describes how
    real pairs were chosen, its "fewer" why there are fewer pairs than asked for.
    """
    chosen = [f"Method: {about['selection']}."] if "selection" in about else []
    fewer = [f"The set has {about['fewer']}."] if "fewer" in about else []
    making = [text.making, *_deviations(about["config"], text), *chosen, *fewer]
    template = Template((files("pds_ray.store") / "card.template").read_text("utf-8"))
    return template.substitute(
        front_matter=_front_matter(len(rows), [text.tag, about["method"]]),
        pairs=len(rows),
        verb=text.verb,
        source=about["source"],
        making=" ".join(making),
        models="\n".join(f"- {model}: `{about[model]}`" for model in text.models),
        image_origin=about["picture_origin"],
        counts="\n".join(f"| {name} | {value} |" for name, value in about["counts"].items()),
        cosine_of=text.cosine_of,
        examples="\n".join(map(_example, rows[:EXAMPLES])),
        config=json.dumps(about["config"], indent=2),
        limits=text.limits,
    )


def _front_matter(pairs: int, tags: list[str]) -> str:
    from huggingface_hub import DatasetCardData

    data = DatasetCardData(
        license="other",
        license_name="inherits-the-source",
        task_categories=["image-to-text", "text-to-image"],
        size_categories=[next((name for limit, name in SIZES if pairs < limit), "n>1M")],
        tags=tags,
        configs=[{"config_name": "default", "data_dir": "imagefolder"}],
    )
    return data.to_yaml(line_break="\n", original_order=FIELDS)


def _deviations(config: Mapping[str, Any], text: CardText) -> list[str]:
    """Return one sentence per deviation of a configuration from the method."""
    return [
        f"Here {deviation}."
        for (section, option, value), deviation in text.deviations.items()
        if config.get(section, {}).get(option) == value
    ]


def _example(row: Record) -> str:
    return f"| {row['pair']} | {_cell(row['text'])} | {row['cosine']:.3f} |"


def _cell(text: str) -> str:
    """Return text in which Markdown, HTML and terminals find nothing to act on."""
    plain = html.escape(clean_basic(text), quote=False).replace("`", "'")
    return re.sub(r"([\\*_{}\[\]()#+!|~:])", r"\\\1", plain)
