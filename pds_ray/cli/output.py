"""Text for a person, before and after a run: plans, summaries, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import yaml

from pds_ray import catalog
from pds_ray.config import RunConfig, public
from pds_ray.engine.upkeep import Problem
from pds_ray.errors import printable, without_secrets
from pds_ray.methods.base import Run, Stage
from pds_ray.store.evaluation_folder import (
    AVERAGE,
    COMPARISON,
    RECALL_TITLES,
    TABLE,
    frontier,
    used_by_evaluations,
    used_parts,
)
from pds_ray.store.manifest import rate
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder

if TYPE_CHECKING:  # it costs a quarter of a second
    from pds_ray.planning.figures import Measured
    from pds_ray.planning.phases import Demand
    from pds_ray.planning.plan import Plan as Forecast
    from pds_ray.stages.experts import WantedExperts


def say(*lines: str) -> None:
    """Print lines that may hold names and notes of strangers."""
    for line in lines:
        print(printable(line))


def print_plan(run: Run) -> None:
    """Print what the run would do, and the resolved configuration: together a file of YAML."""
    config, shown = run.config, public(run.config)
    done = run.store.committed() if run.store.folder.exists(run.store.STORE) else set()
    embedded = sum(shard.name in done for shard in run.shards)
    say(f"# source    {shown['source']}: {len(run.shards):,} shards, {embedded:,} embedded")
    say(f"# method    {config.method}")
    size = run.encoder.preprocess.size
    say(f"# encoder   {run.encoder.name}: width {run.encoder.dim}, images {size} px")
    say(f"# decoder   {dict(run.decoder.load_args).get('model', run.decoder.name)}")
    for note in run.decoder.notes:
        say(f"# note      {note}")
    say(f"# result    {_asked(config)} in {run.folder.distilled.shown}")
    say(f"# stages    {' -> '.join(run.method.names)}")
    if "optimise" in run.method.names:
        _print_optimisation(config)
    say("", "# the resolved configuration: all of this is a file for --config")
    print(yaml.safe_dump(shown, sort_keys=False), end="")


def _print_optimisation(config: RunConfig) -> None:
    """Print what experts and an optimisation would take; the model is built for it."""
    from pds_ray.planning import optimisation as costs

    wish, experts, model = config.distill, config.experts, costs.student_of(config)
    weights = f"{model.weights:,} weights, images {model.side} px"
    disk = costs.expert_bytes(config, 0, 0)
    say(
        f"# experts   {experts.count} of {experts.epochs} epochs, {experts.backbone}: {weights}; "
        f"{disk:,.0f} bytes of snapshots"
    )
    steps = f" of {wish.steps} steps" if wish.steps else ""
    memory, flop = costs.memory_bytes(config), costs.optimisation_flop(config)
    say(
        f"# optimise  {wish.iterations:,} iterations{steps}: {flop / 1e12:,.1f} TFLOP, about "
        f"{memory / 2**30:,.2f} GiB of memory"
    )


def print_experts_plan(wanted: WantedExperts, todo: dict[str, int]) -> None:
    """Print which experts would be trained on what, and what they take on the disk."""
    config = wanted.config
    images = f"about {todo['images']:,} images, side {wanted.square.size} px"
    say(f"source        {without_secrets(wanted.source.uri)}: {images}")
    say(f"backbone      {wanted.backbone.name}, trained: {config.train}")
    say(f"text encoder  {wanted.encoder.name}: width {wanted.encoder.dim}")
    say(f"experts       {config.count} of {config.epochs} epochs, {todo['weights']:,} weights each")
    say(f"to do         {todo['epochs']:,} epochs, {todo['bytes']:,} bytes")
    say(f"store         {wanted.store.folder.shown}")


def print_experts(store: str, counts: dict[str, Any]) -> None:
    """Print what the experts were trained on, what they are, and where."""
    captions = f"{counts['captions']:,} captions"
    say("", f"in            {counts['images']:,} images, {captions}")
    say(f"bad samples   {sum(counts['bad'].values()):,}")
    for reason, count in counts["bad"].items():
        say(f"  {reason:<20} {count:,}")
    weights = ", ".join(f"{name} {count:,}" for name, count in counts["weights"].items())
    say(f"experts       {counts['experts']:,} of {counts['epochs']:,} epochs")
    say(f"weights       {weights}; {counts['snapshot_bytes']:,} bytes in all snapshots")
    say(f"loss          {counts['mean_loss']:.4f} in the last step, a mean over the experts")
    say(f"trained       {counts['trained']:,} epochs in {counts['seconds']:,.1f} s")
    say("", f"store         {Folder(store).shown}")


def _asked(config: RunConfig) -> str:
    """Return the size of the set that a run is to make, in words."""
    if not config.budget:
        return f"{config.pairs:,} pairs"
    pairs = f"{config.pairs:,} pairs" if config.pairs else "as many pairs as fit"
    return f"{pairs} in {config.budget_bytes:,} bytes of images and captions"


def print_summary(out: str, manifest: dict[str, Any]) -> None:
    """Print what went in, what was dropped and why, what came out, how fast, and where it is."""
    method = manifest.get("config", {}).get("method", "pds")
    entries = manifest["stages"]
    counts = {name: entry.get("counts", {}) for name, entry in entries.items()}
    say("")
    _print_counts(out, method, counts)
    for note in manifest.get("notes", []):
        say(f"note          {note}")
    say("", f"{'stage':<12} {'status':<12} {'seconds':>8}  rate")
    for stage in catalog.recorded_method(manifest.get("config", {})).stages:
        entry = entries.get(stage.name)
        if entry is None:
            say(f"{stage.name:<12} to do")
            continue
        seconds = f"{entry.get('seconds', 0):>8.1f}"
        say(f"{stage.name:<12} {entry['status']:<12} {seconds}  {_rate(stage, entry)}")
    finished = entries.get("materialize", {}).get("status") == "done"
    run = RunFolder(Folder(out))
    where = f"{'result':<13} {run.distilled.shown}"
    if size := counts.get("materialize", {}).get("size"):
        parts = f"images {size['image_bytes']:,} and captions {size['caption_bytes']:,}"
        say(
            "",
            f"{'size':<13} {size['pairs']:,} pairs, {size['bytes']:,} bytes ({parts}), "
            f"{size['pixels']:,} pixels",
        )
        if learned := size.get("learned_bytes"):
            say(f"{'learned':<13} {learned:,} bytes of float images, text vectors and the like")
            for used in used_by_evaluations(run.folder):
                say(f"{'':<13} used {used}")
    say("", where if finished else f"{'run folder':<13} {run.folder.shown}")


def _print_counts(out: str, method: str, counts: dict[str, dict[str, Any]]) -> None:
    embed, prune, match = counts.get("embed", {}), counts.get("prune", {}), counts.get("match", {})
    makers = ("prototypes", "select", "cover", "start")
    prototypes = next((counts[name] for name in makers if counts.get(name)), None)
    if embed:
        images = f"{embed['images']:,} images, {embed['shards']:,} shards"
        say(f"in            {embed['pairs']:,} pairs of {images}")
        if embed.get("failed_shards"):
            _print_failed(out, embed)
        say(f"bad samples   {embed['bad']:,}")
        for reason, count in embed["reasons"].items():
            key, detail = embed.get("examples", {}).get(reason, ("", ""))
            example = f"  such as {key}: {detail}" if key else f"  {detail}"
            say(f"  {reason:<20} {count:,}{example}".rstrip())
    if chosen := counts.get("budget"):
        saving = [f"{chosen['image_size']} px", chosen["format"], str(chosen["quality"] or "")]
        asked = f"{chosen['budget']:,} bytes: {chosen['pairs']:,} pairs"
        say(f"budget        {asked}, {' '.join(saving).strip()}")
    if prune:
        say(f"pruned        {prune['dropped']:,} pairs of lowest image-caption cosine")
    if match:
        say(f"not shared    {match['pairs_not_shared']:,} pairs outside matched clusters")
        empty = f"{match['pairless']:,} of {match['clusters']:,} matches"
        say(f"pairless      {empty}, {match['pairless_policy']}")
    if prototypes:
        duplicates = {**prototypes, **counts.get("caption", {})}["duplicate_captions"]
        made = f"{prototypes['prototypes']:,} pairs"
        say(f"method        {method}")
        say(f"out           {made}, {duplicates:,} with the caption of another")
        if real := counts.get("decode", {}).get("real"):
            say(f"real          {real:,} images are real ones: those decoded failed")
        written = counts.get("materialize", {})
        if text := written.get("fewer") or prototypes.get("fewer"):
            say(f"fewer         {text}")


def _print_failed(out: str, embed: dict[str, Any]) -> None:
    """Print which shards could not be read, or not to their end, and why."""
    advice = f"once they are mended, pds-ray retry-failed {out} reads them again"
    say(f"failed        {embed['failed_shards']:,} of {embed['shards']:,} shards; {advice}")
    named = embed.get("failed", {})
    for shard, problem in named.items():
        say(f"  {shard:<20} {problem}")
    if len(named) < embed["failed_shards"]:
        say(f"  and {embed['failed_shards'] - len(named):,} more")


def _rate(stage: Stage, entry: dict[str, Any]) -> str:
    per_s = rate(entry, stage.counted)
    if not per_s:
        return ""
    return f"{_number(per_s)} {stage.unit}/s{_idle(entry['counts'])}"


def _idle(counts: dict[str, Any]) -> str:
    """Return the share of their time that a stage's actors, and their GPUs, waited."""
    for actor in ("encoder", "decoder"):
        busy, idle = counts.get(f"{actor}_busy_s", 0), counts.get(f"{actor}_idle_s", 0)
        if busy:
            return f", {actor}s idle {idle / (busy + idle):.0%}"
    return ""


