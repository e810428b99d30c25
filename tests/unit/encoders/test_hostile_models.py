"""Models that carry code: none of it is run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pds_ray.backbones import timm as backbones
from pds_ray.config import ConfigError
from pds_ray.encoders import hf_text, open_clip


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "load",
    [
        lambda path: open_clip.load(open_clip.describe(f"ViT-S-32:{path}"), "fp32"),
        lambda path: backbones.build(backbones.describe(f"resnet10t:{path}"), 64),
    ],
    ids=["open_clip", "timm"],
)
def test_a_checkpoint_that_is_a_program_is_refused(
    tmp_path: Path, load: Callable[[Path], Any]
) -> None:
    torch.save({"state_dict": Payload(tmp_path / "ran")}, tmp_path / "model.pt")
    with pytest.raises(ConfigError):
        load(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have worked


def test_code_beside_a_text_model_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    config = {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ConfigError):
        hf_text.describe(f"bert:{tmp_path}")
    assert asked == []
    assert not (tmp_path / "ran").exists()
