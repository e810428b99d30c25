"""What a person reads before and after a run."""

from __future__ import annotations

from typing import Any

import yaml

from pds_ray.artifacts import RunFolder
from pds_ray.errors import printable
from pds_ray.pipeline import COUNTED, Plan, public, stages
from pds_ray.storage import Folder
from pds_ray.upkeep import Problem


def say(*lines: str) -> None:
    """Prints lines in which names and notes of strangers may stand."""
    for line in lines:
        print(printable(line))


def print_plan(plan: Plan) -> None:
    """What would be done, and the resolved configuration as YAML."""
    config, shown = plan.config, public(plan.config)
    done = plan.store.committed() if plan.store.folder.exists(plan.store.STORE) else set()
    embedded = sum(shard.name in done for shard in plan.shards)
    say(f"source    {shown['source']}: {len(plan.shards):,} shards, {embedded:,} embedded")
    say(f"method    {config.method}")
    say(f"encoder   {plan.encoder.name}: width {plan.encoder.dim}, pictures {plan.encoder.preprocess.size} px")
    say(f"decoder   {dict(plan.decoder.load_args).get('model', plan.decoder.name)}")
    for note in plan.decoder.notes:
        say(f"note      {note}")
    say(f"result    {config.pairs:,} pairs in {plan.run.distilled.shown}")
    say(f"stages    {' -> '.join(plan.stages)}")
    say("", "# the resolved configuration, usable with --config")
    print(yaml.safe_dump(shown, sort_keys=False), end="")


def print_summary(out: str, manifest: dict[str, Any]) -> None:
    """What went in, what was dropped and why, what came out, how fast, and where it is."""
    method = manifest.get("config", {}).get("method", "pds")
    entries = manifest["stages"]
    counts = {name: entry.get("counts", {}) for name, entry in entries.items()}
    embed, prune, match = counts.get("embed", {}), counts.get("prune", {}), counts.get("match", {})
    prototypes = counts.get("prototypes") or counts.get("select", {})
    say("")
    if embed:
        say(f"in            {embed['pairs']:,} pairs of {embed['images']:,} images, {embed['shards']:,} shards")
        if embed.get("failed_shards"):
            say(f"failed        {embed['failed_shards']:,} shards; pds-ray retry-failed {out} tries them again")
        say(f"bad samples   {embed['bad']:,}")
        for reason, count in embed["reasons"].items():
            say(f"  {reason:<20} {count:,}")
    if prune:
        say(f"pruned        {prune['dropped']:,} pairs of lowest image-caption cosine")
    if match:
        say(f"not shared    {match['pairs_not_shared']:,} pairs outside matched clusters")
        say(f"pairless      {match['pairless']:,} of {match['clusters']:,} couples, {match['pairless_policy']}")
    if prototypes:
        duplicates = {**prototypes, **counts.get("caption", {})}["duplicate_captions"]
        say(f"method        {method}")
        say(f"out           {prototypes['prototypes']:,} pairs, {duplicates:,} with a caption of another")
    for note in manifest.get("notes", []):
        say(f"note          {note}")
    say("", f"{'stage':<12} {'status':<12} {'seconds':>8}  rate")
    for name in stages(method):
        entry = entries.get(name)
        if entry is None:
            say(f"{name:<12} to do")
            continue
        say(f"{name:<12} {entry['status']:<12} {entry.get('seconds', 0):>8.1f}  {_rate(name, entry)}")
    finished = entries.get("materialize", {}).get("status") == "done"
    run = RunFolder(Folder(out))
    say("", f"{'result':<13} {run.distilled.shown}" if finished else f"{'run folder':<13} {run.folder.shown}")


def _rate(name: str, entry: dict[str, Any]) -> str:
    unit, key = COUNTED[name]
    counts, seconds = entry.get("counts", {}), entry.get("seconds", 0)
    if not (unit and counts.get(key) and seconds):
        return ""
    return f"{counts[key] / seconds:,.0f} {unit}/s{_idle(counts)}"


def _idle(counts: dict[str, Any]) -> str:
    """The share of their time that the actors of a stage, and their GPUs, waited."""
    for actor in ("encoder", "decoder"):
        busy, idle = counts.get(f"{actor}_busy_s", 0), counts.get(f"{actor}_idle_s", 0)
        if busy:
            return f", {actor}s idle {idle / (busy + idle):.0%}"
    return ""


