"""Methods that improve a set: their stages, what these depend on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pds_ray import catalog
from pds_ray.config import ConfigError, DistillConfig, replace
from pds_ray.engine.compare import entries
from pds_ray.engine.optimisation import experts_key
from pds_ray.engine.plan import make_run
from pds_ray.methods.base import Run
from pds_ray.methods.start import noise_side
from pds_ray.published import PUBLISHED
from pds_ray.recipes import RECIPES, protocol, recipe
from pds_ray.stages import start as core
from pds_ray.stages.experts import want_experts
from pds_ray.store.distilled_set import load_distilled
from pds_ray.store.expert_store import ExpertStore, ExpertStoreError
from pds_ray.store.storage import Folder
from tests.support.docs_pages import DOCS
from tests.support.hand_made_set import scenes_set

BASE = {"source": "scenes:120", "pairs": 5, "out": "unused", "method": "lors"}
PLAIN = replace(recipe("scenes"), {"distill": DistillConfig()})
OWN = ("experts", "optimise", "materialize")


def run_of(**changes: Any) -> Run:
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return make_run(replace(PLAIN, {**BASE, **names}))


@pytest.fixture(scope="module")
def lors() -> dict[str, str]:
    return run_of().fingerprints


@pytest.mark.parametrize("init", ["random", "k_center", "pds", "coverage"])
def test_the_stages_of_the_start_come_first_and_are_those_of_its_method(init: str) -> None:
    method, start = catalog.method("lors", init=init), catalog.method(init)
    assert method.names == (*start.names[:-1], *OWN)
    plain = run_of(method=init, decode__decoder="nearest").fingerprints
    improved = run_of(distill__init=init, decode__decoder="nearest").fingerprints
    for name in start.names[:-1]:
        assert improved[name] == plain[name], "a start is made as by itself"


def test_real_is_another_name_of_random() -> None:
    real, random = (run_of(distill__init=name).fingerprints for name in ("real", "random"))
    assert real == random


def test_a_method_that_improves_a_start_is_none() -> None:
    with pytest.raises(ConfigError, match=r"'mdm', a method that improves a start itself"):
        run_of(distill__init="mdm")


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"pairs": 6}, "select"),
        ({"distill__init": "noise"}, "decode"),
        ({"experts__count": 3}, "experts"),
        ({"experts__epochs": 4}, "experts"),
        ({"experts__seed": 1}, "experts"),
        ({"experts__backbone": "small_vit"}, "experts"),
        ({"experts__train": "heads"}, "experts"),
        ({"experts__learning_rate": 0.2}, "experts"),
        ({"method": "bi_trajectory"}, "optimise"),
        ({"distill__iterations": 7}, "optimise"),
        ({"distill__gradient": "tesla"}, "optimise"),
        ({"distill__image_rate": 7.0}, "optimise"),
        ({"distill__rank": 3}, "optimise"),
        ({"distill__anchor": 0.005}, "optimise"),
        ({"distill__evaluate_every": 7}, "optimise"),
        ({"distill__smooth": True}, "optimise"),
        ({"distill__augment": True}, "optimise"),
        ({"experts__store": "elsewhere"}, ""),
        ({"experts__cpus": 2}, ""),
        ({"extras__captions": 2}, "materialize"),
        ({"prune__ratio": 0.5}, ""),
        ({"distill__iterations": 3000}, ""),  # LoRS's own number
    ],
)
def test_a_change_makes_stale_what_depends_on_it(
    lors: dict[str, str], changes: dict[str, Any], first: str
) -> None:
    changed = run_of(**changes).fingerprints
    names = list(lors)
    stale = [stage for stage in names if changed[stage] != lors[stage]]
    assert stale == (names[names.index(first) :] if first else [])


def test_a_method_fills_in_its_own_values_and_trains_what_it_matches() -> None:
    run = run_of(method="repblend", distill__rank=7)
    own = catalog.distiller("repblend").DEFAULTS
    assert run.config.distill == DistillConfig(**{**own, "rank": 7})
    assert run.config.experts.train == "heads"
    assert run_of(method="lors", experts__train="backbone").config.experts.train == "backbone"


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("mdm", {"steps": 3, "gradient": "tesla", "max_start": 9, "similarity": "full"}),
        ("lors", {"mix": True}),
    ],
)
def test_nothing_depends_on_options_that_a_method_does_not_read(
    method: str, changes: dict[str, Any]
) -> None:
    given = {f"distill__{name}": value for name, value in changes.items()}
    assert run_of(method=method, **given).fingerprints == run_of(method=method).fingerprints
    read = {"image_rate": 7.0, "anchor": 0.01, "evaluate_every": 3, "smooth": True}
    for name, value in read.items():
        changed = run_of(method=method, **{f"distill__{name}": value})
        assert changed.fingerprints["optimise"] != run_of(method=method).fingerprints["optimise"]
        assert getattr(changed.config.distill, name) == value


# ---- a finished set as start


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(scenes_set(tmp_path_factory.mktemp("set") / "made", 5))


def with_space(monkeypatch: pytest.MonkeyPatch, encoder_space: str | None) -> None:
    """Let sets say that they were made in a space."""
    load = core.load_distilled

    def loaded(path: str) -> Any:
        found = load(path)
        found.manifest["about"]["space"] = encoder_space
        return found

    monkeypatch.setattr(core, "load_distilled", loaded)


def test_a_finished_set_can_be_the_start(finished: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_space(monkeypatch, run_of().encoder.space)
    run = run_of(distill__init=finished)
    assert list(run.fingerprints) == ["embed", "start", *OWN]
    rows = core.prototypes_of(load_distilled(finished))
    assert rows.column("caption").to_pylist() == load_distilled(finished).captions
    assert rows.num_rows == 5


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pairs": 6}, r"has 5 pairs, and 6 are asked for; give --pairs 5"),
        ({"distill__init": "k_centre"}, r"'k_centre', no method and no finished run"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(
    finished: str, changes: dict[str, Any], complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_space(monkeypatch, run_of().encoder.space)
    with pytest.raises(ConfigError, match=complaint):
        run_of(**{"distill__init": finished, **changes})


def test_a_start_of_another_space_is_refused(
    finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_space(monkeypatch, "another")
    with pytest.raises(ConfigError, match=r"was made in the space of another, and encoder demo"):
        run_of(distill__init=finished)


def test_the_run_folder_is_no_start_of_its_own(finished: str) -> None:
    with pytest.raises(ConfigError, match="the run folder itself"):
        run_of(distill__init=finished, out=finished)


def test_noise_has_the_side_of_the_experts() -> None:
    """Resized it would be smoothed, and no longer as strong as it was drawn."""
    plain, small = (run_of(distill__init="noise", experts__image_size=s) for s in (0, 24))
    assert noise_side(small.config) == 24
    own = catalog.describe_backbone(plain.config.experts.backbone).image_size
    assert noise_side(plain.config) == own
    assert plain.fingerprints["select"] == small.fingerprints["select"]
    assert plain.fingerprints["decode"] != small.fingerprints["decode"]


def test_noise_is_drawn_by_seed_and_pair() -> None:
    first, again, other, later = (
        core.noise(*which, 32).tobytes() for which in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert first == again
    assert len({first, other, later}) == 3
    values = list(first)
    assert abs(sum(values) / len(values) - core.NOISE_MEAN) < 4


# ---- refusals before anything long


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"pairs": 0, "budget": "1MB"}, r"--budget counts bytes of images and captions"),
        ({"experts__epochs": 1}, r"experts have 1 epochs; give --experts.epochs 2"),
        ({"experts__backbone": "no_such_net"}, r"no_such_net"),
        ({"distill__loss": "info_nce"}, r"--distill.similarity low_rank learns nothing"),
        (
            {"method": "bi_trajectory", "distill__similarity": "full"},
            r"--distill.similarity full learns nothing with --distill.loss info_nce",
        ),
        (
            {"distill__anchor": 0.015, "distill__image_rate": 100.0},
            r"--distill.anchor 0.015 throws pixels past the start, .* far below 0.015",
        ),
    ],
)
def test_what_cannot_be_optimised_is_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        run_of(**changes)


def test_a_store_of_other_experts_is_refused(tmp_path: Path) -> None:
    store = ExpertStore(Folder(str(tmp_path)))
    store.folder.create()
    store.begin({"backbone": "another 1"}, {})
    with pytest.raises(ExpertStoreError, match="are of another"):
        run_of(experts__store=str(tmp_path))


def test_experts_of_the_shards_that_could_be_embedded_are_no_others(tmp_path: Path) -> None:
    """Shards that fail are known later: a run on such a store must be able to go on."""
    store, source = ExpertStore(Folder(str(tmp_path))), BASE["source"]
    made_from = want_experts(run_of().config, run_of().source, [], store.folder).made_from()
    store.folder.create()
    store.begin(made_from, {"source": source})
    assert run_of(experts__store=str(tmp_path)).config.source == source
    with pytest.raises(ExpertStoreError, match="are of another source"):
        run_of(experts__store=str(tmp_path), source="scenes:121")


# ---- comparisons and presets

CONFIG = replace(recipe("scenes"), {"out": "runs/comparison"})
JUDGED = replace(protocol("standard"), {"test": "scenes:60:7"})


def test_the_start_of_a_method_stands_before_it() -> None:
    plain, polished, other = entries(
        CONFIG, ["mdm", "pds>mdm", "pds>mdm+match.filter=false"], [10], JUDGED
    )
    assert (plain.run.method, plain.run.distill.init) == ("mdm", "random")
    assert (polished.run.method, polished.run.distill.init) == ("mdm", "pds")
    assert not other.run.match.filter
    assert [row.label for row in (plain, polished)] == ["mdm-10", "pds>mdm-10"]
    assert len({row.folder for row in (plain, polished, other)}) == 3


def test_sets_of_all_seeds_and_sizes_share_experts_of_one_training() -> None:
    def key(**changes: Any) -> str:
        return experts_key(run_of(**changes))

    shared = key()
    for changes in ({"pairs": 7}, {"seed": 4}, {"method": "mdm"}, {"distill__init": "pds"}):
        assert key(**changes) == shared
    for changes in ({"method": "repblend"}, {"experts__seed": 1}, {"source": "scenes:121"}):
        assert key(**changes) != shared


@pytest.mark.parametrize(
    ("method", "complaint"),
    [
        ("pds>random", "random improves no start; those that do: bi_trajectory"),
        ("pds>mdm+distill.init=random", "its start is given twice"),
        ("pds>nothing", "unknown method 'nothing'"),
        ("mdm+match.filter=false", "changes nothing here"),
    ],
)
def test_what_is_no_start_is_refused(method: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        entries(CONFIG, [method], [10], JUDGED)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_presets_are_whole_and_have_a_figure(name: str) -> None:
    config, page = recipe(name), (DOCS / "optimisation.md").read_text(encoding="utf-8")
    method, data, pairs = name.rsplit("_", 2)
    assert (config.method, config.source.partition(":")[0]) == (method, data)
    assert int(pairs) - config.pairs in (0, 1)
    assert f"| `{method}_{data}_100`" in page


def test_the_hybrid_keeps_its_start_if_nothing_is_better() -> None:
    config = RECIPES["hybrid"]()
    assert config.distill.init == "pds"
    assert config.distill.evaluate_every > 0, "the start is validated, too"
    pull = 2 * config.distill.anchor * config.distill.image_rate
    assert 0 < pull < 0.1, "a step of the anchor alone goes a small part of the way back"
