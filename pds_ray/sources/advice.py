"""One line on bad samples and shards: how many, one example, and what to do."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

APART = "the files of a sample do not lie side by side"
"""Ends the detail of a duplicate key that has only the image, or only the captions."""
TWO_KEYS = "no image and caption under one key"
"""Begins the detail of a sample whose image and caption have different names."""
HOLES = "a file with holes"
HARD_LINK = "hard link to "

ADVICE = (  # (reason or "", part of the detail, what to do)
    ("", APART, "pack them again with tar --sort=name"),
    ("", TWO_KEYS, "name the suffixes with --read.image-suffixes and --read.caption-suffixes"),
    ("unsafe_member", HARD_LINK, "pack the files themselves: tar --hard-dereference"),
    ("unsafe_member", ": link to ", "pack the files themselves: tar --dereference"),
    ("unsafe_member", "leaves the folder", "copy the files there: cp --recursive --dereference"),
    ("unsafe_member", HOLES, "pack the shard without --sparse"),
    ("not_a_tar", "Git LFS pointer", "fetch the files with git lfs pull"),
    ("not_a_tar", "HTML or XML page", "an error page was saved; download it again"),
    ("not_a_tar", "bytes of zeros", "download it again"),
    ("not_a_parquet", "Git LFS pointer", "fetch the files with git lfs pull"),
    ("not_a_parquet", "column", "leave the file out, or write it as the others are"),
    ("not_a_parquet", "", "download it again"),
    ("truncated_shard", "", "download or pack it again"),
    ("missing_image", "no image (", "name the suffix of images with --read.image-suffixes"),
    ("missing_caption", "no caption file", "name their suffix with --read.caption-suffixes"),
    ("missing_caption", ", which is no JSON", "write the file with a JSON library"),
    ("missing_caption", "(no text)", "a caption is a text, in quotes"),
    ("missing_caption", ", which has ", "name the entry with --read.caption-keys"),
)


def advice(reason: str, detail: str) -> str:
    """Return what to do about a fault, "" if nothing is known."""
    return next((do for for_, part, do in ADVICE if for_ in ("", reason) and part in detail), "")


def advised(problem: str) -> str:
    """Return a problem, "reason: detail", with what to do about it, if that is known."""
    reason, _, detail = problem.partition(": ")
    do = advice(reason, detail)
    return f"{problem}; {do}" if do else problem


@dataclass
class Tally:
    """Bad samples and shards: how many by reason, and an example of each."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Reason -> key and detail of the first."""

    def add(self, reason: str, key: str, detail: str) -> None:
        """Count one of them."""
        self.counts[reason] += 1
        self.examples.setdefault(reason, (key, detail))

    def line(self) -> str:
        """Return all of it in one line, with one example and advice; "" if nothing is bad."""
        counts = ", ".join(f"{reason}: {count:,}" for reason, count in self.counts.most_common())
        return "; ".join(filter(None, (counts, self.example())))

    def example(self) -> str:
        """Return an example of what is bad most often, with advice; "" if there is none."""
        shown = [reason for reason, _ in self.counts.most_common() if reason in self.examples]
        # files that do not lie side by side are the cause of all that they lack
        apart = [reason for reason in shown if APART in self.examples[reason][1]]
        for reason in (apart or shown)[:1]:
            key, detail = self.examples[reason]
            do = advice(reason, detail)
            return (f"such as {key}: {detail}" if key else detail) + (do and f"; {do}")
        return ""