def print_status(found: dict[str, Any]) -> None:
    """Where a run stands, on a few lines."""
    done = [stage for stage, state in found["stages"].items() if state == "done"]
    say(f"{'run':<10} {found['run']}")
    say(f"{'state':<10} {found['state']}, {len(done)} of {len(found['stages'])} stages done")
    progress = found["progress"]
    if found["stage"]:
        where = f" ({progress['label']})" if progress and progress["label"] != found["stage"] else ""
        say(f"{'stage':<10} {found['stage']}{where}")
    if progress:
        total = f" of {progress['total']:,}" if progress["total"] else ""
        rate = f", {progress['per_s']:,.1f}/s" if progress["per_s"] else ""
        eta = f", {progress['eta_s'] / 60:,.1f} min to go" if progress["eta_s"] else ""
        note = f", {progress['note']}" if progress["note"] else ""
        say(f"{'progress':<10} {progress['done']:,}{total} {progress['unit']}{rate}{eta}{note}")
    if found["host"]:
        say(f"{'driver':<10} on {found['host']}, heard of {found['heartbeat_age_s']:.0f} s ago")
    if found["state"] == "silent":
        say("its driver gives no sign of life; if it is gone, the same command continues the run")


def print_problems(files: int, problems: list[Problem]) -> None:
    """What `verify` found."""
    for problem in problems:
        say(f"{problem.stage:<12} {problem.name}: {problem.what}")
    say(f"{files:,} files checked, " + (f"{len(problems):,} problems" if problems else "all as written"))


MEASURE_TITLES = {"tr@1": "TR@1", "tr@5": "TR@5", "tr@10": "TR@10", "ir@1": "IR@1", "ir@5": "IR@5", "ir@10": "IR@10"}


def print_evaluation(result: dict[str, Any]) -> None:
    """An evaluation as a table: mean and deviation over the seeds, in percent."""
    about, test = result["set"], result["test"]
    say("", f"set       {about['path']}: {about['pairs']:,} pairs, method {about['method']}")
    say(f"test      {test['source']}: {test['images']:,} images, {test['captions']:,} captions")
    if result["val"]:
        say(f"val       {result['val']['source']}: {result['val']['images']:,} images")
    say(f"protocol  {result['protocol']['name']}")
    for name in ("test", "val"):
        bad = (result[name] or {}).get("bad", {})
        if bad:
            say(f"bad       {sum(bad.values()):,} samples of {name} left out: {bad}")
    for note in result["notes"]:
        say(f"note      {note}")
    rows = [([part["name"], str(len(part["trials"]))], part) for part in result["backbones"]]
    if len(rows) > 1:
        rows.append((["average", ""], result))
    _print_recalls(["backbone", "seeds"], rows, max(len(part["trials"]) for part in result["backbones"]))
    say("", f"result    {result['file']}")


def print_comparison(out: str, table: dict[str, Any]) -> None:
    """A comparison as a table: methods by size, on the average of the backbones."""
    test = table["test"]
    say("", f"source    {table['source']}")
    say(f"test      {test['source']}: {test['images']:,} images, {test['captions']:,} captions")
    names = sorted({cell["backbone"] for cell in table["cells"]} - {"average"})
    say(f"protocol  {table['protocol']['name']}; average of {', '.join(names)}; {table['seeds']} seeds")
    for note in table["notes"]:
        say(f"note      {note}")
    cells = [cell for cell in table["cells"] if cell["backbone"] == "average"]
    cells.sort(key=lambda cell: cell["pairs"])  # stable: methods stay in their order
    rows = [([str(cell["pairs"]), cell["method"]], cell) for cell in cells]
    _print_recalls(["pairs", "method"], rows, table["seeds"])
    say("", f"result    {Folder(out).shown}: comparison.json, comparison.csv")


def _print_recalls(titles: list[str], rows: list[tuple[list[str], dict[str, Any]]], seeds: int) -> None:
    """A deviation is shown where there are several seeds for it."""
    widths = [max(len(title), *(len(cells[i]) for cells, _ in rows)) for i, title in enumerate(titles)]
    measures = {**MEASURE_TITLES, "r_mean": "r_mean"}

    def line(left: list[str], right: list[str]) -> str:
        return "  ".join([text.ljust(width) for text, width in zip(left, widths, strict=True)] + right)

    say("", line(titles, [title.rjust(11) for title in measures.values()]))
    for cells, part in rows:
        deviation = {name: f" ± {part['std'][name]:3.1f}" if seeds > 1 else "" for name in measures}
        say(line(cells, [f"{part['mean'][name]:5.1f}{deviation[name]}".rjust(11) for name in measures]))