def print_status(found: dict[str, Any]) -> None:
    """Print the state and the progress of a run, on a few lines."""
    done = [stage for stage, state in found["stages"].items() if state == "done"]
    say(f"{'run':<10} {found['run']}")
    say(f"{'state':<10} {found['state']}, {len(done)} of {len(found['stages'])} stages done")
    progress = found["progress"]
    if found["stage"]:
        where = (
            f" ({progress['label']})" if progress and progress["label"] != found["stage"] else ""
        )
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
    """Print what `verify` found."""
    for problem in problems:
        say(f"{problem.stage:<12} {problem.name}: {problem.what}")
    say(
        f"{files:,} files checked, "
        + (f"{len(problems):,} problems" if problems else "all as written")
    )


def print_sizes(sizes: dict[str, int]) -> None:
    """Print files with their bytes, and the sum."""
    rows = {**sizes, "bytes together": sum(sizes.values())}
    for name, size in rows.items():
        say(f"{size:>15,}  {name}")


def print_evaluation(result: dict[str, Any]) -> None:
    """Print an evaluation as a table: mean and deviation over the seeds, in percent."""
    about, test = result["set"], result["test"]
    say("", f"set       {about['path']}: {about['pairs']:,} pairs, method {about['method']}")
    say(f"test      {test['source']}: {test['images']:,} images, {test['captions']:,} captions")
    if result["val"]:
        say(f"val       {result['val']['source']}: {result['val']['images']:,} images")
    say(f"protocol  {result['protocol']['name']}")
    for used in used_parts(result["backbones"]):
        say(f"learned   parts used with {used}")
    for name in ("test", "val"):
        bad = (result[name] or {}).get("bad", {})
        if bad:
            say(f"bad       {sum(bad.values()):,} samples of {name} left out: {bad}")
    for note in result["notes"]:
        say(f"note      {note}")
    rows = [([part["name"], str(len(part["trials"]))], part) for part in result["backbones"]]
    if len(rows) > 1:
        rows.append(([AVERAGE, ""], result))
    _print_recalls(
        ["backbone", "seeds"], rows, max(len(part["trials"]) for part in result["backbones"])
    )
    say("", f"result    {result['file']}")


