"""The table of the literature in one call: methods x sizes x backbones, on one embedding store.

A method is written `pds`, `random`, ..., or with changes of the configuration behind it, as in
`pds+match.filter=false+protocol.text=captions`: such a row is an ablation. A method that improves a
start may have the start before it: `pds>mdm` is mdm on the set that pds makes. A row may have
several sets, made with seeds that follow each other. Layout of the folder:

comparison.json, comparison.csv    the cells: mean and deviation per method, size and backbone,
                                   with the pairs, bytes and pixels of each set
sets/METHOD-SIZE/                  one run folder per set, of so many pairs or such a budget
embeddings/                        the embeddings they share, one store per way of making them
experts/                           the experts they share, one store per way of training them
evaluation/trials/                 one file per trained model
"""

from __future__ import annotations

import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pds_ray import catalog
from pds_ray.config import METHODS, ConfigError, EvaluateConfig, RunConfig, replace
from pds_ray.distributed.lifetime import session_kept
from pds_ray.engine import evaluate as evaluation
from pds_ray.engine.optimisation import experts_key
from pds_ray.engine.plan import make_run, relevant
from pds_ray.engine.run import distill
from pds_ray.errors import without_secrets
from pds_ray.methods.base import Run
from pds_ray.recipes import protocol_name
from pds_ray.stages.trial import MEASURES, Candidate, over_sets
from pds_ray.store.evaluation_folder import (
    AVERAGE,
    COMPARISON,
    EVALUATION,
    TABLE,
    experts_name,
    set_name,
    store_name,
)
from pds_ray.store.manifest import fingerprint
from pds_ray.store.storage import Folder

SCHEMA_VERSION = 1
ABLATIONS = (
    "pds+match.filter=false",
    "pds+cluster.modality=joint",
    "pds+cluster.modality=image",
    "pds+cluster.modality=text",
    "pds+prune.ratio=0",
    "pds+decode.decoder=nearest",
    "pds+decode.condition=caption",
    "pds+caption.nearest_to=prototype",
    "pds+protocol.text=prototypes",
)
"""The variations of the paper, one at a time; another encoder is `pds+embed.encoder=NAME`."""
FIXED = ("source", "out", "method", "pairs", "budget", "embed.store", "experts.store")
"""Options that all rows of a comparison share."""
STARTS = ">"
"""The sign between a start and the method that improves it."""
FROZEN = ("text_head", "heads")
"""Values of `protocol.train` that leave the backbone as it is."""
UNSAFE = re.compile(r"[^\w.=+-]")
"""Characters that stay out of folder names."""
CONTROL = "random"
"""The method that stands beside the others where bytes decide, lest fewer bytes look a merit."""
SIZES = ("bytes", "image_bytes", "caption_bytes", "pixels")
"""Counts of a set that its cells repeat."""
MAX_NAME = 200
"""Longest name of a method in that of a folder, in bytes; file systems allow 255."""


def ablations(config: RunConfig, judged: EvaluateConfig) -> list[str]:
    """Return those of ABLATIONS that change something in these configurations."""

    def changes(written: str) -> bool:
        field, _, value = written.partition("+")[2].partition("=")
        if field.startswith("protocol."):
            return replace(judged, {field: value}) != judged
        return replace(config, {field: value}) != config

    return [written for written in ABLATIONS if changes(written)]


@dataclass(frozen=True)
class Entry:
    """A set of a row of the table, which is a method with its changes, at one size."""

    method: str
    """The method as the user wrote it."""
    pairs: int
    """Pairs asked for; 0 if a budget decides."""
    budget: str
    """Bytes of the set at most, as the user wrote them; "" where the pairs decide."""
    folder: str
    """The folder of its set, below that of the comparison."""
    run: RunConfig
    evaluation: EvaluateConfig
    further: int = 0
    """The number of sets of the row before it: its seed is as much higher than the first's."""

    @property
    def row(self) -> str:
        """The name of its row."""
        return f"{self.method}-{self.budget or self.pairs}"

    @property
    def label(self) -> str:
        return self.row + (f", seed {self.run.seed}" if self.further else "")


def entries(
    config: RunConfig,
    methods: list[str],
    sizes: Sequence[int | str],
    judged: EvaluateConfig,
    set_seeds: int = 1,
) -> list[Entry]:
    """Return every method at every size: a number of pairs, or a budget such as "2MB".

    Each has `set_seeds` sets: those of a row follow each other.

    Raises ConfigError in one line for an unknown method, a change that changes nothing, and two
    methods whose sets would lie in one folder.
    """
    rows = [
        _entry(written, size, config, judged, further)
        for written in dict.fromkeys(methods)
        for size in dict.fromkeys(sizes)
        for further in range(set_seeds)
    ]
    first: dict[str, Entry] = {}
    for row in rows:
        other = first.setdefault(row.folder, row)
        if other.run != row.run:
            raise ConfigError(
                f"methods {other.method!r} and {row.method!r} differ only in characters that the "
                f"folder of a set cannot have ({row.folder}); compare them in two folders"
            )
    return rows


