"""The gallery of a report: the distilled pairs, with the real images nearest to them."""

from __future__ import annotations

from collections.abc import Callable

from pds_ray.report.images import Place, data_uri, real_thumbnails
from pds_ray.report.run import OpenRun
from pds_ray.report.scan import Scan
from pds_ray.report.values import Json, rounded
from pds_ray.store.distilled_set import DistilledSet, DistilledSetError, Record

SHOWN_APART = ("pair", "text", "cosine", "shared", "members", "file_name")
"""Fields of a record that have a place of their own on the page."""


def gather_pairs(
    run: OpenRun, scan: Scan | None, step: Callable[[], object]
) -> tuple[Json, list[str]]:
    """Return one entry per pair and the thumbnails they refer to by number; and notes.

    Without a scan, the nearest image that the run itself found is shown.
    """
    distilled = run.distilled
    if distilled is None:
        return {"list": [], "thumbs": []}, []
    records = distilled.records[: run.shown]
    neighbours = scan.nearest if scan else [_nearest(record) for record in records]
    places = [(item["shard"], item["key"]) for items in neighbours for item in items]
    thumbs, notes = real_thumbnails(run.config.get("source", ""), run.read, places, step)
    number = {place: index for index, place in enumerate(thumbs)}
    entries = [_entry(distilled, pair, items, number) for pair, items in enumerate(neighbours)]
    if unreadable := sum(entry["image"] is None for entry in entries):
        notes.append(f"{unreadable:,} images of the distilled set cannot be read.")
    return {"list": entries, "thumbs": list(thumbs.values())}, notes


def _nearest(record: Record) -> list[Json]:
    """Return the nearest image that a record names, if any."""
    if not record.get("nearest_key"):
        return []
    cosine = rounded(record["nearest_cosine"])
    return [{"shard": record["nearest_shard"], "key": record["nearest_key"], "cosine": cosine}]


def _entry(
    distilled: DistilledSet, pair: int, neighbours: list[Json], number: dict[Place, int]
) -> Json:
    record = distilled.records[pair]
    image, size = _image(distilled, pair)
    return {
        "pair": record.get("pair", pair),
        "caption": distilled.captions[pair],
        "cosine": rounded(record.get("cosine")),
        "shared": record.get("shared"),
        "image": image,
        "size": size,
        "nearest": [
            {**item, "thumb": number.get((item["shard"], item["key"]))} for item in neighbours
        ],
        "members": record.get("members") or [],
        "details": {
            name: rounded(value)
            for name, value in record.items()
            if name not in SHOWN_APART and value is not None
        },
    }


def _image(distilled: DistilledSet, pair: int) -> tuple[str | None, list[int] | None]:
    """Return data URI and size of a pair's image; None for both if it cannot be read."""
    try:
        image = distilled.image(pair)
    except (DistilledSetError, OSError):
        return None, None
    return data_uri(image), list(image.size)