def print_comparison(out: str, table: dict[str, Any]) -> None:
    """Print a comparison as a table: methods by size, on the average of the backbones."""
    test = table["test"]
    say("", f"source    {table['source']}")
    say(f"test      {test['source']}: {test['images']:,} images, {test['captions']:,} captions")
    names = sorted({cell["backbone"] for cell in table["cells"]} - {AVERAGE})
    protocol, average = table["protocol"]["name"], ", ".join(names)
    say(f"protocol  {protocol}; average of {average}; seeds: {table['seeds']}")
    if "set_seeds" in table:
        say(f"sets      {table['set_seeds']} per row; deviations: over models / over sets")
    for note in table["notes"]:
        say(f"note      {note}")
    for used in used_parts(table["cells"]):
        say(f"learned   parts used by {used}")
    cells = [cell for cell in table["cells"] if cell["backbone"] == AVERAGE]
    # stable: methods stay in their order
    cells.sort(key=lambda cell: cell.get("budget") or cell["pairs"])
    # earlier versions did not count bytes
    counts = ["pairs", "bytes"] if all("bytes" in cell for cell in cells) else ["pairs"]
    rows = [([*(f"{cell[name]:,.0f}" for name in counts), cell["method"]], cell) for cell in cells]
    _print_recalls([*counts, "method"], rows, table["seeds"])
    if "bytes" in counts and len({cell["bytes"] for cell in cells}) > 1:
        _print_frontiers(cells)
    say("", f"result    {Folder(out).shown}: {COMPARISON}, {TABLE}")


