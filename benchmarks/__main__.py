"""Run rows of the table.

    python -m benchmarks 1 --repeats 3 --json runs/kmeans.json
    python -m benchmarks all --write

Data and the files of both sides go to a folder that is removed at the end, unless a row fails
(--keep keeps it, with the prepared data, for the next call). `--write` puts the figures into
benchmarks/results.json and the marked section of benchmarks/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import traceback
from pathlib import Path

from benchmarks import results
from benchmarks.measure import AFTER, PREPARE, ROOT, Check, Found, Row, Task, run_part
from benchmarks.rows import ROWS, load_row

WORK = ROOT / "runs" / "benchmarks"


def run_row(row: Row, repeats: int, quick: bool, work: Path) -> results.Result:
    """Prepare, run the sides in turn, inspect the files that they left, and judge."""
    at = results.commit()  # before: it may change meanwhile
    command = f"python -m benchmarks {row.number} --repeats {repeats}" + " --quick" * quick
    if lacking := row.lacking():
        return results.result(
            row, {}, {}, [Check("", f"not measured: {lacking}", None)], command, quick, at
        )
    data = work / "data"
    if not (data / "ready").exists():
        shutil.rmtree(work, ignore_errors=True)
        data.mkdir(parents=True)
        run_part(row.number, PREPARE, Task(data, data, quick))
        (data / "ready").touch()
    runs: dict[str, list[Found]] = {name: [] for name in row.sides}
    for repeat in range(repeats):
        for name, found in runs.items():
            out = work / f"{name}-{repeat}"
            shutil.rmtree(out, ignore_errors=True)
            found.append(run_part(row.number, name, Task(data, out, quick)))
            done = f"row {row.number}, {name}, {repeat + 1} of {repeats}"
            print(f"{done}: {found[-1]['seconds']:.3f} s", file=sys.stderr)
    (work / "runs.json").write_text(json.dumps(runs))  # hours of work, kept if the rest fails
    afterwards = run_part(row.number, AFTER, Task(data, work, quick)) if row.after else {}
    return results.result(row, runs, afterwards, row.checks(runs, afterwards), command, quick, at)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure side by side."
    )
    parser.add_argument(
        "rows",
        nargs="+",
        help="numbers, or all: " + ", ".join(f"{n} {name}" for n, name in ROWS.items()),
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes: a test that it works, its figures say nothing",
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--write", action="store_true", help="into benchmarks/results.json and RESULTS.md, too"
    )
    parser.add_argument(
        "--work", type=Path, default=WORK, help=f"scratch folder, default {WORK.relative_to(ROOT)}"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the scratch folder, and with it the prepared data"
    )
    args = parser.parse_args()
    if args.rows == ["all"]:
        numbers = list(ROWS)
    elif all(text.isdecimal() and int(text) in ROWS for text in args.rows):
        numbers = [int(text) for text in args.rows]
    else:
        parser.error(f"rows are all, or of {', '.join(map(str, ROWS))}")
    if args.write and args.quick:
        parser.error("--quick figures say nothing: drop --write")
    done: list[results.Result] = []
    failed = False
    for number in numbers:
        work = args.work.absolute() / f"{number}{'-quick' * args.quick}"
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
        try:
            done.append(run_row(load_row(number), args.repeats, args.quick, work))
        except Exception:  # in a part or a check: the other rows do not depend on it
            traceback.print_exc()
            print(f"benchmarks: row {number} failed", file=sys.stderr)
            failed = True
            continue
        except BaseException:  # interrupted
            shutil.rmtree(work, ignore_errors=True)
            raise
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
        if args.json:  # after each row, as a later one may fail
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(done, indent=1) + "\n")
        if args.write:
            results.write(done[-1:])
    print(results.tables(done))
    raise SystemExit(failed)


if __name__ == "__main__":
    # the part that runs shall end, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    main()
