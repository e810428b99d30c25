"""Progress as a person wants it: a bar with rate and ETA on a terminal, a line now and then in a log file."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

LOG_INTERVAL_S = 10.0


class _Lines(io.TextIOBase):
    """Turns a bar redrawn in place into lines, for logs."""

    def write(self, text: str) -> int:
        if line := text.strip():
            print(line, file=sys.stderr, flush=True)
        return len(text)


@contextmanager
def progress_bar(label: str, total: int | None, unit: str, done: int = 0) -> Iterator[tqdm]:
    """A bar named `label` counting `unit`s up to `total`, of which `done` were finished earlier.

    On a terminal it is redrawn in place; elsewhere it prints a line every LOG_INTERVAL_S seconds and one at the end.
    Call `.update(n)` for work done and `.set_postfix_str(text, refresh=False)` for what else is worth seeing.
    """
    interactive = sys.stderr.isatty()
    with tqdm(
        total=total,
        initial=done,
        desc=f"{label:<12}",
        unit=f" {unit}",
        file=sys.stderr if interactive else _Lines(),
        mininterval=0.2 if interactive else LOG_INTERVAL_S,
        maxinterval=LOG_INTERVAL_S,
        delay=0 if interactive else 1e-9,  # no line at 0 %
        leave=interactive,
        smoothing=0.1 if interactive else 0,  # a log tells the mean rate
        dynamic_ncols=interactive,
        ascii=None if interactive else True,
        bar_format=None if interactive else "{l_bar}{n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
    ) as bar:
        yield bar
        if not interactive:
            bar.refresh()  # the last line, with the mean rate
