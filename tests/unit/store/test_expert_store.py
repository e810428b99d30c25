"""A store of experts that is damaged or incomplete says so in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pds_ray.errors import UserError
from pds_ray.stages.expert_data import load_pairs
from pds_ray.stages.experts import WantedExperts
from pds_ray.store.expert_store import ExpertStore, ExpertStoreError, open_experts
from pds_ray.store.storage import Folder
from tests.support.tiny_experts import begin, train, wanted


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> WantedExperts:
    experts = wanted(tmp_path_factory.mktemp("experts") / "store", "scenes:6", epochs=1)
    begin(experts)
    for number in range(2):
        train(experts, number)
    return experts


@pytest.fixture
def broken(made: WantedExperts, tmp_path: Path) -> tuple[ExpertStore, Path]:
    """Return a copy that a test may break."""
    copy = tmp_path / "copy"
    shutil.copytree(made.store.folder.path, copy)
    return ExpertStore(Folder(str(copy))), copy


def refusal(make: object, *args: object) -> str:
    with pytest.raises(UserError) as caught:
        make(*args)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_complete_store_is_opened(made: WantedExperts):
    found = open_experts(made.store, 2, 1)
    assert (found.names, found.epochs) == (["000", "001"], 1)
    sizes = tuple(map(len, (found.snapshot("001", 1).theta, found.snapshot("001", 1).phi)))
    assert sizes == found.layout.sizes
    assert found.snapshot("000", 0).theta.dtype == torch.float32


@pytest.mark.parametrize(
    ("count", "epochs", "lacks"),
    [(3, 1, "0 epochs of expert 002"), (2, 2, "1 epochs of expert 000")],
)
def test_fewer_experts_than_asked_for(made: WantedExperts, count: int, epochs: int, lacks: str):
    text = refusal(open_experts, made.store, count, epochs)
    assert f"{count} experts of {epochs} epochs are asked for" in text
    assert lacks in text
    assert "pds-ray experts" in text


def test_a_damaged_snapshot_is_named(broken: tuple[ExpertStore, Path]):
    store, path = broken
    file = path / "experts" / "001" / "001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    found = open_experts(store, 2, 1)
    found.snapshot("001", 0)
    text = refusal(found.snapshot, "001", 1)
    assert f"{file} is damaged: its hash is another one; delete {file.parent}" in text


def test_a_missing_snapshot_is_named(broken: tuple[ExpertStore, Path]):
    store, path = broken
    file = path / "experts" / "000" / "001.safetensors"
    found = open_experts(store, 2, 1)
    file.unlink()
    assert f"{file} is missing; delete {file.parent}" in refusal(open_experts, store, 2, 1)
    assert f"{file} is missing" in refusal(found.snapshot, "000", 1)
    assert "has no snapshot of epoch 7" in refusal(found.snapshot, "000", 7)


def test_a_snapshot_of_another_layout_is_refused(broken: tuple[ExpertStore, Path]):
    store, path = broken
    manifest = path / "manifest.json"
    about = json.loads(manifest.read_text())
    about["layout"]["text"][0]["name"] = "text_head.other"
    manifest.write_text(json.dumps(about))
    text = refusal(open_experts(store, 2, 1).snapshot, "000", 0)
    assert "tensors of other names or shapes than the manifest says" in text


def test_a_damaged_manifest_is_named(broken: tuple[ExpertStore, Path]):
    store, path = broken
    for content in ("{", "[]", '{"layout": {}}', '{"made_from": 3}'):
        (path / "manifest.json").write_text(content)
        assert "is no manifest of experts, or a damaged one" in refusal(store.about)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"snapshots": 3}'])
def test_a_damaged_list_of_snapshots_is_named(
    broken: tuple[ExpertStore, Path], content: str
) -> None:
    store, path = broken
    file = path / "experts" / "001" / "manifest.json"
    file.write_text(content)
    assert f"{file} is damaged (" in refusal(store.epochs, "001")


def test_damaged_images_are_named(broken: tuple[ExpertStore, Path], made: WantedExperts):
    store, path = broken
    [file] = (path / "data").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1])
    text = refusal(load_pairs, replace(made, store=store))
    assert f"{file} is damaged: its hash is another one; delete {file.parent}" in text


def test_a_folder_without_experts_is_empty(tmp_path: Path):
    store = ExpertStore(Folder(str(tmp_path)))
    assert store.about() == {}
    assert store.epochs("000") == -1
    with pytest.raises(ExpertStoreError, match="has 0 epochs of expert 000"):
        store.require(1, 1)
    assert store.free_bytes() is not None
    assert ExpertStore(Folder("s3://bucket/experts")).free_bytes() is None
