"""Doctor looks where the hub's client keeps models, and knows whether it may fetch any."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from pds_ray.cli import doctor

VARIABLES = ("XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE")


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"XDG_CACHE_HOME": "/caches"},
        {"HF_HOME": "~/models", "XDG_CACHE_HOME": "/caches"},
        {"HF_HUB_CACHE": "$HOME/hub", "HF_HOME": "/models"},
    ],
)
def test_the_cache_is_that_of_the_client(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    client = runpy.run_module("huggingface_hub.constants")
    assert doctor._cache() == Path(client["HF_HUB_CACHE"])


@pytest.mark.parametrize(
    ("offline", "said"),
    [
        ("1", "not fetched: HF_HUB_OFFLINE is set"),
        ("0", "fetched from the hub at first use"),
        (None, "fetched from the hub at first use"),
    ],
)
def test_weights_that_are_not_here(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    offline: str | None,
    said: str,
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    if offline is not None:
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    (tmp_path / "models--timm--vit_large_patch14_clip_224.openai").mkdir()
    assert doctor._models()
    weights = [line for line in capsys.readouterr().out.splitlines() if " weights " in line]
    here = [line for line in weights if line.endswith(f"in {tmp_path}")]
    assert [line.startswith("ok ") for line in here] == [True]
    assert all(line.startswith("not yet") and said in line for line in weights if line not in here)
    assert len(weights) > len(here)
