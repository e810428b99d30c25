"""Names of open_clip models: published weights, their other names, and what a misspelt one means.

One repository of the hub may have several names: those of open_clip's table and its own. They are
names of one embedding space.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pds_ray.config import ConfigError
from pds_ray.errors import squashed
from pds_ray.store.hub import cached_file, cached_sha256

HUB, FOLDER = "hf-hub:", "local-dir:"
HUB_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
CONFIG = "open_clip_config.json"
QUICK_GELU = "-quickgelu"  # architectures that differ in this alone share their weights
PREFERRED_TAG = "openai"
ELSEWHERE = ("https://huggingface.co/", "open_clip:", "open_clip/")
"""Beginnings of names that other programs take."""
TRANSFORMERS = {  # repositories for transformers -> the same weights for open_clip
    "openai/clip-vit-base-patch32": "ViT-B-32:openai",
    "openai/clip-vit-base-patch16": "ViT-B-16:openai",
    "openai/clip-vit-large-patch14": "ViT-L-14:openai",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336:openai",
    "google/siglip-base-patch16-224": "ViT-B-16-SigLIP:webli",
    "google/siglip-base-patch16-256": "ViT-B-16-SigLIP-256:webli",
    "google/siglip-base-patch16-384": "ViT-B-16-SigLIP-384:webli",
    "google/siglip-large-patch16-256": "ViT-L-16-SigLIP-256:webli",
    "google/siglip-large-patch16-384": "ViT-L-16-SigLIP-384:webli",
    "google/siglip-so400m-patch14-384": "ViT-SO400M-14-SigLIP-384:webli",
}


@dataclass(frozen=True)
class Published:
    """Weights of open_clip's table."""

    model: str
    tag: str
    repository: str
    """On the hub; empty if they are elsewhere."""
    files: tuple[str, ...]
    """The first that is there is loaded."""

    @property
    def name(self) -> str:
        return f"{self.model.removesuffix(QUICK_GELU)}:{self.tag}"


def _architectures() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("open_clip is not installed: pip install open_clip_torch")
    return Path(spec.submodule_search_locations[0]) / "model_configs"


def architecture(model: str) -> dict[str, Any] | None:
    """Read the configuration of an architecture, None if there is none.

    The file is read directly, since importing open_clip takes seconds.
    """
    path = _architectures() / f"{model.replace('/', '-')}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def published_as(model: str, tag: str) -> Published | None:
    """Return published weights of an architecture by their tag, in any spelling of it."""
    from open_clip import pretrained

    entry = pretrained.get_pretrained_cfg(model, tag)
    if not entry:
        return None
    repository, _, file = entry.get("hf_hub", "").rpartition("/")
    safe = (f"{Path(file).stem}.safetensors", file)  # open_clip looks for the first itself
    spelling = next(known for known in tags(model) if squashed(known) == squashed(tag))
    return Published(model, spelling, repository, safe if file else HUB_WEIGHTS)


def tags(model: str) -> list[str]:
    """Return the tags of an architecture, the one to take first if it does not matter."""
    from open_clip import pretrained

    known = pretrained.list_pretrained_tags_by_model(model)
    return sorted(known, key=lambda tag: tag != PREFERRED_TAG)


@cache
def _published() -> list[Published]:
    from open_clip import pretrained

    found = (published_as(model, tag) for model, tag in pretrained.list_pretrained(as_str=False))
    return [one for one in found if one]


def names_of(repository: str = "", sha256: str | None = None) -> tuple[str, ...]:
    """Return all names of the weights of a repository of the hub, or of a file by its SHA-256.

    The file is known if the same bytes are in the hub's cache.
    """
    if not repository and sha256:
        repositories = {one.repository: one.files for one in _published() if one.repository}
        cached = {name: cached_file(name, None, files) for name, files in repositories.items()}
        same = (name for name, file in cached.items() if file and cached_sha256(file) == sha256)
        repository = next(same, "")
    if not repository:
        return ()
    known = [one for one in _published() if one.repository.lower() == repository.lower()]
    spelled = known[0].repository if known else repository
    return tuple(dict.fromkeys([*(one.name for one in known), f"{HUB}{spelled}"]))


def advice(name: str) -> str:
    """Return what to give in place of a name that is none, as `give NAME` where that is clear."""
    place = name.removeprefix(FOLDER)
    path = Path(place).expanduser()
    if place and path.exists():
        return _advice_on_folder(path) if path.is_dir() else _advice_on_file(path)
    right = _right_architecture(name) or _right_name(name)
    if right:
        return f"give {right}"
    if name.count("/") == 1 and ":" not in name:
        return f"if it is an open_clip model on the hub, give {HUB}{name}"
    near = difflib.get_close_matches(name.partition(":")[0], _known(), n=4, cutoff=0.5)
    return f"near it: {', '.join(near) or 'ViT-B-32, ViT-L-14, ViT-H-14'}; or {FOLDER}PATH"


def _known() -> list[str]:
    return [path.stem for path in _architectures().glob("*.json")]


def _right_architecture(name: str) -> str | None:
    """Return MODEL:FILE with the architecture in its right spelling, if that was wrong."""
    model, _, file = name.partition(":")
    right = next((one for one in _known() if squashed(one) == squashed(model)), model)
    is_file = bool(file) and Path(file).expanduser().is_file()
    return f"{right}:{file}" if is_file and right != model else None


def _advice_on_file(file: Path) -> str:
    if (file.parent / CONFIG).is_file():
        return f"it is a file of an open_clip folder; give {FOLDER}{file.parent}"
    return f"it is a file; give its architecture with it, as in ViT-B-32:{file}"


def _advice_on_folder(folder: Path) -> str:
    inside = sorted(folder.glob(f"snapshots/*/{CONFIG}"))  # a repository in the hub's cache
    if (folder / CONFIG).is_file() or inside:
        return f"it is a folder; give {FOLDER}{inside[-1].parent if inside else folder}"
    kind = " for transformers" if (folder / "config.json").is_file() else ""
    return f"it is a folder{kind}, and an open_clip folder must hold {CONFIG}"


def _right_name(name: str) -> str | None:
    """Return the name of published weights that `name` spells otherwise, if it is clear."""
    for beginning in ELSEWHERE:
        name = name.removeprefix(beginning)
    known: dict[str, str] = {}
    for other, right in TRANSFORMERS.items():
        for spelling in (other, other.partition("/")[2], HUB + other):
            known[squashed(spelling)] = right
    for one in _published():
        known.setdefault(squashed(one.model + one.tag), f"{one.model}:{one.tag}")
        known.setdefault(squashed(one.model), f"{one.model}:{tags(one.model)[0]}")
        for spelling in (one.repository, HUB + one.repository) if one.repository else ():
            known.setdefault(squashed(spelling), HUB + one.repository)
    found = known.get(squashed(name))
    return found if found != name else None
