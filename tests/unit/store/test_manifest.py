"""Fingerprints and run.json."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.store.manifest import ManifestError, RunManifest, fingerprint, rate, versions
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=4), JSON, max_size=5), st.randoms())
def test_the_order_of_a_dictionary_does_not_count(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert fingerprint("x", {"inner": dict(items)}) == fingerprint("x", {"inner": value})


@given(JSON, JSON)
def test_different_values_differ(a, b):
    """Compared as JSON, where 1 and true are two things."""
    same = json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    assert (fingerprint(a) == fingerprint(b)) == same


def test_where_parts_end_counts():
    assert (
        len(
            {
                fingerprint("a", "b"),
                fingerprint("ab"),
                fingerprint("ab", ""),
                fingerprint(["a", "b"]),
            }
        )
        == 4
    )


def test_a_fingerprint_is_the_same_in_another_process():
    code = (
        "from pds_ray.store.manifest import fingerprint; "
        "print(fingerprint('ü', {'b': [1, 2.5, None], 'a': True}))"
    )
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == fingerprint("ü", {"a": True, "b": [1, 2.5, None]})


@pytest.fixture
def run(tmp_path):
    return RunFolder(Folder(str(tmp_path)))


def test_a_stage_is_done_when_it_stopped_well_under_the_same_fingerprint(run):
    manifest = RunManifest(run)
    assert not manifest.is_done("prune", "f1")
    manifest.start("prune", "f1")
    assert not manifest.is_done("prune", "f1")
    manifest.stop("prune", "done", {"kept": 3})
    assert manifest.is_done("prune", "f1")
    assert not manifest.is_done("prune", "f2")
    assert not manifest.is_done("match", "f1")
    for status in ("failed", "interrupted"):
        manifest.start("prune", "f1")
        manifest.stop("prune", status)
        assert not manifest.is_done("prune", "f1")


def test_every_change_is_on_disk(run):
    manifest = RunManifest(run)
    manifest.update(seed=3, name="Zoë")
    manifest.start("embed", "f")
    seen = RunManifest(run)
    assert seen.data["seed"] == 3
    assert seen.stages["embed"]["status"] == "running"
    manifest.stop("embed", "done", {"images": 5})
    seen = RunManifest(run)
    assert seen.data == manifest.data
    assert seen.is_done("embed", "f")
    assert seen.stages["embed"]["counts"] == {"images": 5}
    assert "started" not in seen.stages["embed"]


def test_time_adds_up_over_interruptions_and_restarts_with_a_change(run, monkeypatch):
    clock = iter([100.0, 107.0, 200.0, 203.5, 300.0, 301.0])
    monkeypatch.setattr("pds_ray.store.manifest.time.monotonic", lambda: next(clock))
    manifest = RunManifest(run)
    spent = []
    for made_from, status in (("f", "interrupted"), ("f", "done"), ("g", "done")):
        manifest.start("embed", made_from)
        manifest.stop("embed", status)
        spent.append(manifest.stages["embed"]["seconds"])
    assert spent == [7.0, 10.5, 1.0]


def test_a_rate_leaves_out_a_killed_session(run, monkeypatch):
    """900 images in 90 s and a kill, then 100 in 10 s: 10 a second, not 100."""
    clock = iter([0.0, 100.0, 110.0])
    monkeypatch.setattr("pds_ray.store.manifest.time.monotonic", lambda: next(clock))
    RunManifest(run).start("embed", "f")
    manifest = RunManifest(run)
    manifest.start("embed", "f")
    assert rate(manifest.stages["embed"], "timed") == 0
    manifest.stop("embed", "done", {"images": 1000, "timed": 100})
    assert rate(manifest.stages["embed"], "timed") == 10
    assert rate(manifest.stages["embed"], "") == 0


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "5", "null", "{}", '{"stages": 5}', '{"stages": []}', "\udcff"]
)
def test_another_file_under_that_name_is_refused_in_one_line(run, tmp_path, content):
    (tmp_path / "run.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ManifestError) as caught:
        RunManifest(run)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "delete it" in str(caught.value)


def test_the_copy_stands_in_for_a_damaged_manifest(run, tmp_path):
    manifest = RunManifest(run)
    manifest.start("embed", "f")
    names = ("run.json", "hashes/run.json")
    for name, other in (names, names[::-1]):
        path = tmp_path / name
        whole = path.read_bytes()
        for broken in (None, whole[:-9], whole.replace(b'"f"', b'"g"')):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            found, damaged = RunManifest.open_whole(str(tmp_path))
            assert damaged == {name: "missing" if broken is None else "corrupt"}
            assert found.data == manifest.data
            found.update()
            assert path.read_bytes() == whole == (tmp_path / other).read_bytes()
    assert RunManifest.open_whole(str(tmp_path))[1] == {}


def test_both_damaged_are_refused(run, tmp_path):
    manifest = RunManifest(run)
    manifest.start("embed", "f")
    for name in ("run.json", "hashes/run.json"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes().replace(b'"f"', b'"g"'))
    with pytest.raises(ManifestError, match=r"run\.json is not a run manifest.* has changed since"):
        RunManifest.open_whole(str(tmp_path))


def test_a_manifest_of_an_earlier_version_has_neither_seal_nor_copy(tmp_path):
    (tmp_path / "run.json").write_text('{"stages": {}}')
    assert RunManifest.open_whole(str(tmp_path))[1] == {}


def test_versions_of_what_decides_results():
    found = versions()
    assert {"python", "numpy", "pyarrow", "pds-ray"} <= set(found)
    assert all(found.values())