def _print_frontiers(cells: list[dict[str, Any]]) -> None:
    """Print which sets no smaller one reaches, by bytes and by what training costs."""
    for cost, title in (("bytes", "bytes"), ("pixels_per_epoch", "pixels per epoch")):
        say("", f"frontier  r_mean over {title}: no set of as many or fewer reaches it")
        for cell in frontier(cells, cost):
            size = f"{cell[cost]:>16,.0f} {title}, {cell['pairs']:>7,.0f} pairs"
            say(f"{size}  {cell['mean']['r_mean']:5.1f}  {cell['method']}")


def _print_recalls(
    titles: list[str], rows: list[tuple[list[str], dict[str, Any]]], seeds: int
) -> None:
    """Print rows of recalls, with their deviations if there are several seeds."""
    widths = [
        max(len(title), *(len(cells[i]) for cells, _ in rows)) for i, title in enumerate(titles)
    ]
    measures = {**RECALL_TITLES, "r_mean": "r_mean"}

    def line(left: list[str], right: list[str]) -> str:
        return "  ".join(
            [text.ljust(width) for text, width in zip(left, widths, strict=True)] + right
        )

    width = 11 + (6 if any("set_std" in part for _, part in rows) else 0)
    say("", line(titles, [title.rjust(width) for title in measures.values()]))
    for cells, part in rows:
        say(line(cells, [_recall(part, name, seeds).rjust(width) for name in measures]))


def _recall(part: dict[str, Any], name: str, seeds: int) -> str:
    """Return a mean with its deviations: over models, and over sets where there are several."""
    deviations = [part["std"][name]] if seeds > 1 or "set_std" in part else []
    deviations += [part["set_std"][name]] if "set_std" in part else []
    spread = " / ".join(f"{deviation:3.1f}" for deviation in deviations)
    return f"{part['mean'][name]:5.1f}" + (f" ± {spread}" if spread else "")


def print_rates(path: str, rates: dict[str, Any]) -> None:
    """Print the rates that were measured, with their ranges."""
    machine = rates["machine"]
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    memory, load = f"{machine['memory_bytes'] / 2**30:.0f} GiB", machine["load"][0]
    say("", f"machine   {machine['cpu']}, {machine['cpus']} CPUs, {memory}; {gpus}")
    if load > machine["cpus"] / 4:
        busy = f"the machine was busy (load {load:.1f})"
        say(f"note      {busy}: starts are too long, rates hold roughly")
    say(f"encoder   {rates['encoder']['name']}")
    say(f"decoder   {rates['decoder']['name']}, {rates['decoder']['steps']} steps", "")
    figures = {
        f"{name} ({uri})": entry
        for uri, found in rates["sources"].items()
        for name, entry in found.items()
    }
    for name, entry in {**figures, **rates["figures"]}.items():
        spread = (
            f"{_number(entry['worst'])} to {_number(entry['best'])}" if entry["repeats"] > 1 else ""
        )
        unit = _unit(entry["unit"], entry["per"])
        say(f"{name:<30} {_number(entry['value']):>9} {unit:<22} {spread}")
    say("", f"result    {path}")


def _unit(unit: str, per: str) -> str:
    return f"{unit} per {per}" if unit in ("s", "bytes") else f"{unit}/s per {per}"


