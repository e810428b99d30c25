"""Entry point of the process of a part, which `measure.run_part` starts."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.measure import AFTER, ANSWER, GIB, PREPARE, Task, peak_rss
from benchmarks.rows import load_row


def main() -> None:
    """Run the part and write its findings as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("row", type=int)
    parser.add_argument("part")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    row = load_row(args.row)
    part = {PREPARE: row.prepare, AFTER: row.after, **row.sides}[args.part]
    assert part is not None
    found = part(Task(args.data, args.out, args.quick))
    (args.out / ANSWER).write_text(json.dumps({**found, "driver_peak_gib": peak_rss() / GIB}))


if __name__ == "__main__":
    main()
