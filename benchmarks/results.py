"""Write results of rows as JSON and as the tables in the marked section of RESULTS.md."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from benchmarks.measure import GIB, Check, Found, Row, Runs
from pds_ray.planning.bench import cpu_name
from pds_ray.store.manifest import versions

FOLDER = Path(__file__).parent
RESULTS, MARKDOWN = FOLDER / "results.json", FOLDER / "RESULTS.md"
BEGIN, END = "<!-- measured: begin, written by `make bench` -->", "<!-- measured: end -->"
MEASURES = ("seconds", "peak_gib", "driver_peak_gib", "worker_peak_gib", "process_seconds")

Result = dict[str, Any]


def machine() -> dict[str, Any]:
    """Describe this machine."""
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB),
        "gpu": gpu(),
    }


def gpu() -> str | None:
    """Return the name of the first GPU, without loading torch; None if there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(
            asked, capture_output=True, text=True, check=True
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return names[0] if names else None


def commit() -> str | None:
    """Return the short commit of the checkout, with `+` if the code differs; None without git."""
    changed = ["status", "--porcelain", "-uno", "--", "../pds_ray", "*.py"]
    try:
        head, differences = (
            subprocess.run(
                ["git", *asked], capture_output=True, text=True, check=True, cwd=FOLDER
            ).stdout.strip()
            for asked in (["rev-parse", "--short", "HEAD"], changed)
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + "+" * bool(differences)


def spread(values: list[float]) -> dict[str, Any]:
    """Return median, smallest, largest and all values in their order."""
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "all": values,
    }


def result(
    row: Row,
    runs: Runs,
    afterwards: Found,
    checks: list[Check],
    command: str,
    quick: bool,
    at: str | None = None,
) -> Result:
    """Return a row as JSON; `at` is the commit that was measured."""
    sides = {
        name: {
            **{measure: spread([one[measure] for one in found]) for measure in MEASURES},
            "found": [
                {key: value for key, value in one.items() if key not in MEASURES} for one in found
            ],
        }
        for name, found in runs.items()
    }
    return {
        "row": row.number,
        "what": row.what,
        "against": row.against,
        "notes": row.notes,
        "command": command,
        "quick": quick,
        "commit": at,
        "machine": machine(),
        "versions": versions(),
        "sides": sides,
        "afterwards": afterwards,
        "checks": [asdict(check) for check in checks],
    }


def tables(results: list[Result]) -> str:
    """Return two tables as Markdown: the targets, and the figures of every side."""
    lines = [
        "| # | what | against | to reach | found | reached |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in results:
        for number, check in enumerate(one["checks"]):
            head = f"{one['row']} | {one['what']} | {one['against']}" if number == 0 else " | | "
            lines.append(
                f"| {head} | {check['wanted']} | {check['found']} | {_verdict(check['reached'])} |"
            )
    lines += [
        "",
        "| # | side | seconds, median (range) | peak GiB | driver | largest worker |",
        "| --- " * 6 + "|",
    ]
    for one in results:
        for name, side in one["sides"].items():
            seconds = side["seconds"]
            middle, low, high = (_short(seconds[name]) for name in ("median", "min", "max"))
            memory = (side[f"{part}peak_gib"]["median"] for part in ("", "driver_", "worker_"))
            peaks = " | ".join(f"{gib:.2f}" for gib in memory)
            lines.append(f"| {one['row']} | {name} | {middle} ({low} to {high}) | {peaks} |")
    lines += [
        "",
        *(f"{one['row']}. {one['notes']} `{one['command']}`{_at(one)}" for one in results),
    ]
    return "\n".join(lines)


def _at(result: Result) -> str:
    return f", at {result['commit']}" if result.get("commit") else ""


def _verdict(reached: bool | None) -> str:
    return {True: "yes", False: "**no**", None: ""}[reached]


def _short(seconds: float) -> str:
    return f"{seconds:.3f}" if seconds < 1 else f"{seconds:.1f}"


def section(results: list[Result]) -> str:
    """Return the marked section: machines, versions and the tables."""
    settings: list[tuple[Any, Any]] = []
    rows: list[list[str]] = []
    for one in results:
        setting = one["machine"], one["versions"]
        if setting not in settings:
            settings.append(setting)
            rows.append([])
        rows[settings.index(setting)].append(str(one["row"]))
    lines = []
    for (about, packages), numbers in zip(settings, rows, strict=True):
        named = ", ".join(f"{name} {version}" for name, version in packages.items())
        lines.append(
            f"Rows {', '.join(numbers)}: {about['cpu']}, {about['cores']} cores, "
            f"{about['memory_gib']} GiB, {about['gpu'] or 'no GPU'}; {named}.\n"
        )
    return "\n".join([BEGIN, "", *lines, tables(results), "", END])


def write(fresh: list[Result], results: Path = RESULTS, markdown: Path = MARKDOWN) -> None:
    """Replace the results of rows in the JSON and in the marked section of the text.

    A row that was not measured replaces none. Raises ValueError if the text has no such section.
    """
    known = {
        one["row"]: one for one in (json.loads(results.read_text()) if results.exists() else [])
    }
    known |= {one["row"]: one for one in fresh if one["sides"] or one["row"] not in known}
    ordered = [known[number] for number in sorted(known)]
    text = markdown.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{markdown} has no section from {BEGIN} to {END}")
    results.write_text(json.dumps(ordered, indent=1) + "\n")
    markdown.write_text(before + section(ordered) + after)