def _number(value: float) -> str:
    if value >= 1e7:
        return f"{value:.2e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def print_forecast(plan: Forecast, measured: Measured | None) -> None:
    """Print the estimate of a run by stage, and how each figure comes about."""
    work, cluster = plan.workload, plan.cluster
    size = f"{_bytes(work.bytes)}, {work.shards:,} shards"
    say(f"source    {work.pairs:,} pairs of {work.images:,} images, {size}")
    gpus = f"{cluster.gpus} x {cluster.gpu}" if cluster.gpus else "no GPU"
    say(f"machines  {gpus}, {cluster.cpus:,} CPU cores")
    if measured is None:
        say("rates     assumed, every one: pds-ray bench measures them")
    else:
        machine = ", ".join(measured.gpus) or measured.cpu
        say(f"rates     measured on {machine}, {measured.date}, or as said below")
    say(f"prices    {plan.prices}")
    _print_stages(plan)
    best, worst = _time(plan.seconds_best), _time(plan.seconds_worst)
    say("", f"range     {best} to {worst}, all rates at their best or worst")
    say(f"also      {_usd(plan.storage_usd_month)} USD a month to keep what is written")
    largest = max(plan.stages, key=lambda stage: stage.driver_bytes)
    say(f"also      {_bytes(largest.driver_bytes)} of memory on the driver, in {largest.name}")
    if work.remote:
        say(f"also      {_usd(plan.egress_usd)} USD if the source is read from another region")
    if cluster.gpus and _fit_on_cpu(plan):
        advice = "pds-ray bench measures a FAISS that uses GPUs"
        say(f"note      k-means is planned on CPUs, as with faiss-cpu; {advice}")
    hours = "GPU-h are of GPUs at work; USD are of all machines, waiting ones too"
    say("", f"how each time comes about ({hours})")
    for stage in plan.stages:
        say("", f"{stage.name}: start {_time(stage.start.value)} [{stage.start.origin}]")
        for phase in stage.phases:
            for number, demand in enumerate(phase):
                say(("  + " if number else "  ") + _formula(demand))


def _print_stages(plan: Forecast) -> None:
    def row(name: str, time: str, *columns: str) -> str:
        return f"{name:<12} {time:>8}" + "".join(f"{column:>11}" for column in columns)

    titles = ("GPU-h", "core-h", "disk", "network", "obj. store", "USD")
    say("", row("stage", "time", *titles) + "  waits for")
    say(row("start", _time(plan.start.value)))
    for stage in plan.stages:
        hours = [f"{part:,.2f}" if part else "" for part in (stage.gpu_hours, stage.core_hours)]
        sizes = map(_bytes, (stage.disk_bytes, stage.traffic_bytes, stage.store_bytes))
        columns = (*hours, *sizes, _usd(stage.usd))
        say(row(stage.name, _time(stage.seconds), *columns) + f"  {stage.bottleneck}")
    gpu_hours, core_hours, disk, traffic = (
        sum(getattr(stage, name) for stage in plan.stages)
        for name in ("gpu_hours", "core_hours", "disk_bytes", "traffic_bytes")
    )
    columns = (f"{gpu_hours:,.2f}", f"{core_hours:,.2f}", _bytes(disk), _bytes(traffic), "")
    say(row("total", _time(plan.seconds), *columns, _usd(plan.usd)))


def _fit_on_cpu(plan: Forecast) -> bool:
    return any(
        d.rate.unit == "FLOP" and d.rate.per == "core" and d.at_most
        for stage in plan.stages
        if stage.name == "cluster"
        for phase in stage.phases
        for d in phase
    )


def _formula(demand: Demand) -> str:
    rate, unit = demand.rate, demand.rate.per
    limit = f", at most {demand.at_most:,.0f} at once" if demand.at_most else ""
    quotient = f"{_number(demand.work)} {rate.unit} / {_number(rate.value)}"
    spent = _spent(demand.unit_seconds, unit)
    return f"{demand.what}: {quotient} {_unit(rate.unit, unit)} = {spent}{limit} [{rate.origin}]"


def _spent(seconds: float, unit: str) -> str:
    return f"{_number(seconds / 3600)} {unit}-h" if seconds >= 360 else f"{seconds:.1f} {unit}-s"


def _time(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"


def _bytes(size: float) -> str:
    for scale, unit in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= scale:
            return f"{size / scale:,.2f} {unit}"
    return f"{size / 1e3:,.0f} kB" if size else ""


def _usd(usd: float | None) -> str:
    return "unknown" if usd is None else f"{usd:,.2f}"
