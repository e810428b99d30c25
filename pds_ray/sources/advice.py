"""One line on bad samples and shards: how many, one example, and what to do."""

from __future__ import annotations

from collections.abc import Mapping

APART = "the files of a sample do not lie side by side"
"""Ends the detail of a duplicate key that has only the image, or only the captions."""
TWO_KEYS = "no image and caption under one key"
"""Begins the detail of a sample whose image and caption have different names."""

ADVICE = (  # (reason or "", part of the detail, what to do)
    ("", APART, "pack them again with tar --sort=name"),
    ("", TWO_KEYS, "name the suffixes with --read.image-suffixes and --read.caption-suffixes"),
    ("unsafe_member", ": link to ", "pack the files themselves: tar --dereference"),
    ("unsafe_member", "leaves the folder", "copy the files there: cp --recursive --dereference"),
    ("not_a_tar", "Git LFS pointer", "fetch the files with git lfs pull"),
    ("not_a_tar", "HTML or XML page", "an error page was saved; download it again"),
    ("not_a_tar", "bytes of zeros", "download it again"),
    ("not_a_parquet", "Git LFS pointer", "fetch the files with git lfs pull"),
    ("not_a_parquet", "", "download it again"),
    ("truncated_shard", "", "download or pack it again"),
    ("missing_image", "no image (", "name the suffix of images with --read.image-suffixes"),
    ("missing_caption", "no caption file", "name their suffix with --read.caption-suffixes"),
    ("missing_caption", ", which has ", "name the entry with --read.caption-keys"),
)


def advice(reason: str, detail: str) -> str:
    """Return what to do about a fault, "" if nothing is known."""
    return next((do for for_, part, do in ADVICE if for_ in ("", reason) and part in detail), "")


def tally(counts: Mapping[str, int], examples: Mapping[str, tuple[str, str]]) -> str:
    """Return one line on bad samples by reason, with an example and advice; "" if there are none.

    `examples`: reason -> key and detail of one such sample.
    """
    ordered = sorted((reason for reason in counts if counts[reason]), key=lambda r: -counts[r])
    line = ", ".join(f"{reason}: {counts[reason]:,}" for reason in ordered)
    shown = [reason for reason in ordered if reason in examples]
    # the fault with advice explains the others: files that lie apart miss a caption first
    hints = {reason: advice(reason, examples[reason][1]) for reason in shown}
    best = next((r for r in shown if APART in examples[r][1]), next(iter(shown), ""))
    if not best:
        return line
    key, detail = examples[best]
    about = f"{key}: {detail}" if key else detail
    return f"{line}; for example {about}" + (f"; {hints[best]}" if hints[best] else "")
