"""Publishing on a stand-in of the hub: what is there afterwards, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from pds_ray.errors import ConfigError
from pds_ray.store import publish
from pds_ray.store.distilled_set import DistilledSetError
from pds_ray.store.export import FORMATS, export
from pds_ray.store.publish import PublishError, push
from tests.support.hub import TOKEN, Hub, running_hub
from tests.support.synthetic_run import make_run
from tests.unit.store.test_export import content

NAME = "me/pairs"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "run", 3).path)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve a stand-in to the client of this process."""
    constants = huggingface_hub.constants
    with running_hub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            served.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("large", [False, True])
def test_what_is_pushed_is_the_export(
    hub: Hub, run: str, tmp_path: Path, form: str, large: bool
) -> None:
    hub.large = large
    url, sizes = push(run, f"hf:{NAME}", form)
    export(run, form, str(tmp_path), place=NAME)
    there = hub.branches[NAME]["main"]
    assert there == content(tmp_path)
    assert sizes == {name: len(data) for name, data in there.items()}
    assert bool(hub.objects) == large
    assert (url, len(hub.commits), hub.private[NAME]) == (f"{hub.url}/datasets/{NAME}", 1, False)


def test_another_push_replaces_its_own_files_alone(hub: Hub, run: str, tmp_path: Path) -> None:
    push(run, f"hf:{NAME}", "imagefolder")
    hub.branches[NAME]["main"] |= {"LICENSE": b"mine", ".gitattributes": b"*.tar lfs"}
    push(run, f"hf:{NAME}", "webdataset")
    export(run, "webdataset", str(tmp_path), place=NAME)
    assert hub.branches[NAME]["main"] == {
        **content(tmp_path), "LICENSE": b"mine", ".gitattributes": b"*.tar lfs"
    }  # fmt: skip
    assert len(hub.commits) == 2


def test_a_branch_is_made_and_the_main_one_stays(hub: Hub, run: str) -> None:
    push(run, f"hf:{NAME}")
    before = dict(hub.branches[NAME]["main"])
    for form in ("imagefolder", "webdataset"):  # the branch is new, then there
        url, sizes = push(run, f"hf:{NAME}", form, revision="v2")
        assert hub.branches[NAME]["v2"].keys() == sizes.keys()
        assert url == f"{hub.url}/datasets/{NAME}/tree/v2"
    assert hub.branches[NAME]["main"] == before


def test_private_is_made_private_and_never_public(hub: Hub, run: str) -> None:
    push(run, f"hf:{NAME}", private=True)
    assert hub.private[NAME]
    push(run, f"hf:{NAME}")
    assert hub.private[NAME]
    hub.create("me/public")
    with pytest.raises(PublishError, match="hf:me/public is public"):
        push(run, "hf:me/public", private=True)


@pytest.mark.parametrize("manifest", [None, b"{}", b"[]", b"\xff"])
def test_a_data_set_of_others_is_left_alone(hub: Hub, run: str, manifest: bytes | None) -> None:
    files = {"train.csv": b"a,b", **({"manifest.json": manifest} if manifest else {})}
    hub.create(NAME, **files)
    with pytest.raises(PublishError, match=r"hf:me/pairs holds \w+\.\w+, and no push wrote it"):
        push(run, f"hf:{NAME}")
    assert (hub.branches[NAME]["main"], hub.commits) == (files, [])


def test_a_new_data_set_with_a_card_is_filled(hub: Hub, run: str) -> None:
    hub.create(NAME, **{"README.md": b"", ".gitattributes": b""})
    push(run, f"hf:{NAME}")
    assert len(hub.commits) == 1


def test_a_damaged_set_is_not_pushed(hub: Hub, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 3).path
    (run / "distilled/imagefolder/000001.png").write_bytes(b"x")
    with pytest.raises(DistilledSetError, match="is not the file that was written"):
        push(str(run), f"hf:{NAME}")
    assert hub.branches == {}


def one_line(run: str, to: str = f"hf:{NAME}") -> str:
    with pytest.raises(PublishError) as refused:
        push(run, to)
    line = str(refused.value)
    assert "\n" not in line
    assert TOKEN not in line
    return line


@pytest.mark.usefixtures("hub")
def test_no_token(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert "there is no token of the hub; `hf auth login` keeps one" in one_line(run)


@pytest.mark.usefixtures("hub")
def test_a_wrong_token(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "Invalid user token" in one_line(run)


def test_a_hub_that_refuses(hub: Hub, run: str) -> None:
    hub.refuses = 403
    assert "your token may write there" in one_line(run)


@pytest.mark.usefixtures("hub")
def test_no_network(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "check the network" in one_line(run)


def test_offline(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "HF_HUB_OFFLINE is set; unset it, or give --dry-run" in one_line(run)


@pytest.mark.parametrize("to", ["me/pairs", "hf:pairs", "hf:me/pairs/x", "hf://datasets/me/pairs"])
def test_where_to_is_said_plainly(run: str, to: str) -> None:
    with pytest.raises(ConfigError, match=r"give hf:ORG/NAME, such as"):
        push(run, to)


def test_a_folder_of_too_many_images(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publish, "FILES_PER_FOLDER", 4)  # three images and their metadata
    push(run, f"hf:{NAME}", "imagefolder", dry_run=True)
    monkeypatch.setattr(publish, "FILES_PER_FOLDER", 3)
    push(run, f"hf:{NAME}", "parquet", dry_run=True)
    with pytest.raises(ConfigError, match="give --format parquet"):
        push(run, f"hf:{NAME}", "imagefolder")


def test_no_set_is_said_before_the_hub_is_asked(hub: Hub, tmp_path: Path) -> None:
    hub.refuses = 500
    with pytest.raises(DistilledSetError, match="is no distilled set"):
        push(str(tmp_path), f"hf:{NAME}")


@pytest.mark.parametrize("form", FORMATS)
def test_a_dry_run_needs_no_hub(run: str, tmp_path: Path, form: str) -> None:
    url, sizes = push(run, f"hf:{NAME}", form, dry_run=True)
    export(run, form, str(tmp_path), place=NAME)
    assert sizes == {name: len(data) for name, data in content(tmp_path).items()}
    assert json.loads((tmp_path / "manifest.json").read_text())["format"] == form
    assert url.endswith(f"/datasets/{NAME}")
