"""The splits of a data set of the Hugging Face hub, told from its card or from the names of files.

The rules are those of the library `datasets`, as far as Parquet files go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from pds_ray.sources.base import SourceError

NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""Word in a path -> split."""
_NUMBERED = re.compile(r"(?:^|/)([\w.-]*?\w)-\d{5}-of-(\d{5})[^/]*$")
_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(NAMES)})(?![A-Za-z])")


def find_splits(paths: Sequence[str], card: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """Return split -> its files among `paths`, sorted.

    `card` is the header of the card of the data set `name`. Raises SourceError in one line if it
    names several configurations, none of them as default.
    """
    files = sorted(path for path in paths if path.lower().endswith(".parquet"))
    found: dict[str, list[str]] = {}
    for split, patterns in _declared(card, name):
        matching = [path for path in files if any(fnmatchcase(path, each) for each in patterns)]
        if matching:
            found[split] = matching
    if not found:
        for path in files:
            found.setdefault(_told_by_name(path), []).append(path)
    return found


def find_split(splits: Iterable[str], wanted: str) -> str:
    """Return the split of that name or, without it, of that meaning; "" if there is none."""
    alike = [split for split in splits if canonical(split) == canonical(wanted)]
    return wanted if wanted in alike else next(iter(alike), "")


def canonical(split: str) -> str:
    """Return a split's usual name: val and dev are called validation."""
    return NAMES.get(split.lower(), split)


def missing_parts(files: Sequence[str]) -> int:
    """Return how many files are missing of those that say how many they are (`-00000-of-00002`)."""
    groups: dict[tuple[str, int], int] = {}
    for path in files:
        numbered = _NUMBERED.search(path)
        if numbered:
            group = (path[: numbered.end(1)], int(numbered[2]))
            groups[group] = groups.get(group, 0) + 1
    return sum(total - count for (_, total), count in groups.items())


def _declared(card: Mapping[str, Any], name: str) -> list[tuple[str, list[str]]]:
    """Return the splits that the card declares, each with the patterns of its files."""
    configs = card.get("configs")
    configs = [each for each in configs if isinstance(each, Mapping)] if configs else []
    chosen = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
    if len(configs) > 1 and not chosen:
        names = ", ".join(str(each.get("config_name")) for each in configs[:8])
        patterns = _patterns(_entries(configs[0])[0][1]) if _entries(configs[0]) else ["*.parquet"]
        raise SourceError(
            f"{name} has {len(configs)} configurations ({names}); give the files of one, such as "
            f"parquet:hf://datasets/{name}/{patterns[0]}"
        )
    entries = _entries((chosen or configs)[0]) if configs else []
    return [(split, _patterns(files)) for split, files in entries]


def _entries(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return (split, pattern or patterns) of a configuration."""
    files = config.get("data_files")
    if isinstance(files, list) and files and isinstance(files[0], Mapping):
        return [(str(each.get("split", "train")), each.get("path")) for each in files]
    return [("train", files)] if files else []


def _patterns(files: Any) -> list[str]:
    return [str(each) for each in (files if isinstance(files, list) else [files])]


def _told_by_name(path: str) -> str:
    numbered = _NUMBERED.search(path)
    if numbered:
        return canonical(numbered[1])
    *folders, base = path.lower().split("/")
    words = _WORD.findall(base) or _WORD.findall("/".join(folders))
    return NAMES[words[0]] if words else "train"
