"""Rows by row groups, against slices of the whole table."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.store.row_groups import RowGroups
from pds_ray.store.storage import Folder


def table(rows: int) -> pa.Table:
    return pa.table({"a": np.arange(rows), "b": np.arange(rows) % 7, "c": np.ones(rows)})


@given(st.integers(1, 40), st.integers(1, 50), st.data())
def test_rows_are_those_of_the_table(rows: int, together: int, data: st.DataObject):
    whole = table(rows)
    starts = st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)
    with tempfile.TemporaryDirectory() as place:
        pq.write_table(whole, f"{place}/t.parquet", row_group_size=together)
        found = RowGroups(Folder(place), "t.parquet", ["a", "b"])
        for start in data.draw(starts):
            stop = data.draw(st.integers(start + 1, rows))
            expected = whole.select(["a", "b"]).slice(start, stop - start)
            assert found.rows(range(start, stop)).equals(expected)
        parts = list(Folder(place).read_parts("t.parquet", ["c"]))
    assert [part.num_rows for part in parts[:-1]] == [together] * (len(parts) - 1)
    assert pa.concat_tables(parts).equals(whole.select(["c"]))


def test_rows_in_order_read_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pq.write_table(table(40), tmp_path / "t.parquet", row_group_size=8)
    read: list[int] = []
    plain = Folder.read_row_group

    def counted(self: Folder, name: str, group: int, columns: list[str]) -> Any:
        read.append(group)
        return plain(self, name, group, columns)

    monkeypatch.setattr(Folder, "read_row_group", counted)
    found = RowGroups(Folder(str(tmp_path)), "t.parquet", ["a"])
    for start in range(0, 40, 4):
        found.rows(range(start, start + 4))
    assert read == [0, 1, 2, 3, 4]
    assert found.rows(range(4, 30))["a"].to_pylist() == list(range(4, 30))
    assert read[5:] == [0, 1, 2, 3]


def test_a_table_without_rows_has_no_parts(tmp_path: Path):
    Folder(str(tmp_path)).write_table("t.parquet", table(0))
    parts = Folder(str(tmp_path)).read_parts("t.parquet", ["a"])
    assert sum(part.num_rows for part in parts) == 0
