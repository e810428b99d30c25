"""Samples and pairs that are not in the result, and why."""

from __future__ import annotations

from pds_ray.report.run import OpenRun
from pds_ray.report.values import Json

ERROR_LIMIT = 20
"""Examples of bad samples."""


def gather_dropped(run: OpenRun) -> Json | None:
    """Return what was left out, by step and by reason; None if nothing was."""
    embed, prune, match = (run.counts.get(stage, {}) for stage in ("embed", "prune", "match"))
    if not embed:
        return None
    steps = [*_pruned(run), *_unmatched(run), *_unread(embed)]
    bad = embed.get("bad", 0)
    if not steps and not bad:
        return None
    flow = {
        "pruned": prune.get("dropped", 0),
        "not shared": match.get("pairs_not_shared", 0),
        "shared": match.get("shared_pairs", 0),
    }
    reasons, failed = embed.get("reasons", {}), embed.get("failed", {})
    return {
        "steps": steps,
        "bad": bad,
        "samples": embed.get("images", 0) + bad,
        "reasons": [{"reason": reason, "count": count} for reason, count in reasons.items()],
        "examples": _examples(run),
        "failed": [{"shard": shard, "problem": problem} for shard, problem in failed.items()],
        "flow": flow if match else None,
    }


def _step(what: str, count: int, of: int, why: str) -> Json:
    return {"what": what, "count": count, "of": of, "why": why}


def _pruned(run: OpenRun) -> list[Json]:
    prune = run.counts.get("prune")
    if not prune:
        return []
    ratio = run.config.get("prune", {}).get("ratio")
    why = f"image and caption agree least (prune.ratio {ratio})"
    total = run.counts["embed"].get("pairs", 0)
    return [_step("pruned pairs", prune.get("dropped", 0), total, why)]


def _unmatched(run: OpenRun) -> list[Json]:
    match = run.counts.get("match")
    if not match:
        return []
    why = "image and caption fall in clusters that are not matched to each other"
    if not run.config.get("match", {}).get("filter", True):
        why += "; averaged all the same, as match.filter is off"
    total, outside = run.counts["embed"].get("pairs", 0), match.get("pairs_not_shared", 0)
    empty = f"matched clusters that share no pair; {match.get('pairless_policy', '')}"
    return [
        _step("pairs outside matched clusters", outside, total, why),
        _step("empty matches", match.get("pairless", 0), match.get("clusters", 0), empty),
    ]


def _unread(embed: Json) -> list[Json]:
    failed = embed.get("failed_shards", 0)
    why = "they cannot be read, or not to their end; once mended, pds-ray retry-failed reads them"
    return [_step("shards not read", failed, embed["shards"], why)] if failed else []


def _examples(run: OpenRun) -> list[Json]:
    """Return bad samples of every reason in turn, lest a frequent reason hide a rare one."""
    by_reason: dict[str, list[Json]] = {}
    for shard, marker in run.markers.items():
        if not marker.get("bad"):
            continue
        for row in run.store.errors(shard).to_pylist():
            rows = by_reason.setdefault(row["reason"], [])
            if len(rows) < ERROR_LIMIT:
                rows.append({"shard": shard, **row})
        if by_reason and all(len(rows) == ERROR_LIMIT for rows in by_reason.values()):
            break
    in_turn = [
        rows[turn]
        for turn in range(ERROR_LIMIT)
        for _, rows in sorted(by_reason.items())
        if turn < len(rows)
    ]
    return in_turn[:ERROR_LIMIT]
