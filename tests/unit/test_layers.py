"""Who may import whom, read off the source; and what naming the package costs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from pds_ray import catalog

ROOT = Path(__file__).resolve().parents[2]

PLUGINS = ("sources", "encoders", "decoders", "selectors", "backbones", "distillers")

# The layers, top first: a module may import from its own folder and from any layer below it.
# `catalog` names the plug-ins as text and imports them when asked, so it stands below them.
ORDER = (
    ("pds_ray", "pds_ray.cli", "jobs"),
    ("pds_ray.planning", "pds_ray.report"),
    ("pds_ray.engine",),
    ("pds_ray.distributed",),
    ("pds_ray.stages",),
    ("pds_ray.methods", *(f"pds_ray.{folder}" for folder in PLUGINS)),
    ("pds_ray.store", "pds_ray.training"),
    ("pds_ray.config", "pds_ray.recipes", "pds_ray.published"),
    ("pds_ray.catalog", "pds_ray.errors", "pds_ray.modalities", "pds_ray.telemetry"),
)
FREE = ("pds_ray.demo",)  # training scripts, no part of a run: nothing may import them
HEAVY = (
    "ray",
    "torch",
    "torchvision",
    "open_clip",
    "diffusers",
    "transformers",
    "faiss",
    "scipy",
    "datasets",
)


def modules() -> dict[str, Path]:
    found = {}
    for folder in ("pds_ray", "jobs"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str, typing_too: bool = False) -> set[str]:
    """Absolute names of the modules that `name` imports anywhere, functions included.

    Blocks under `if TYPE_CHECKING:` never run and count only if `typing_too`.
    """
    tree = ast.parse(MODULES[name].read_text())
    skipped: set[int] = set()
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
                skipped |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else str(node.module))
    return found


def layer(name: str) -> int | None:
    for depth, names in enumerate(ORDER):
        if name in names or any(
            name.startswith(f"{prefix}.") for prefix in names if prefix != "pds_ray"
        ):
            return depth
    return None


def test_every_module_has_a_layer():
    assert [name for name in MODULES if layer(name) is None and not name.startswith(FREE)] == []


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if layer(name) is not None])
def test_imports_go_one_way(name):
    """Imports of all modules; the training scripts may import anything."""
    mine = layer(name)
    for other in sorted(imports(name)):
        if other.partition(".")[0] not in ("pds_ray", "jobs"):
            continue
        assert not other.startswith(FREE), f"{name} imports {other}"
        theirs = layer(other)
        assert theirs is not None
        assert theirs >= mine, f"{name} imports {other}, which stands above it"
        is_base = (
            other.split(".")[1:2] and other.split(".")[1] in PLUGINS and other.endswith(".base")
        )
        if theirs == mine and mine > 0 and not is_base:
            assert parent(name) == parent(other), (
                f"{name} imports {other}, another branch of the same layer"
            )


def parent(name: str) -> str:
    """Return the folder of a module or package; top-level modules count as one folder."""
    in_folder = name.count(".") >= 2 or MODULES[name].stem == "__init__"
    return ".".join(name.split(".")[:2]) if in_folder else "pds_ray"


@pytest.mark.parametrize("name", sorted(n for n in MODULES if n.startswith("pds_ray.stages.")))
def test_stages_know_only_the_base_of_a_plugin(name):
    for other in imports(name, typing_too=True):
        parts = other.split(".")
        if parts[0] == "pds_ray" and len(parts) > 2 and parts[1] in PLUGINS:
            assert parts[2] == "base", f"{name} imports {other}"


@pytest.mark.parametrize(
    "name", sorted(n for n in MODULES if n.split(".")[1:2] and n.split(".")[1] in PLUGINS)
)
def test_plugins_do_not_know_each_other(name):
    """A new plug-in is one new file: no other one leans on it.

    Parts that plug-ins of a folder share are no plug-ins: the catalog does not name them.
    """
    tables = [getattr(catalog, name) for name in dir(catalog) if name.endswith("S")]
    named = {entry.partition(":")[0] for table in tables for entry in table.values()}
    for other in imports(name):
        parts = other.split(".")
        if parts[0] == "pds_ray" and len(parts) > 2 and parts[1] in PLUGINS and other != name:
            shared = parts[1] == name.split(".")[1] and other not in named
            assert parts[2] == "base" or shared, f"{name} imports {other}"


def test_only_the_ray_layer_imports_ray():
    users = {
        name
        for name in MODULES
        if any(other.split(".")[0] == "ray" for other in imports(name, typing_too=True))
    }
    assert "pds_ray.distributed.session" in users  # that the search finds anything
    assert {
        name for name in users if not name.startswith(("pds_ray.distributed.", "jobs"))
    } == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_one_module_has_all_private_hooks_of_ray(name):
    """A new release of Ray is checked in one place."""
    private = r"ray\._private|ray\.experimental|_internal\b"
    found = re.findall(private, MODULES[name].read_text())
    if name == "pds_ray.distributed.ray_private":
        assert len(set(found)) == 3, "the search finds nothing"
    else:
        assert found == []


@pytest.mark.parametrize(
    "statement",
    ["import pds_ray", "import pds_ray.cli.main", "from pds_ray import recipe, configure"],
)
def test_importing_the_package_is_cheap(statement):
    code = f"import sys; {statement}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_stages_work_where_ray_is_not_installed():
    stages = [name for name in MODULES if name.startswith("pds_ray.stages.")]
    without = ("isolated", "lifetime", "limits", "places", "process", "sizes")
    alone = [f"pds_ray.distributed.{name}" for name in without]
    code = f"import sys; sys.modules['ray'] = None; import {', '.join(stages + alone)}"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("entry", sorted(set(catalog.SOURCES.values())))
def test_every_source_is_there(entry):
    module, _, cls = entry.partition(":")
    source = getattr(import_module(module), cls)
    assert callable(source.shards)
    assert callable(source.read)


MODELS = (catalog.ENCODERS, catalog.TEXT_ENCODERS, catalog.DECODERS)


@pytest.mark.parametrize("entry", sorted({entry for table in MODELS for entry in table.values()}))
def test_every_model_plugin_is_there(entry):
    module = import_module(entry)
    assert callable(module.describe)
    assert callable(module.load)


@pytest.mark.parametrize("entry", sorted(set(catalog.BACKBONES.values())))
def test_every_backbone_is_there(entry):
    module = import_module(entry)
    assert callable(module.describe)
    assert callable(module.build)


@pytest.mark.parametrize("entry", sorted(catalog.SELECTORS.values()))
def test_every_selector_is_there(entry):
    module = import_module(entry)
    assert callable(module.select)
    assert module.DESCRIPTION


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_unpickled(name):
    """Files of others are read by formats that cannot run code."""
    forbidden = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
    assert {other.split(".")[0] for other in imports(name)} & forbidden == set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        assert keywords.get("allow_pickle", "False") == "False", f"{name}: {called}"
        assert not called.endswith("torch.load") or keywords.get("weights_only") == "True", (
            f"{name}: {called}"
        )
        assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load"), f"{name}: {called}"