def _entry(
    written: str, size: int | str, config: RunConfig, judged: EvaluateConfig, further: int
) -> Entry:
    """Return a set of a method as written, at one size. Raises ConfigError in one line.

    A set with `further` seeds before it is that of the method with its seed as a change.
    """
    name, start, fields = _parse(written)
    of_protocol = {key: value for key, value in fields.items() if key.startswith("protocol.")}
    of_run = {key: value for key, value in fields.items() if key not in of_protocol}
    if further:
        of_run["seed"] = str(replace(config, of_run).seed + further)
    kept = [f"{key}={value}" for key, value in of_run.items()]
    safe = UNSAFE.sub("_", "+".join([f"{start}{STARTS}{name}" if start else name, *kept]))
    place = set_name(_short(safe), UNSAFE.sub("_", str(size)))
    pairs, budget = (0, size) if isinstance(size, str) else (size, "")
    sized = {"pairs": pairs, "budget": budget}
    fixed = {"method": name, **sized, "out": (Folder(config.out) / place).path}
    fixed |= {"distill.init": start} if start else {}
    run, plain = replace(config, {**of_run, **fixed}), replace(config, fixed)
    changed = replace(judged, of_protocol)
    method = catalog.method(name, run.budget, run.distill.init)
    for given, same in (
        (of_run, relevant(run, method) == relevant(plain, method)),
        (of_protocol, changed == judged),
    ):
        if given and same:
            raise ConfigError(f"method {written!r}: {' and '.join(given)} changes nothing here")
    return Entry(written, pairs, budget, place, run, changed, further)


def _short(name: str) -> str:
    """Return a name that a folder can have: a long one is cut and ends in its digest."""
    whole = name.encode()
    if len(whole) <= MAX_NAME:
        return name
    return f"{whole[:MAX_NAME].decode(errors='ignore')}-{fingerprint(name)[:12]}"


def _parse(written: str) -> tuple[str, str, dict[str, str]]:
    """Return the method's name, its start if one is written, and its changes, field -> value."""
    whole, *changes = written.split("+")
    start, _, name = whole.rpartition(STARTS)
    if name not in METHODS:
        raise ConfigError(
            f"unknown method {name!r}; known: {', '.join(METHODS)}, "
            "each with +FIELD=VALUE behind it"
        )
    if start and name not in catalog.DISTILLERS:
        raise ConfigError(
            f"method {written!r}: {name} improves no start; those that do: "
            f"{', '.join(catalog.DISTILLERS)}"
        )
    fields = {}
    for change in changes:
        flag, mark, value = change.partition("=")
        field = flag.replace("-", "_")  # as on the command line
        if not mark:
            raise ConfigError(f"method {written!r}: {change!r} is no change; write FIELD=VALUE")
        if field in FIXED:
            raise ConfigError(f"method {written!r}: {field} is the same for all of a comparison")
        if field == "distill.init" and start:
            raise ConfigError(f"method {written!r}: its start is given twice")
        fields[field] = value
    return name, start, fields


@session_kept()
def compare(
    config: RunConfig,
    methods: list[str],
    sizes: Sequence[int | str],
    judged: EvaluateConfig,
    redo: bool = False,
    set_seeds: int = 1,
) -> dict[str, Any]:
    """Make the missing sets, run the missing trials, write the table and return it.

    `sizes` are numbers of pairs, or budgets such as "2MB"; with budgets the method CONTROL is one
    of those compared. Each row has `set_seeds` sets, made with the seeds from that of `config` on.
    Interrupted and called again, it goes on. Raises UserError in one line for what the user can
    fix, as far as possible before anything long starts.
    """
    if not config.out:
        raise ConfigError("no folder for the comparison: give --out FOLDER")
    few = [size for size in sizes if isinstance(size, int) and size < 2]
    if few:
        raise ConfigError(f"--pairs is {min(few)}; training needs at least 2")
    if set_seeds < 1:
        raise ConfigError(f"--set-seeds is {set_seeds}; it must be positive")
    if not methods:
        raise ConfigError(f"no methods to compare: give --methods, some of {', '.join(METHODS)}")
    if CONTROL not in methods and any(isinstance(size, str) for size in sizes):
        methods = [*methods, CONTROL]
    root = Folder(config.out)
    judged = replace(judged, {"ray": config.ray, "read": config.read.files})
    rows, shards, wanted = [], [], entries(config, methods, sizes, judged, set_seeds)
    _require_one_kind(wanted)
    for entry in wanted:
        run = make_run(entry.run)
        encoder, shards = run.encoder, run.shards
        extras = entry.run.extras
        evaluation.require_extras(
            entry.evaluation.protocol,
            entry.label,
            similarity=extras.similarity != "off",
            several_captions=extras.captions > 0,
        )
        evaluation.text_encoder(
            entry.evaluation.protocol, entry.label, encoder.name, encoder.space, encoder.dim
        )
        rows.append(_on_shared_stores(entry, run, root))
    evaluation.check(judged, [entry.evaluation.protocol for entry in rows], shards)
    root.create()
    for number, entry in enumerate(rows):
        print(f"[{number + 1}/{len(rows)}] {entry.label}", flush=True)
        distill(entry.run, redo=redo)
    candidates = [
        Candidate(entry.label, entry.run.out, entry.evaluation.protocol) for entry in rows
    ]
    results = evaluation.evaluate_all(candidates, judged, root / EVALUATION)
    for entry in rows:
        evaluation.save(results[entry.label], Folder(entry.run.out))
    table = _table(rows, results, config, judged)
    root.write_json(COMPARISON, table)
    root.write_bytes(TABLE, as_csv(table["cells"]).encode())
    return table


