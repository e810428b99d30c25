"""Weights of a backbone in a file of yours, `NAME:FILE`: found, and tried before any long work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pds_ray.backbones.base import BackboneInfo
from pds_ray.config import ConfigError
from pds_ray.store.weights import loading_reason, require_whole

if TYPE_CHECKING:
    from torch import nn


def find_weights(name: str, instead: str) -> Path:
    """Return the absolute path of the FILE of a backbone `NAME:FILE`.

    Raises ConfigError, which says what to give `instead`, if there is none.
    """
    file = name.partition(":")[2]
    path = Path(file).expanduser()
    if not path.is_file():
        raise ConfigError(f"backbone {name}: {file} is no file; give {instead}")
    return path.resolve()


def require_fitting(
    info: BackboneInfo, path: Path, build: Callable[[BackboneInfo, int], nn.Module]
) -> None:
    """Raise ConfigError unless the weights of a file are whole and `build` can load them.

    The model is built on torch's meta device: no tensor of it is computed.
    """
    import torch

    require_whole(path, f"backbone {info.name}")
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # that copies to that device copy nothing
        build(info, info.image_size)


def unbuildable(info: BackboneInfo, error: Exception) -> ConfigError:
    """Return the error of a backbone whose building or loading raised `error`."""
    return ConfigError(f"backbone {info.name}: cannot be built ({loading_reason(error)})")
