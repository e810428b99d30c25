"""Reads a run folder, or the folder of a comparison, and says what there is to show as plain JSON-able values.

Nothing here knows of HTML. What a run does not have (a selection has no clusters, an unfinished run no pairs) is None
or empty, and what could not be read becomes a note.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pds_ray import catalog
from pds_ray.errors import without_secrets
from pds_ray.report import space
from pds_ray.report.evaluations import (
    AVERAGE,
    COMPARISON,
    ReportError,
    comparison_beside,
    read_comparison,
    read_evaluations,
    set_strips,
)
from pds_ray.report.pictures import data_uri, real_thumbnails
from pds_ray.store.distilled_set import DistilledSet, DistilledSetError, load_distilled
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.manifest import RunManifest, rate
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.schemas import embeddings
from pds_ray.store.storage import Folder, StorageError

PAIR_LIMIT = 1_000
"""Pairs on the page."""
NEAREST = 3
"""Real images shown with each pair."""
COUPLE_LIMIT = 150
"""Couples in the heat map."""
ERROR_LIMIT = 20
SAMPLE, DRAWN, SAMPLE_SEED = 5_000, 2_000, 0
"""Embeddings that the map is fitted on, and how many of them are drawn."""
QUICK_IMAGES = 1_000_000
"""More images than this are not searched again at the end of a run; `pds-ray report` does it when asked."""

SHOWN_APART = ("pair", "text", "cosine", "shared", "members", "file_name")
MADE_ONLY = ("image_cluster", "text_cluster", "nearest")
"""What the metadata of a pair says only where a prototype was made; a chosen pair is its own."""

Step = Callable[[], object]
Json = dict[str, Any]


def gather(path: str, quick: bool = False, step: Step = lambda: None) -> Json:
    """What there is to show of a run folder or of a folder with a comparison.

    `quick` leaves out what would take long on a very large store; `step` is called after each piece of work.
    Raises ReportError in one line if there is nothing to report on.
    """
    folder = Folder(path)
    if folder.exists(RunFolder.MANIFEST):
        return gather_run(RunFolder(folder), quick, step)
    if folder.exists(COMPARISON):
        comparison = read_comparison(folder)
        strips, notes = set_strips(folder, comparison)
        return {
            "kind": "comparison",
            **comparison,
            "strips": strips,
            "notes": comparison["notes"] + notes,
        }
    raise ReportError(
        f"{path} has neither a {RunFolder.MANIFEST} nor a {COMPARISON}: there is nothing to report on"
    )


@dataclass(frozen=True)
class _Run:
    """A run folder opened for reading."""

    folder: RunFolder
    manifest: Json
    config: Json
    counts: dict[str, Json]
    """Of the stages that are done."""
    store: EmbeddingStore
    markers: dict[str, Json]
    """Shard -> marker, in the order of names; empty if the embeddings cannot be had."""


def _open(folder: RunFolder) -> _Run:
    manifest = RunManifest(folder).data
    config = manifest.get("config", {})
    stages = manifest["stages"]
    counts = {
        name: entry.get("counts", {})
        for name, entry in stages.items()
        if entry.get("status") == "done"
    }
    elsewhere = config.get("embed", {}).get("store")
    fingerprint = stages.get("embed", {}).get("fingerprint", "")
    store = folder.store(elsewhere, fingerprint)
    try:
        markers = store.committed() if "embed" in counts else {}
    except StorageError:  # a shared store whose credentials are not known here
        markers = {}
    return _Run(folder, manifest, config, counts, store, markers)


def gather_run(folder: RunFolder, quick: bool = False, step: Step = lambda: None) -> Json:
    """What there is to show of a run."""
    run = _open(folder)
    notes = [str(note) for note in run.manifest.get("notes", [])]
    method = run.config.get("method", "pds")
    distilled: DistilledSet | None = None
    if "materialize" in run.counts:
        try:
            distilled = load_distilled(folder.folder.path)
        except DistilledSetError as error:
            notes.append(f"The pairs cannot be shown: {error}.")
    else:
        notes.append("The run is not finished: " + _where_it_stands(run.manifest["stages"]) + ".")
    if "embed" in run.counts and not run.markers:
        notes.append(
            "The embeddings are no longer there, cannot be reached or are of another version of pds-ray: no "
            "nearest images, no clusters and no map."
        )
    searched = bool(run.markers) and not (
        quick and run.counts["embed"].get("images", 0) > QUICK_IMAGES
    )
    if run.markers and not searched:
        notes.append(
            f"More than {QUICK_IMAGES:,} images: only the nearest one of each pair is shown, and no map of the space; "
            "the command pds-ray report adds both."
        )
    look = _look(run, distilled, method == "pds", step) if searched else None
    pairs = _pairs(run, distilled, look, method == "pds", step, notes)
    clusters = _clusters(run, step)
    evaluations, unread = read_evaluations(folder)
    beside = comparison_beside(folder)
    return {
        "kind": "run",
        "header": _header(run, method, distilled, clusters, evaluations),
        "notes": notes + unread,
        "pairs": pairs,
        "pairs_total": 0 if distilled is None else len(distilled),
        "clusters": clusters,
        "space": look.space if look else None,
        "dropped": _dropped(run),
        "stages": _stages(method, run.manifest["stages"]),
        "evaluations": evaluations,
        "baselines": _baselines(
            beside, len(pairs["list"]) if distilled is None else len(distilled), evaluations
        ),
        "details": {
            "ray": _shown(run.manifest.get("ray", {})),
            "versions": _shown(run.manifest.get("versions", {})),
            "config": _shown(run.config),
        },
    }


def _where_it_stands(stages: Json) -> str:
    """What an unfinished run did last."""
    open_ = [
        f"stage {name} is {entry.get('status')}"
        for name, entry in stages.items()
        if entry["status"] != "done"
    ]
    return open_[-1] if open_ else "stages are missing"


# ---------------------------------------------------------------- one pass over the embeddings


@dataclass(frozen=True)
class _Look:
    """What a pass over all embeddings found."""

    nearest: list[list[Json]]
    """Per pair, its nearest real images: shard, key, cosine; empty lists where none were asked for."""
    space: Json | None


def _look(run: _Run, distilled: DistilledSet | None, nearest: bool, step: Step) -> _Look:
    """The real images nearest to each shown prototype, and a sample of both modalities for the map."""
    shards = list(run.markers)
    shown = min(len(distilled), PAIR_LIMIT) if distilled else 0
    prototypes = distilled.image_prototypes[:shown] if distilled else np.zeros((0, 0), np.float32)
    top = space.no_rows(shown, NEAREST)
    image_places = space.sample_places(
        [run.markers[name]["images"] for name in shards], SAMPLE, SAMPLE_SEED
    )
    text_places = space.sample_places(
        [run.markers[name]["pairs"] for name in shards], SAMPLE, SAMPLE_SEED + 1
    )
    images, texts, starts = [], [], [0]
    for name, image_rows, text_rows in zip(shards, image_places, text_places, strict=True):
        table = embeddings(run.store.images(name, ["embedding"]))
        images.append(table[image_rows])
        if shown and nearest:
            space.add_rows(top, prototypes, table)
        starts.append(starts[-1] + len(table))
        texts.append(embeddings(run.store.captions(name, ["embedding"]).take(pa.array(text_rows))))
        step()
    found = (
        _name_rows(run, shards, starts, top) if shown and nearest else [[] for _ in range(shown)]
    )
    sampled = np.concatenate(images), np.concatenate(texts)
    plot = None
    if distilled and min(len(sampled[0]), len(sampled[1])) > 2 and prototypes.shape[1] > 1:
        plot = {
            "made": nearest,
            "image": _plane(sampled[0], prototypes),
            "text": _plane(sampled[1], distilled.text_prototypes[:shown]),
            "captions": distilled.captions[:shown],
        }
    return _Look(found, plot)


def _name_rows(run: _Run, shards: list[str], starts: list[int], top: space.Top) -> list[list[Json]]:
    """Rows counted over the whole store -> shard and key."""
    number = np.searchsorted(starts, top.row, side="right") - 1
    keys: dict[tuple[int, int], str] = {}
    for shard in np.unique(number[top.row >= 0]):
        rows = np.unique(top.row[number == shard]) - starts[shard]
        names = (
            run.store.images(shards[shard], ["key"]).column("key").take(pa.array(rows)).to_pylist()
        )
        keys.update({(int(shard), int(row)): key for row, key in zip(rows, names, strict=True)})
    return [
        [
            {
                "shard": shards[number[pair, rank]],
                "key": keys[
                    int(number[pair, rank]), int(top.row[pair, rank]) - starts[number[pair, rank]]
                ],
                "cosine": round(float(top.cosine[pair, rank]), 4),
            }
            for rank in range(top.row.shape[1])
            if top.row[pair, rank] >= 0
        ]
        for pair in range(len(top.row))
    ]


def _plane(sample: np.ndarray, prototypes: np.ndarray) -> Json:
    plane = space.fit_plane(sample)
    drawn = plane.project(sample[:: -(-len(sample) // DRAWN)])  # every n-th: shards are in order
    return {
        "sample": np.round(drawn, 4).tolist(),
        "prototypes": np.round(plane.project(prototypes), 4).tolist(),
        "explained": [round(share, 4) for share in plane.explained],
        "fitted_on": len(sample),
    }


# ---------------------------------------------------------------- the pairs


def _pairs(
    run: _Run,
    distilled: DistilledSet | None,
    look: _Look | None,
    nearest: bool,
    step: Step,
    notes: list[str],
) -> Json:
    """The gallery: one entry a pair, real pictures once each and referred to by number."""
    if distilled is None:
        return {"list": [], "thumbs": []}
    shown = min(len(distilled), PAIR_LIMIT)
    records = distilled.records[:shown]
    neighbours: list[list[Json]] = look.nearest if look else [[] for _ in range(shown)]
    if nearest and look is None:  # the one that the run itself found
        neighbours = [
            [
                {
                    "shard": row["nearest_shard"],
                    "key": row["nearest_key"],
                    "cosine": _round(row["nearest_cosine"]),
                }
            ]
            if row.get("nearest_key")
            else []
            for row in records
        ]
    places = [(item["shard"], item["key"]) for row in neighbours for item in row]
    found, missing = real_thumbnails(run.config.get("source", ""), places, step)
    notes += missing
    number = {place: index for index, place in enumerate(found)}
    entries = []
    unreadable = 0
    for pair, row in enumerate(records):
        try:
            picture, size = data_uri(image := distilled.image(pair)), list(image.size)
        except (DistilledSetError, OSError):
            picture, size = None, None
            unreadable += 1
        entries.append(
            {
                "pair": row.get("pair", pair),
                "caption": distilled.captions[pair],
                "cosine": _round(row.get("cosine")),
                "shared": row.get("shared") if nearest else None,
                "image": picture,
                "size": size,
                "nearest": [
                    {**item, "thumb": number.get((item["shard"], item["key"]))}
                    for item in (neighbours[pair] if neighbours else [])
                ],
                "members": (row.get("members") or []) if nearest else [],
                "details": {
                    name: _round(value)
                    for name, value in row.items()
                    if name not in SHOWN_APART
                    and value is not None
                    and (nearest or not name.startswith(MADE_ONLY))
                },
            }
        )
    if unreadable:
        notes.append(f"{unreadable:,} pictures of the distilled set cannot be read.")
    return {"list": entries, "thumbs": list(found.values())}


# ---------------------------------------------------------------- clusters and matching


def _clusters(run: _Run, step: Step) -> Json | None:
    """Sizes, shared counts and the contingency table of the largest couples, counted over all shards."""
    if "cluster" not in run.counts or not run.markers:
        return None
    count = int(run.counts.get("match", {}).get("clusters") or run.config["pairs"])
    couples = run.folder.couples() if "match" in run.counts else None
    rows, columns = np.full(count, -1), np.full(count, -1)
    shared = np.zeros(0, np.int64)
    chosen = np.zeros(0, np.int64)
    if couples is not None and couples.num_rows:
        shared = couples.column("shared").to_numpy()
        image, text = (
            couples.column("image_cluster").to_numpy(),
            couples.column("text_cluster").to_numpy(),
        )
        chosen = np.lexsort((image, -shared))[:COUPLE_LIMIT]
        rows[image[chosen]] = columns[text[chosen]] = np.arange(len(chosen))
    table = np.zeros((len(chosen), len(chosen)), np.int64)
    sizes = {"image": np.zeros(count, np.int64), "text": np.zeros(count, np.int64)}
    for name in run.markers:
        image_cluster, text_cluster = run.folder.labels(name)
        kept = (image_cluster >= 0) & (text_cluster >= 0)
        image_cluster, text_cluster = image_cluster[kept], text_cluster[kept]
        sizes["image"] += np.bincount(image_cluster, minlength=count)
        sizes["text"] += np.bincount(text_cluster, minlength=count)
        row, column = rows[image_cluster], columns[text_cluster]
        inside = (row >= 0) & (column >= 0)
        np.add.at(table, (row[inside], column[inside]), 1)
        step()
    match = run.counts.get("match", {})
    return {
        "clusters": count,
        "sizes": {modality: values.tolist() for modality, values in sizes.items()},
        "empty": {modality: int((values == 0).sum()) for modality, values in sizes.items()},
        "shared": shared.tolist(),
        "pairless": match.get("pairless"),
        "pairless_policy": match.get("pairless_policy"),
        "shared_pairs": match.get("shared_pairs"),
        "kept_pairs": int(sizes["image"].sum()),
        "table": table.tolist(),
        "couples": [
            [
                int(couples.column("image_cluster")[int(at)].as_py()),
                int(couples.column("text_cluster")[int(at)].as_py()),
            ]
            for at in chosen
        ]
        if couples is not None
        else [],
        "couples_total": 0 if couples is None else couples.num_rows,
    }


# ---------------------------------------------------------------- what was left out


def _dropped(run: _Run) -> Json | None:
    """Where the samples and pairs that are not in the result went."""
    embed, prune, match = (run.counts.get(stage, {}) for stage in ("embed", "prune", "match"))
    if not embed:
        return None
    steps = []
    total = embed.get("pairs", 0)
    if prune:
        ratio = run.config.get("prune", {}).get("ratio")
        why = f"image and caption agree least (prune.ratio {ratio})"
        steps.append(
            {"what": "pruned pairs", "count": prune.get("dropped", 0), "of": total, "why": why}
        )
    if match:
        filtered = run.config.get("match", {}).get("filter", True)
        why = "image and caption fall in clusters that are not matched to each other"
        why += "" if filtered else "; averaged all the same, as match.filter is off"
        steps.append(
            {
                "what": "pairs outside matched clusters",
                "count": match.get("pairs_not_shared", 0),
                "of": total,
                "why": why,
            }
        )
        policy = match.get("pairless_policy", "")
        why = f"matched clusters that share no pair; {policy}"
        steps.append(
            {
                "what": "pairless couples",
                "count": match.get("pairless", 0),
                "of": match.get("clusters", 0),
                "why": why,
            }
        )
    if failed := embed.get("failed_shards", 0):
        why = "none of their samples is counted here; pds-ray retry-failed tries them again"
        steps.append(
            {"what": "shards not read", "count": failed, "of": embed["shards"], "why": why}
        )
    reasons = embed.get("reasons", {})
    bad = embed.get("bad", 0)
    if not steps and not bad:
        return None
    samples = embed.get("images", 0) + bad
    return {
        "steps": steps,
        "bad": bad,
        "samples": samples,
        "reasons": [{"reason": reason, "count": count} for reason, count in reasons.items()],
        "examples": _examples(run),
        "failed": [
            {"shard": shard, "problem": problem}
            for shard, problem in embed.get("failed", {}).items()
        ],
        "flow": {
            "pruned": prune.get("dropped", 0),
            "not shared": match.get("pairs_not_shared", 0),
            "shared": match.get("shared_pairs", 0),
        }
        if match
        else None,
    }


def _examples(run: _Run) -> list[Json]:
    """Bad samples, of every reason in turn, so that a frequent one does not hide a rare one."""
    by_reason: dict[str, list[Json]] = {}
    for name, marker in run.markers.items():
        if not marker.get("bad"):
            continue
        for row in run.store.errors(name).to_pylist():
            rows = by_reason.setdefault(row["reason"], [])
            if len(rows) < ERROR_LIMIT:
                rows.append({"shard": name, **row})
        if by_reason and all(len(rows) == ERROR_LIMIT for rows in by_reason.values()):
            break
    turns = [
        rows[turn]
        for turn in range(ERROR_LIMIT)
        for _, rows in sorted(by_reason.items())
        if turn < len(rows)
    ]
    return turns[:ERROR_LIMIT]


# ---------------------------------------------------------------- header, stages, baselines


def _header(
    run: _Run,
    method: str,
    distilled: DistilledSet | None,
    clusters: Json | None,
    evaluations: list[Json],
) -> Json:
    config, embed = run.config, run.counts.get("embed", {})
    decode = config.get("decode", {})
    model = decode.get("model", "auto")
    finished = run.manifest.get("finished")
    count = len(distilled) if distilled else config.get("pairs", 0)
    seconds = sum(entry.get("seconds", 0) for entry in run.manifest["stages"].values())
    tiles = [
        {
            "label": "pairs",
            "value": f"{count:,}",
            "note": "image and caption" if distilled else "asked for",
        }
    ]
    if embed:
        tiles.append(
            {
                "label": "distilled from" if method == "pds" else "chosen from",
                "value": f"{embed['pairs']:,}",
                "note": f"{embed['images']:,} images",
            }
        )
        if distilled:
            tiles.append(
                {
                    "label": "reduction",
                    "value": f"{embed['pairs'] / max(count, 1):,.0f}×",
                    "note": "in pairs",
                }
            )
    cosines = (
        [row["cosine"] for row in distilled.records if _round(row.get("cosine")) is not None]
        if distilled
        else []
    )
    if cosines:
        tiles.append(
            {"label": "mean cosine", "value": f"{np.mean(cosines):.3f}", "note": "image to text"}
        )
    if clusters and clusters["shared"]:
        median = f"{np.median(clusters['shared']):,.0f}"
        tiles.append({"label": "shared pairs", "value": median, "note": "median of a couple"})
    if evaluations and evaluations[0]["mean"]["r_mean"] is not None:
        value = evaluations[0]["mean"]["r_mean"]
        tiles.append(
            {
                "label": "mean recall",
                "value": f"{value:.1f}",
                "note": f"%, {evaluations[0]['name']}",
            }
        )
    if seconds:
        tiles.append({"label": "time", "value": _duration(seconds), "note": "all stages"})
    source = without_secrets(str(config.get("source", "")))
    return {
        "title": f"{count:,} pairs from {source}",
        "reading": _reading(run, method, distilled, clusters),
        "facts": [
            {"name": name, "value": without_secrets(value)}
            for name, value in (
                ("source", source),
                ("method", method),
                (
                    "encoder",
                    str(run.manifest.get("encoder") or config.get("embed", {}).get("encoder", "")),
                ),
                (
                    "decoder",
                    decode.get("decoder", "")
                    + (f" ({model})" if model not in ("auto", None) else ""),
                ),
                (
                    "finished",
                    time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(finished)) if finished else "",
                ),
            )
            if value
        ],
        "tiles": tiles,
    }


def _reading(run: _Run, method: str, distilled: DistilledSet | None, clusters: Json | None) -> str:
    """The result in one sentence."""
    embed, prune = run.counts.get("embed", {}), run.counts.get("prune", {})
    if not distilled:
        return "This run has no pairs yet; what is known so far stands below."
    if method != "pds":
        of = f" out of {embed['pairs']:,}" if embed else ""
        return f"{len(distilled):,} real pairs, chosen{of} by the method {method}."
    if not (embed and prune and clusters and clusters["shared_pairs"] is not None):
        return f"{len(distilled):,} pairs that stand for the whole data set."
    share = clusters["shared_pairs"] / max(clusters["kept_pairs"], 1)
    return (
        f"{len(distilled):,} pairs stand for {embed['pairs']:,}: of the {clusters['kept_pairs']:,} left after pruning, "
        f"{share:.0%} lie in clusters on which images and captions agree, and each distilled pair averages "
        f"{np.median(clusters['shared']):,.0f} of them in the median."
    )


def _stages(method: str, entries: Json) -> list[Json]:
    """Return a row per stage of a run that has begun: status, seconds, rate."""
    rows = []
    for stage in catalog.method(method).stages:
        if stage.name not in entries:
            continue
        entry = entries[stage.name]
        per_s = rate(entry, stage.counted)
        rows.append(
            {
                "stage": stage.name,
                "status": entry.get("status", ""),
                "seconds": entry.get("seconds", 0),
                "rate": f"{per_s:,.0f} {stage.unit}/s" if per_s else "",
            }
        )
    return rows


def _baselines(beside: tuple[Json, str] | None, pairs: int, evaluations: list[Json]) -> Json | None:
    """This run among the methods of a comparison, at the same number of pairs."""
    if beside is None:
        return None
    comparison, own = beside
    bars = [
        {
            "method": cell["method"],
            "mean": cell["mean"],
            "std": cell["std"],
            "own": bool(own) and cell["set"] == own,
        }
        for cell in comparison["cells"]
        if cell["pairs"] == pairs and cell["backbone"] == AVERAGE
    ]
    if not bars:
        return None
    if not any(bar["own"] for bar in bars) and evaluations:
        mine = evaluations[0]
        bars.append({"method": "this run", "mean": mine["mean"], "std": mine["std"], "own": True})
    return {"bars": bars, "pairs": pairs, "protocol": comparison["protocol"]}


def _round(value: Any) -> Any:
    """A float as JSON can hold it, with the digits that matter; anything else as it is."""
    if not isinstance(value, float):
        return value
    return round(value, 4) if math.isfinite(value) else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def _shown(value: Any) -> Any:
    """Settings as they may be shown: no credentials in URIs."""
    if isinstance(value, dict):
        return {str(name): _shown(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shown(item) for item in value]
    return without_secrets(value) if isinstance(value, str) else value
