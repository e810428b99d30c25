"""The statements of docs/ about the code, against the code."""

from __future__ import annotations

import ast
import dataclasses
import fnmatch
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest

from pds_ray import catalog
from pds_ray.distributed.metrics import COUNTERS
from pds_ray.engine import status
from pds_ray.sources.base import Sample
from pds_ray.stages.embed import ShardCounts
from pds_ray.store.heartbeat import BEAT_S, SILENT_S
from pds_ray.telemetry import progress
from tests.end_to_end.test_docs import write
from tests.support.docs_pages import DOCS, PAGES, ROOT, Block, blocks, commands
from tests.unit.test_layers import ORDER


def rows(page: str, first: str) -> list[list[str]]:
    """Return the cells of the table of a page whose first column is headed `first`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    _, _, rest = text.partition(f"\n| {first} |")
    assert rest
    lines = rest.splitlines()[2:]
    table = lines[
        : next(number for number, line in enumerate([*lines, ""]) if not line.startswith("|"))
    ]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def names(cell: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", cell))


@pytest.mark.parametrize(
    "path",
    [*PAGES, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
        place, _, anchor = target.partition("#")
        if place.startswith("https://"):
            continue
        file = path.parent / place if place else path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
            }, target


def test_the_metrics_are_the_documented_ones() -> None:
    documented = {
        next(iter(names(cells[0]))): names(cells[2]) for cells in rows("watching.md", "metric")
    }
    assert documented.keys() == {f"ray_{name}" for name in COUNTERS}
    for name, (_, tags) in COUNTERS.items():
        assert set(tags) <= documented[f"ray_{name}"]


def calls_of_event() -> list[tuple[str, str, set[str]]]:
    """Return every call of log.event: pattern of the name, level, fields ("*": of a mapping)."""
    found = []
    for path in (ROOT / "pds_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and ast.unparse(node.func) == "log.event"):
                continue
            event, *others = node.args
            name = (
                event.value
                if isinstance(event, ast.Constant)
                else re.sub(r"\{.*?\}", "*", ast.unparse(event)[2:-1])
            )
            given = {keyword.arg or "*": keyword.value for keyword in node.keywords}
            level = given.pop("level", others[1] if len(others) > 1 else ast.Constant("info"))
            assert isinstance(level, ast.Constant)
            found.append((name, level.value, set(given)))
    return found


def test_the_page_has_every_event() -> None:
    """Names, levels and fields agree both ways; those of a mapping are read where it is made."""
    documented = {}
    for cells in rows("watching.md", "event"):
        documented |= {name: (cells[1], names(cells[2])) for name in names(cells[0])}
    unfolded = {
        "progress": {f.name for f in dataclasses.fields(progress.State)},
        "shard_committed": {f.name for f in dataclasses.fields(ShardCounts)},
    }
    logged = {}
    for pattern, level, fields in calls_of_event():
        matching = fnmatch.filter(documented, pattern)
        assert matching, f"{pattern} is not documented"
        for name in matching:
            if "*" in pattern and name in logged:
                continue
            logged[name] = (level, (fields - {"*"}) | (unfolded[name] if "*" in fields else set()))
    assert logged == documented


def test_the_heartbeat_looks_as_shown() -> None:
    (shown,) = (
        json.loads(block.text) for block in blocks(DOCS / "watching.md") if block.language == "json"
    )
    assert shown.keys() == {"host", "pid", "written", "progress"}
    assert shown["progress"].keys() == {f.name for f in dataclasses.fields(progress.State)}
    assert (BEAT_S, SILENT_S) == (10, 60)  # as the page says


def test_the_page_has_every_state() -> None:
    documented = set().union(*(names(cells[0]) for cells in rows("watching.md", "state")))
    assert documented == set(
        re.findall(
            r"finished|running|silent|interrupted|failed|idle", inspect.getdoc(status.status)
        )
    )


@pytest.mark.parametrize("uri", ["flickr30k:data/Flickr30k", "coco:data/COCO"])
def test_a_folder_laid_out_as_shown_can_be_read(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (listing,) = (
        block.text for block in blocks(DOCS / "flickr30k-coco.md") if block.language == "text"
    )
    root = uri.partition(":")[2]
    files = [
        line.removeprefix(f"{root}/")
        for line in listing.splitlines()
        if line.startswith(f"{root}/")
    ]
    images = [name for name in files if name.endswith(".jpg")]
    for name in files:
        path = tmp_path / root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [{"image": image, "caption": "a caption"} for image in images]
        path.write_text("jpeg" if name in images else json.dumps(records), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    for split in ("", ":train", ":val", ":test"):
        source = catalog.make_source(uri + split)
        (shard,) = source.shards()
        assert list(source.read(shard)) == [
            Sample(image, b"jpeg", ("a caption",)) for image in images
        ]


def test_the_edits_of_the_page_on_extending_fit_the_code(tmp_path: Path) -> None:
    """The files are new, the diffs apply, and the result is Python; the long test also runs it."""
    shown = [block for block in blocks(DOCS / "extending.md") if block.file]
    edited = {block.file for block in shown if block.language == "diff"}
    for file in edited:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    for block in shown:
        assert block.language == "diff" or not (ROOT / block.file).exists()
        write(block, tmp_path)
    assert "pds_ray/catalog.py" in edited
    for file in (block.file for block in shown):
        ast.parse((tmp_path / file).read_text(encoding="utf-8"))


def test_calls_are_found_in_a_shell_block() -> None:
    text = (
        "for n in 1 2; do\n  x --a 'b c' \\\n    --d=$n  # x not this\n"
        "done\ny | x 1 && (x '2;3' > f) || true; x\n"
    )
    found = commands(Block("sh", text, None), "x")
    assert [*found] == [["--a", "b c", "--d=$n"], ["1"], ["2;3"], []]


def test_the_layers_are_those_of_contributing():
    rows = re.findall(
        r"^\| \d \| (.+?) \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [re.findall(r"`(.+?)`", row) for row in rows] == [
        [place(name) for name in names] for names in ORDER
    ]


def place(name: str) -> str:
    """Return a module or folder as CONTRIBUTING.md writes it."""
    if name == "pds_ray":
        return "pds_ray/__init__.py"
    short = name.removeprefix("pds_ray.")
    return f"{short}.py" if (ROOT / "pds_ray" / f"{short}.py").exists() else f"{short}/"
