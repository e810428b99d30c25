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

import yaml

from pds_ray.modalities.text import clean_basic
from pds_ray.store.distilled_set import IMAGES, TABLES, TARS, Record

EXAMPLES = 10
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
"""Exclusive upper bound on the number of pairs -> size category of Hugging Face."""
FIELDS = ["license", "license_name", "task_categories", "size_categories", "tags", "configs"]
USE = re.compile(r"(?<=## Use\n\n```python\n).*?(?=```)", re.DOTALL)
"""The lines of a card that read the set."""


@dataclass(frozen=True)
class Layout:
    """One format of a set, as Hugging Face is told of it and as people read it."""

    config: Mapping[str, Any]
    """The entry of the card's `configs` that says which files are the data."""
    columns: str
    """Names of the columns that `datasets` makes of them; $image is the suffix of the images."""
    code: str = ""
    """More lines that read it, with $image as above."""


def _files(pattern: str) -> dict[str, Any]:
    return {"config_name": "default", "data_files": [{"split": "train", "path": pattern}]}


LAYOUTS = {
    "parquet": Layout(_files(f"{TABLES}/train-*.parquet"), "image, text, ..."),
    "webdataset": Layout(
        _files(f"{TARS}/*.tar"),
        "$image, txt, json",
        "\nimport webdataset as wds\n"
        f'pairs = wds.WebDataset("{TARS}/000000.tar", shardshuffle=False)'
        '.decode("pil").to_tuple("$image", "txt")\n',
    ),
    "imagefolder": Layout(
        {"config_name": "default", "data_dir": IMAGES},
        "image, text, ...",
        """
from pds_ray import load_distilled
pairs = load_distilled(".")                                # with both prototypes
""",
    ),
}
"""Format -> its layout."""


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
    real pairs were chosen, its "fewer" why there are fewer pairs than asked for, its "extras" more
    parts of the set, its "learned" the learned ones.
    """
    chosen = [f"Method: {about['selection']}."] if "selection" in about else []
    fewer = [f"The set has {about['fewer']}."] if "fewer" in about else []
    extras = [f"It also holds {about['extras']}."] if "extras" in about else []
    learned = [f"{about['learned']}."] if "learned" in about else []
    making = [text.making, *_deviations(about["config"], text), *chosen, *fewer, *extras, *learned]
    template = Template((files("pds_ray.store") / "card.template").read_text("utf-8"))
    return template.substitute(
        front_matter=_front_matter(len(rows), [text.tag, about["method"]]),
        image=image_kind(rows),
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
        configs=[LAYOUTS["imagefolder"].config],
    )
    return data.to_yaml(line_break="\n", original_order=FIELDS)


def image_kind(rows: Sequence[Record]) -> str:
    """Return the suffix of the images of a set, without its dot."""
    named = [row["file_name"] for row in rows[:1] if "file_name" in row]
    return named[0].rpartition(".")[2] if named else "png"


def card_of_export(text: str, format: str, place: str, image: str) -> str:
    """Return the card of a set for an export: it names the files, and says how to read `place`.

    `image` is the suffix of the images. All else stays as it is, also where a person wrote it.
    Raises ValueError if `text` has no front matter in YAML.
    """
    from huggingface_hub import DatasetCardData

    layout = LAYOUTS[format]
    start, front, body = text.replace("\r\n", "\n").split("---\n", 2)
    fields = yaml.safe_load(front)
    if start.strip() or not isinstance(fields, dict):
        raise ValueError("it does not begin with YAML fields between two lines of ---")
    fields["configs"] = [layout.config]
    front = DatasetCardData(**fields).to_yaml(line_break="\n", original_order=FIELDS)
    columns, more = (
        Template(line).substitute(image=image) for line in (layout.columns, layout.code)
    )
    code = f"""from datasets import load_dataset
pairs = load_dataset("{place}", split="train")            # columns: {columns}
{more}"""
    return f"---\n{front}\n---\n{USE.sub(lambda _: code, body, count=1)}"


def bare_card(pairs: int) -> str:
    """Return a card for a set that has none."""
    title = f"# {pairs} image-caption pairs"
    return f"---\n{_front_matter(pairs, [])}\n---\n\n{title}\n\n## Use\n\n```python\n```\n"


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
