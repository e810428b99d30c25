"""The splits of a data set of the Hugging Face hub, told from its card or from the names of files.

The rules are those of the library `datasets`, as far as Parquet files go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import PurePosixPath
from typing import Any

from pds_ray.sources.base import SourceError

NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
}
"""Word in a path -> split."""
CONVERTED = "refs/convert/parquet"
"""The branch on which the hub keeps what it made of a data set, without a card."""
_NUMBERED = re.compile(r"(?:^|/)([\w.-]*?\w)-\d{5}-of-(\d{5})[^/]*$")
_WORD = re.compile(rf"(?<![A-Za-z])({'|'.join(NAMES)})(?![A-Za-z])")


def find_splits(paths: Sequence[str], card: Mapping[str, Any], name: str) -> dict[str, list[str]]:
    """Return split -> its files among `paths`, sorted.

    `card` is the header of the card of the data set `name`, NAME or NAME@REVISION. Raises
    SourceError in one line if it names several configurations, none of them as default.
    """
    config = _configuration(card, name)
    below = _folder(config)
    files = sorted(
        path for path in paths if path.lower().endswith(".parquet") and path.startswith(below)
    )
    found: dict[str, list[str]] = {}
    for split, files_of_split in _entries(config):
        patterns = [below + each for each in _patterns(files_of_split)]
        matching = [path for path in files if any(fnmatchcase(path, each) for each in patterns)]
        if matching:
            found[split] = matching
    if not found:
        if f"@{CONVERTED}" in name:
            _require_one_configuration(files, name)
        for path in files:
            found.setdefault(_told_by_name(path.removeprefix(below)), []).append(path)
    return found


def _require_one_configuration(files: Sequence[str], name: str) -> None:
    """Raise SourceError if CONFIGURATION/SPLIT/NUMBER.parquet are files of several ones."""
    names = sorted({path.partition("/")[0] for path in files})
    if len(names) > 1:
        example = next((path for path in files if "/train/" in path), files[0])
        raise SourceError(_several(name, names, f"{example.rpartition('/')[0]}/*.parquet"))


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


def _configuration(card: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the configuration that the card declares, of several the default; {} if none."""
    configs = card.get("configs")
    configs = [each for each in configs if isinstance(each, Mapping)] if configs else []
    chosen = [c for c in configs if c.get("default") or c.get("config_name") == "default"]
    if len(configs) > 1 and not chosen:
        patterns = _patterns(_entries(configs[0])[0][1]) if _entries(configs[0]) else ["*.parquet"]
        names = [str(each.get("config_name")) for each in configs]
        raise SourceError(_several(name, names, _folder(configs[0]) + patterns[0]))
    return next(iter(chosen or configs), {})


def _folder(config: Mapping[str, Any]) -> str:
    """Return the folder of a configuration with its slash, "" for that of the data set."""
    folder = PurePosixPath(str(config.get("data_dir") or "")).as_posix().strip("/")
    return "" if folder == "." else f"{folder}/"


def _several(name: str, configs: list[str], pattern: str) -> str:
    """Say that a data set has several configurations; `pattern` matches the files of one."""
    return (
        f"{name} has {len(configs)} configurations ({', '.join(configs[:8])}); give the files of "
        f"one, such as parquet:hf://datasets/{name}/{pattern}"
    )


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
