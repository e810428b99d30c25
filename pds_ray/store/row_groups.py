"""Rows of a Parquet file that need not be in memory as a whole."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pds_ray.store.storage import Folder


class RowGroups:
    """Some columns of a Parquet file, of which the row group read last is kept in memory."""

    def __init__(self, folder: Folder, name: str, columns: list[str]) -> None:
        self._folder, self._name, self._columns = folder, name, columns
        self._ends = np.cumsum(folder.row_group_lengths(name))
        self._kept: tuple[int, pa.Table] | None = None

    def rows(self, wanted: range) -> pa.Table:
        """Return the rows of a range, one or more."""
        ends = np.searchsorted(self._ends, [wanted.start, wanted.stop - 1], side="right").tolist()
        groups = range(ends[0], ends[1] + 1)
        before = int(self._ends[groups.start - 1]) if groups.start else 0
        found = pa.concat_tables([self._group(group) for group in groups])
        return found.slice(wanted.start - before, len(wanted))

    def _group(self, group: int) -> pa.Table:
        if self._kept is None or self._kept[0] != group:
            self._kept = None  # before the next one comes beside it
            self._kept = group, self._folder.read_row_group(self._name, group, self._columns)
        return self._kept[1]
