"""The trained weights of a two-tower model as two flat vectors, one per branch.

Trajectories are sequences of such vectors. A layout says which part of a vector is which tensor, so
that vectors of another model are refused instead of misread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from pds_ray.errors import ConfigError, some_of

TEXT_BRANCH = "text_head."
"""Tensors whose names begin so are of the text branch, all others of the image branch."""


STATISTICS = "running_"
"""Buffers whose names begin so are statistics of the batches seen, by torch and timm."""


@dataclass(frozen=True)
class Snapshot:
    """The weights of both branches at one moment, float [n] and [m]."""

    theta: torch.Tensor
    """The image branch, float [n]."""
    phi: torch.Tensor
    """The text branch, float [m]."""


@dataclass(frozen=True)
class Entry:
    """One tensor and its place in the flat vector of its branch."""

    name: str
    shape: tuple[int, ...]
    offset: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """Return the tensor as a view of the flat vector, through which gradients flow."""
        return flat[self.offset : self.offset + prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Names, shapes and offsets of all trained tensors, in the order of `parameters()`."""

    image: tuple[Entry, ...]
    text: tuple[Entry, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """Return the layout of the parameters that are trained, a shared one once."""
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
        text = {name: shape for name, shape in shapes.items() if name.startswith(TEXT_BRANCH)}
        image = {name: shape for name, shape in shapes.items() if name not in text}
        return cls(_entries(image), _entries(text))

    @property
    def sizes(self) -> tuple[int, int]:
        """The lengths of the two flat vectors."""
        image, text = (sum(prod(e.shape) for e in branch) for branch in (self.image, self.text))
        return image, text

    def flatten(self, model: nn.Module) -> Snapshot:
        """Return a copy of the model's weights. Raises ConfigError if it has other tensors."""
        self.check(Layout.of(model), "the model")
        weights = dict(model.named_parameters())
        return Snapshot(*(_joined(weights, branch) for branch in (self.image, self.text)))

    def views(self, theta: torch.Tensor, phi: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return name -> view of the two flat vectors, as `torch.func.functional_call` takes it."""
        pairs = ((self.image, theta), (self.text, phi))
        return {entry.name: entry.view(flat) for branch, flat in pairs for entry in branch}

    def load(self, model: nn.Module, snapshot: Snapshot) -> None:
        """Copy a snapshot into the model. Raises ConfigError if it has other tensors."""
        self.check(Layout.of(model), "the model")
        weights = dict(model.named_parameters())
        with torch.no_grad():
            for name, value in self.views(snapshot.theta, snapshot.phi).items():
                weights[name].copy_(value)

    def check(self, other: Layout, what: str) -> None:
        """Raise ConfigError if the tensors of `what` are not those of this layout."""
        if other == self:
            return
        mine, theirs = ({(e.name, e.shape) for e in (*x.image, *x.text)} for x in (self, other))
        differing = sorted({name for name, _ in mine ^ theirs}) or ["the order"]
        raise ConfigError(
            f"the experts were trained with other tensors than {what}: {some_of(differing)}; give "
            "the backbone and the text encoder of the experts, or another store of experts"
        )

    def to_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return the layout as plain JSON values."""
        values = asdict(self)
        return {branch: list(values[branch]) for branch in ("image", "text")}

    @classmethod
    def from_json(cls, values: Mapping[str, Sequence[Mapping[str, Any]]]) -> Layout:
        """Return the layout that `to_json` wrote. Raises KeyError or TypeError if it is none."""
        image, text = (
            tuple(
                Entry(str(e["name"]), tuple(map(int, e["shape"])), int(e["offset"])) for e in part
            )
            for part in (values["image"], values["text"])
        )
        return cls(image, text)


def check_matchable(backbone: nn.Module, name: str) -> None:
    """Raise ConfigError if a backbone that is trained keeps statistics of its batches.

    They are no part of a snapshot, so that weights taken from one, or merged from two, would meet
    statistics of others. A frozen backbone may have them.
    """
    buffers = (buffer.rpartition(".")[2] for buffer, _ in backbone.named_buffers())
    if any(buffer.startswith(STATISTICS) for buffer in buffers):
        raise ConfigError(
            f"backbone {name} normalises over the batch, and its statistics are no part of an "
            "expert's weights; give small_conv, nfnet_l0 or a ViT, or train the heads alone "
            "(--experts.train heads)"
        )


def _entries(shapes: Mapping[str, tuple[int, ...]]) -> tuple[Entry, ...]:
    entries, offset = [], 0
    for name, shape in shapes.items():
        entries.append(Entry(name, shape, offset))
        offset += prod(shape)
    return tuple(entries)


def _joined(weights: Mapping[str, torch.Tensor], branch: Sequence[Entry]) -> torch.Tensor:
    """Return one flat copy: `torch.cat` may not alias weights that are trained on."""
    parts = [weights[entry.name].detach().reshape(-1) for entry in branch]
    return torch.cat(parts).clone() if parts else torch.empty(0)
