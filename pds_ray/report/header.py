"""The top of a report: title, result in one sentence, facts and tiles."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np

from pds_ray.errors import without_secrets
from pds_ray.report.run import OpenRun
from pds_ray.report.values import Json, duration, rounded


def gather_header(
    run: OpenRun,
    clusters: Json | None,
    evaluations: list[Json],
    coverage: Mapping[str, tuple[float, float]],
) -> Json:
    """Return title, headline, facts and tiles; `coverage` is that of the scan."""
    source = without_secrets(str(run.config.get("source", "")))
    return {
        "title": f"{_count(run):,} pairs from {source}",
        "reading": _headline(run, clusters),
        "facts": [
            {"name": name, "value": without_secrets(value)}
            for name, value in _facts(run, source).items()
            if value
        ],
        "tiles": [
            *_size_tiles(run),
            *_coverage_tiles(coverage),
            *_quality_tiles(run, clusters, evaluations),
        ],
    }


def _count(run: OpenRun) -> int:
    return len(run.distilled) if run.distilled else run.config.get("pairs", 0)


def _headline(run: OpenRun, clusters: Json | None) -> str:
    """Return the result in one sentence."""
    embed, prune = run.counts.get("embed", {}), run.counts.get("prune", {})
    distilled = run.distilled
    if not distilled:
        return "This run has no pairs yet; what is known so far stands below."
    if distilled.is_selection:
        source = f" out of {embed['pairs']:,}" if embed else ""
        chosen = f"chosen{source} by the method {run.method_name}"
        if str(distilled.manifest["about"].get("picture_origin")).startswith("synthetic"):
            return f"{len(distilled):,} pairs, {chosen}, their images decoded."
        return f"{len(distilled):,} real pairs, {chosen}."
    if not (embed and prune and clusters and clusters["shared_pairs"] is not None):
        return f"{len(distilled):,} pairs that stand for the whole data set."
    share = clusters["shared_pairs"] / max(clusters["kept_pairs"], 1)
    return (
        f"{len(distilled):,} pairs stand for {embed['pairs']:,}: of the "
        f"{clusters['kept_pairs']:,} left after pruning, {share:.0%} lie in clusters on which "
        "images and captions agree, and each distilled pair averages "
        f"{np.median(clusters['shared']):,.0f} of them in the median."
    )


def _facts(run: OpenRun, source: str) -> dict[str, str]:
    decode, finished = run.config.get("decode", {}), run.manifest.get("finished")
    encoder = run.manifest.get("encoder") or run.config.get("embed", {}).get("encoder", "")
    model = decode.get("model", "auto")
    weights = f" ({model})" if model not in ("auto", None) else ""
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(finished)) if finished else ""
    return {
        "source": source,
        "method": run.method_name,
        "encoder": str(encoder),
        "decoder": decode.get("decoder", "") + weights,
        "finished": when,
    }


def _tile(label: str, value: str, note: str) -> Json:
    return {"label": label, "value": value, "note": note}


def _size_tiles(run: OpenRun) -> list[Json]:
    count, embed = _count(run), run.counts.get("embed")
    tiles = [_tile("pairs", f"{count:,}", "image and caption" if run.distilled else "asked for")]
    if embed:
        label, images = f"{run.method.card.verb} from", f"{embed['images']:,} images"
        tiles.append(_tile(label, f"{embed['pairs']:,}", images))
        if run.distilled:
            tiles.append(_tile("reduction", f"{embed['pairs'] / max(count, 1):,.0f}×", "in pairs"))
    if run.distilled and (size := run.distilled.manifest.get("size")):
        parts = f"images {size['image_bytes']:,}, captions {size['caption_bytes']:,}"
        tiles.append(_tile("bytes", f"{size['bytes']:,}", parts))
        tiles.append(_tile("pixels", f"{size['pixels']:,}", "of all images"))
    return tiles


def _coverage_tiles(coverage: Mapping[str, tuple[float, float]]) -> list[Json]:
    """Return how near images, and captions, of the source are to the nearest pair."""
    return [
        _tile(f"{side} covered", f"{mean:.3f}", f"cosine to the nearest pair; 5 % below {low:.3f}")
        for side, (mean, low) in coverage.items()
    ]


def _quality_tiles(run: OpenRun, clusters: Json | None, evaluations: list[Json]) -> list[Json]:
    tiles = []
    records = run.distilled.records if run.distilled else []
    cosines = [row["cosine"] for row in records if rounded(row.get("cosine")) is not None]
    if cosines:
        tiles.append(_tile("mean cosine", f"{np.mean(cosines):.3f}", "image to text"))
    if clusters and clusters["shared"]:
        median = f"{np.median(clusters['shared']):,.0f}"
        tiles.append(_tile("shared pairs", median, "median of a match"))
    if evaluations and (value := evaluations[0]["mean"]["r_mean"]) is not None:
        tiles.append(_tile("mean recall", f"{value:.1f}", f"%, {evaluations[0]['name']}"))
    if seconds := sum(entry.get("seconds", 0) for entry in run.manifest["stages"].values()):
        tiles.append(_tile("time", duration(seconds), "all stages"))
    return tiles