def _require_one_kind(rows: list[Entry]) -> None:
    """Raise ConfigError if some rows train a backbone and others keep it frozen."""
    of_kind = {entry.evaluation.protocol.train in FROZEN: entry for entry in rows}
    if len(of_kind) > 1:
        raise ConfigError(
            f"{of_kind[True].label} trains heads on a frozen backbone and {of_kind[False].label} "
            "the backbone itself: figures of both are not comparable; make two comparisons"
        )


def _table(
    rows: list[Entry], results: dict[str, Any], config: RunConfig, judged: EvaluateConfig
) -> dict[str, Any]:
    by_row: dict[str, list[Entry]] = {}
    for entry in rows:
        by_row.setdefault(entry.row, []).append(entry)
    return {
        "schema": SCHEMA_VERSION,
        "source": without_secrets(config.source),
        "test": results[rows[0].label]["test"],
        "protocol": {
            "name": protocol_name(judged),
            **dataclasses.asdict(judged.protocol),
        },
        "seeds": judged.seeds,
        **({"set_seeds": len(rows) // len(by_row)} if len(by_row) < len(rows) else {}),
        "cells": [cell for sets in by_row.values() for cell in _cells(sets, results)],
        "notes": _notes(rows, results),
    }


def _on_shared_stores(entry: Entry, run: Run, root: Folder) -> Entry:
    """Return the entry with embeddings and experts in the stores of all made the same way."""
    shared = {}
    if not entry.run.embed.store:
        shared["embed.store"] = (root / store_name(run.fingerprints["embed"])).path
    if "experts" in run.method.names and not entry.run.experts.store:
        shared["experts.store"] = (root / experts_name(experts_key(run))).path
    return dataclasses.replace(entry, run=replace(entry.run, shared))


def _notes(rows: list[Entry], results: dict[str, dict[str, Any]]) -> list[str]:
    """Return each note once: notes on the whole table plainly, others with the names of rows."""
    rows_of: dict[str, dict[str, None]] = {}
    for entry in rows:
        for note in results[entry.label]["notes"]:
            rows_of.setdefault(note, {})[entry.row] = None
    every = {entry.row for entry in rows}
    return [
        note if names.keys() == every else f"{', '.join(names)}: {note}"
        for note, names in rows_of.items()
    ]


def _cells(sets: list[Entry], results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the cells of a row: one per backbone, then their average."""
    first, found = sets[0], [results[entry.label] for entry in sets]
    parts = {
        backbone["name"]: [result["backbones"][number] for result in found]
        for number, backbone in enumerate(found[0]["backbones"])
    }
    trials = {name: sum(len(part["trials"]) for part in of) for name, of in parts.items()}
    folders = [entry.folder for entry in sets]
    sizes = [result["set"] for result in found]
    about = {
        "method": first.method,
        "pairs": first.pairs or _mean(size["pairs"] for size in sizes),
        "budget": first.run.budget_bytes or None,
        **{name: _mean(size[name] for size in sizes) for name in SIZES},
    }
    return [
        {
            **about,
            "backbone": name,
            "pixels_per_epoch": _mean(part["pixels_per_epoch"] for part in of_sets),
            **over_sets(of_sets),
            "trials": trials.get(name, sum(trials.values())),
            **({"used": of_sets[0]["used"]} if "used" in of_sets[0] else {}),
            "set": first.folder,
            **({"sets": folders} if len(sets) > 1 else {}),
        }
        for name, of_sets in {**parts, AVERAGE: found}.items()
    ]


def _mean(values: Iterable[float]) -> float:
    """Return the mean of what the sets of a row count; a whole number stays one."""
    mean = fmean(values)
    return int(mean) if mean.is_integer() else mean


def as_csv(cells: list[dict[str, Any]]) -> str:
    """Return one line per cell: mean and deviations of every measure, in percent; its sizes."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    kinds = [kind for kind in ("mean", "std", "set_std") if kind in cells[0]]
    measures = [(name, kind) for name in MEASURES for kind in kinds]
    titles = [f"{name} {kind.replace('_', ' ')}" for name, kind in measures]
    sizes = ("bytes", "pixels", "pixels_per_epoch")
    writer.writerow(["method", "pairs", "backbone", "trials", *titles, *sizes])
    for cell in cells:
        values = [f"{cell[kind][name]:.4f}" for name, kind in measures]
        values += [f"{cell[name]:.0f}" for name in sizes]
        pairs = f"{cell['pairs']:.0f}"
        writer.writerow([cell["method"], pairs, cell["backbone"], cell["trials"], *values])
    return stream.getvalue()
