"""The requirements for pip: one FAISS per kind of installation, a pin per requirement."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pds_ray
from tests.support.cluster_files import pins

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINUX = {"sys_platform": "linux", "platform_machine": "x86_64"}
ARM = {"sys_platform": "linux", "platform_machine": "aarch64"}
MAC = {"sys_platform": "darwin", "platform_machine": "arm64"}


def packages(machine: dict[str, str], *extras: str) -> Iterator[str]:
    """Yield what pip installs of the requirements themselves: of the base, and of each extra."""
    lists = [PROJECT["dependencies"], *(EXTRAS[extra] for extra in extras)]
    for requirement in map(Requirement, (line for lines in lists for line in lines)):
        if requirement.name == PROJECT["name"]:
            yield from packages(machine, *requirement.extras)
        elif requirement.marker is None or requirement.marker.evaluate(machine):
            yield requirement.name


@pytest.mark.parametrize(
    ("machine", "extras", "faiss"),
    [
        (LINUX, (), set()),
        (LINUX, ("cpu",), {"faiss-cpu"}),
        (LINUX, ("gpu",), {"faiss-gpu"}),
        (LINUX, ("gpu", "hub", "dev", "fuzz"), {"faiss-gpu"}),
        (LINUX, ("cpu", "hub", "dev", "fuzz"), {"faiss-cpu"}),
        (ARM, ("gpu",), {"faiss-cpu"}),
        (MAC, ("gpu",), {"faiss-cpu"}),
        (MAC, ("cpu", "dev"), {"faiss-cpu"}),
    ],
)
def test_each_kind_has_one_faiss(
    machine: dict[str, str], extras: tuple[str, ...], faiss: set[str]
) -> None:
    """Two would overwrite each other: they are the same module."""
    assert {name for name in packages(machine, *extras) if name.startswith("faiss")} == faiss


def test_every_requirement_has_a_pin_that_fits() -> None:
    pinned = {canonicalize_name(name): version for name, version in pins().items()}
    for lines in (PROJECT["dependencies"], *EXTRAS.values()):
        for requirement in map(Requirement, lines):
            if requirement.name != PROJECT["name"]:
                version = pinned.get(canonicalize_name(requirement.name))
                assert version, f"{requirement.name} has no line in constraints.txt"
                assert requirement.specifier.contains(version), f"{requirement}, pinned {version}"


@pytest.mark.long
def test_every_package_that_is_imported_is_required() -> None:
    """It might come with another one today, and no more with the next version of that."""
    imported: set[str] = set()
    for path in (ROOT / "pds_ray").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    brings = packages_distributions()
    required = {canonicalize_name(name) for name in packages(LINUX, "cpu", "gpu")}
    assert [
        name
        for name in imported - set(sys.stdlib_module_names) - {"pds_ray"}
        if required.isdisjoint(map(canonicalize_name, brings.get(name, ())))
    ] == []


def test_the_version_is_said_once() -> None:
    assert PROJECT["version"] == pds_ray.__version__


@pytest.mark.parametrize(
    ("args", "folder", "kind"), [([], ".venv", "cpu"), (["KIND=gpu"], ".venv-gpu", "gpu")]
)
def test_make_has_an_environment_per_kind(args: list[str], folder: str, kind: str) -> None:
    make = ["make", "--dry-run", "--always-make", *args, "develop"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    installed = re.findall(r"(\S+)/bin/python -m pip install .* -e '(.+)'", done.stdout)
    assert installed == [(folder, f".[{kind}]"), (folder, f".[{kind},dev]")]
