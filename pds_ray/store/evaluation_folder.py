"""Files of an evaluation and of a comparison, below a run folder, a distilled set or a comparison.

evaluation/NAME.json
    one evaluation
evaluation/trials/KEY.json
    the result of one trained model; a trial whose file exists is never trained again
evaluation/trials/state/KEY.safetensors
    the state of a trial that is not finished (see training/loop.py)
comparison.json, comparison.csv
    the cells of a comparison: mean and deviation per method, size and backbone
sets/METHOD-SIZE/
    one run folder per set of a comparison; SIZE is its number of pairs, or its budget
embeddings/FINGERPRINT/
    one embedding store per way of making embeddings, shared by the sets of a comparison
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from pds_ray.errors import ConfigError, first_line
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder

EVALUATION, TRIALS, STATES = "evaluation", "trials", "state"
COMPARISON, TABLE = "comparison.json", "comparison.csv"
AVERAGE = "average"
"""Name that the cells of a comparison give to the average over backbones."""
RECALL_TITLES = {
    "tr@1": "TR@1",
    "tr@5": "TR@5",
    "tr@10": "TR@10",
    "ir@1": "IR@1",
    "ir@5": "IR@5",
    "ir@10": "IR@10",
}
"""The recalls in the files -> how they are written for a person."""
RESULT_SUFFIX, STATE_SUFFIX = ".json", ".safetensors"


def evaluation_name(protocol: str, fingerprint: str) -> str:
    """Return the file name of an evaluation below EVALUATION."""
    return f"{protocol}-{fingerprint[:8]}{RESULT_SUFFIX}"


def evaluation_names(run: Folder) -> list[str]:
    """Return the names of the evaluations in EVALUATION, without suffix, sorted."""
    names = (run / EVALUATION).names(RESULT_SUFFIX)
    return [name.removesuffix(RESULT_SUFFIX) for name in names]


def used_parts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the learned parts that each row used, in words, of those that say so.

    `rows` are the backbones of an evaluation, or the cells of a comparison.
    """
    told = [row for row in rows if "used" in row]
    names = [" ".join(filter(None, (row.get("method"), _backbone(row)))) for row in told]
    parts = [", ".join(row["used"]) or "none" for row in told]
    return [f"{name}: {used}" for name, used in zip(names, parts, strict=True)]


def used_by_evaluations(run: Folder) -> list[str]:
    """Return the learned parts that each evaluation of a run used, in words."""
    found = []
    for name in evaluation_names(run):
        with suppress(ValueError, LookupError, TypeError):  # another program's file
            rows = (run / EVALUATION).read_json(result_name(name))["backbones"]
            found += [f"in {name} with {used}" for used in used_parts(rows)]
    return found


def _backbone(row: dict[str, Any]) -> str:
    return row["name"] if "name" in row else f"with {row['backbone']}"


def result_name(key: str) -> str:
    """Return the file name of a trial's result, or of an evaluation without suffix."""
    return f"{key}{RESULT_SUFFIX}"


def finished_trials(trials: Folder) -> set[str]:
    """Return the keys of the trials that have a result in the folder TRIALS."""
    return {name.removesuffix(RESULT_SUFFIX) for name in trials.names(RESULT_SUFFIX)}


def state_name(key: str) -> str:
    """Return the file name of a trial's state below STATES."""
    return f"{key}{STATE_SUFFIX}"


def set_name(method: str, size: str) -> str:
    """Return the name of a set's run folder below a comparison; `size` is pairs or a budget."""
    return f"sets/{method}-{size}"


def store_name(fingerprint: str) -> str:
    """Return the name of a shared embedding store below a comparison."""
    return f"embeddings/{fingerprint[:12]}"


def experts_name(fingerprint: str) -> str:
    """Return the name of a shared store of experts below a comparison."""
    return f"experts/{fingerprint[:12]}"


def read_table(path: str) -> dict[str, Any] | None:
    """Return the table of the comparison at `path`, None if it is none.

    Raises ConfigError in one line if it is damaged.
    """
    folder = Folder(path)
    if folder.exists(RunFolder.MANIFEST) or not folder.exists(COMPARISON):
        return None
    try:
        return folder.read_json(COMPARISON)
    except ValueError as error:
        raise ConfigError(
            f"{folder.full(COMPARISON)} cannot be read as a comparison ({first_line(error)})"
        ) from error


def frontier(cells: Sequence[dict[str, Any]], cost: str) -> list[dict[str, Any]]:
    """Return the cells that no other matches at a smaller or equal `cost`, cheapest first.

    `cost` is a count of the cells, such as bytes; they are of one backbone, or its average.
    """
    best, found = -1.0, []
    for cell in sorted(cells, key=lambda cell: (cell[cost], -cell["mean"]["r_mean"])):
        if cell["mean"]["r_mean"] > best:
            best = cell["mean"]["r_mean"]
            found.append(cell)
    return found
