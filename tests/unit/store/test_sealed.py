"""Sealed records: no changed bit passes, and a record without a seal is one of before."""

from __future__ import annotations

import json
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.store.sealed import CORRUPT, MISSING, damage, sealed
from pds_ray.store.storage import Folder

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('aé\n"0 '),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab0"), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.dictionaries(st.text("abc_", min_size=1), VALUES, max_size=4)


@given(RECORDS, st.data())
def test_every_flipped_bit_shows(record: dict, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Folder(place)
        folder.write_json("record", sealed(record))
        assert damage(folder, "record") == ""
        whole = folder.read_bytes("record")
        at = data.draw(st.integers(0, len(whole) - 1))
        bit = 1 << data.draw(st.integers(0, 7))
        folder.write_bytes("record", whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        assert damage(folder, "record") == CORRUPT


@given(RECORDS.filter(bool))
def test_a_record_is_sealed_once(record: dict) -> None:
    assert sealed(sealed(record)) == sealed(record)
    assert list(sealed(record))[:-1] == list(record)


def test_a_record_of_an_earlier_version_passes(tmp_path) -> None:
    folder = Folder(str(tmp_path))
    assert damage(folder, "record") == MISSING
    (tmp_path / "record").write_text(json.dumps({"dim": 4, "shards": 2}))
    assert damage(folder, "record") == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "7", '"x"', "[" * 100_000])
def test_what_is_no_record_is_corrupt(tmp_path, content: str) -> None:
    (tmp_path / "record").write_text(content)
    assert damage(Folder(str(tmp_path)), "record") == CORRUPT
