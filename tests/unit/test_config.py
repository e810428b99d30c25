"""Every option is reached by its name, and every wrong value is refused in one line.

By name, by constructor, by YAML file and by flag alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pds_ray.cli import main as cli
from pds_ray.config import (
    FREE_FIELDS,
    ConfigError,
    EvaluateConfig,
    Option,
    RunConfig,
    flatten,
    options,
    replace,
    sections,
    to_dict,
)
from pds_ray.recipes import RECIPES, recipe

RAY = {  # option: values at the edges of what is allowed, values just beyond them
    "ray.address": (["auto"], []),
    "ray.num_cpus": ([1], [0]),
    "ray.object_store_gib": ([0.08, 0.5], [0.07, 0.0, -1.0]),
    "ray.read_resources": (["reader=1"], ["reader=-1"]),
    "ray.executions": ([0, 4], [-1]),
    "ray.embed_workers": ([0, 2], [-1]),
    "ray.embed_min_workers": ([2], [0]),
    "ray.embed_gpus": ([0.0, 0.5, 1.0, 2.0], [-0.5, 1.5]),
    "ray.embed_resources": (["H100=1"], ["H100", "H100=many", "=1", "H100=0", "H100=nan"]),
    "ray.decode_workers": ([0, 2], [-1]),
    "ray.decode_min_workers": ([2], [0]),
    "ray.decode_gpus": ([0.0, 2.0], [-0.5, 1.5]),
    "ray.decode_resources": (["A100=0.5,nvme=1"], ["GPU=1"]),
    "ray.max_bad_share": ([0.0, 1.0], [-0.1, 1.1]),
    "ray.max_failed_share": ([0.0, 1.0], [-0.1, 1.1]),
    "ray.sample_timeout_s": ([0.5], [0.0]),
}
FILES = {
    "read.max_pixels": ([1], [0]),
    "read.min_side": ([1], [0]),
    "read.image_suffixes": (["auto", "jpg,input.jpg"], ["", " , "]),
    "read.caption_suffixes": (["auto", ".txt"], ["", " , "]),
    "read.caption_keys": (["auto", "TEXT, alt text"], ["", " , "]),
    "read.caption_lines": (["auto", "each", "whole"], ["all"]),
}
RUN = {
    "source": (["scenes:10"], []),
    "out": (["runs/x"], []),
    "pairs": ([1], [0, -5]),
    "budget": (["2MB", "1.5MiB"], ["much", "0kB"]),
    "seed": ([0, 2**31 - 1], [-1, 2**31]),
    "method": (
        ["coverage", "random", "herding", "k_center", "forgetting", "clip_score"],
        ["magic"],
    ),
    "read.captions": (["basic", "paper", "none"], ["shiny"]),
    **FILES,
    "embed.encoder": (["demo"], []),
    "embed.precision": (["auto", "fp32", "fp16", "bf16"], ["int8"]),
    "embed.batch_size": ([16, 48], [0, -16, 17]),
    "embed.store": (["shared"], []),
    "embed.store_dtype": (["float16", "float32"], ["float64"]),
    "select.forgotten": (["fewest", "most"], ["some"]),
    "select.epochs": ([2], [1]),
    "whiten.ridge": ([1e-9, 1.0], [0.0]),
    "cover.candidates": ([0, 1], [-1]),
    "cover.herded": ([0.0, 1.0], [-0.1, 1.1]),
    "prune.ratio": ([0.0, 0.999], [-1e-9, 1.0]),
    "cluster.solver": (["faiss", "distributed"], ["auto"]),
    "cluster.iterations": ([1], [0]),
    "cluster.tolerance": ([0.0, 0.999], [-1e-9, 1.0]),
    "cluster.restarts": ([2], [0]),
    "cluster.normalize": ([True], []),
    "cluster.memory_gib": ([0.1], [0.0]),
    "cluster.modality": (["separate", "joint", "image", "text"], ["both"]),
    "match.solver": (["auto", "dense", "sparse"], ["greedy"]),
    "match.pairless": (["auto", "keep", "drop"], [""]),
    "match.filter": ([False], []),
    "decode.decoder": (["nearest"], []),
    "decode.model": (["demo"], []),
    "decode.revision": (["abc"], []),
    "decode.condition": (["prototype", "caption"], ["image"]),
    "decode.steps": ([1], [0]),
    "decode.guidance": ([-1.0, 0.0, 1.5], []),
    "decode.noise_level": ([0, 999], [-1, 1000]),
    "decode.negative_prompt": ([""], []),
    "decode.rescale": ([True], []),
    "decode.precision": (["auto", "fp32", "fp16", "bf16"], ["fp8"]),
    "decode.batch_size": ([1], [0]),
    "decode.image_size": ([0], [-1]),
    "decode.format": (["auto", "png", "jpeg", "webp"], ["gif"]),
    "decode.quality": ([1, 100], [0, 101]),
    "extras.captions": ([0, 4], [-1]),
    "extras.similarity": (["off", "clip", "table"], ["nothing"]),
    "extras.temperature": ([1e-9], [0.0, -1.0]),
    "extras.share": ([1e-9, 0.999], [0.0, 1.0]),
    "decode.candidates": ([1, 8], [0]),
    "decode.noise_levels": (["", "0", "0, 10,999"], ["1000", "0,-1", "some", "1.5"]),
    "decode.image_weight": ([0.0, 2.0], [-0.1]),
    "decode.text_weight": ([0.0, 2.0], [-0.1]),
    "decode.real_fallback": ([True], []),
    "decode.real_margin": ([0.0, 2.0], [-0.1]),
    "prototypes.center": (["mean", "medoid"], ["mode"]),
    "distill.init": (["pds", "runs/x"], []),
    "distill.iterations": ([0, 1], [-1]),
    "distill.gradient": (["auto", "adjoint", "tesla", "unrolled"], ["exact"]),
    "distill.steps": ([0, 1], [-1]),
    "distill.expert_epochs": ([0, 1], [-1]),
    "distill.max_start": ([0, 1], [-1]),
    "distill.independent_starts": ([True], []),
    "distill.smooth": ([True], []),
    "distill.batch_size": ([0, 1], [-1]),
    "distill.sampling": (["auto", "fresh", "chunks"], ["epoch"]),
    "distill.image_rate": ([0.0, 1000.0], [-0.1]),
    "distill.text_rate": ([0.0, 1000.0], [-0.1]),
    "distill.similarity_rate": ([0.0, 100.0], [-0.1]),
    "distill.step_rate": ([0.0, 0.01], [-0.1]),
    "distill.step_size": ([0.0, 0.1], [-0.1]),
    "distill.step_floor": ([1e-9], [0.0, -1.0]),
    "distill.temperature": ([1e-3, 0.07], [0.0, -1.0]),
    "distill.momentum": ([0.0, 0.999], [-0.1, 1.0]),
    "distill.loss": (["auto", "info_nce", "ence", "wbce", "soft_wbce"], ["bce"]),
    "distill.similarity": (["auto", "identity", "full", "low_rank"], ["none"]),
    "distill.rank": ([0, 1], [-1]),
    "distill.alpha": ([0.0, 3.0], [-0.1]),
    "distill.mix": ([False, True], []),
    "distill.merge_branches": ([True, False], []),
    "distill.dropout": (["off", "replay"], ["on"]),
    "distill.augment": ([True], []),
    "distill.anchor": ([0.0, 1.0], [-0.1]),
    "distill.evaluate_every": ([0, 1], [-1]),
    "distill.patience": ([1], [0]),
    "caption.nearest_to": (["picture", "prototype", "both"], ["image"]),
    "caption.round_trip": ([True], []),
    "experts.store": (["shared"], []),
    "experts.count": ([1], [0]),
    "experts.seed": ([0, 2**31 - 1], [-1, 2**31]),
    "experts.epochs": ([1], [0]),
    "experts.backbone": (["small_vit"], []),
    "experts.text_encoder": (["bert:bert-base-uncased"], []),
    "experts.image_size": ([0, 96], [-1]),
    "experts.train": (["all", "backbone", "heads", "lora"], ["text_head"]),
    "experts.rank": ([1], [0]),
    "experts.shared_start": ([True], []),
    "experts.learning_rate": ([1e-9], [0.0, -1.0]),
    "experts.text_learning_rate": ([1e-9], [0.0, -1.0]),
    "experts.momentum": ([0.0, 0.999], [-0.1, 1.0]),
    "experts.weight_decay": ([0.0, 1e-4], [-1.0]),
    "experts.batch_size": ([2], [1]),
    "experts.augment": ([False], []),
    "experts.schedule": (["constant", "step", "cosine"], ["linear"]),
    "experts.cpus": ([1, 2], [0]),
    "experts.gpus": ([0.0, 0.5, 2.0], [-0.5]),
    **RAY,
}
EVALUATION = {
    **FILES,
    "test": (["scenes:10"], []),
    "val": (["scenes:20"], []),
    "backbones": (["small_vit"], [" , "]),
    "seeds": ([1], [0]),
    "workers": ([2], [0]),
    "trials": ([0, 2], [-1]),
    "max_failures": ([0], [-1]),
    "save_every_s": ([0.0], [-1.0]),
    "protocol.train": (["text_head", "heads", "backbone", "all"], ["nothing"]),
    "protocol.text": (["captions", "prototypes"], ["nothing"]),
    "protocol.text_encoder": (["bert:bert-base-uncased"], []),
    "protocol.captions": (["basic", "paper", "none"], ["nothing"]),
    "protocol.image_size": ([0, 96], [-1]),
    "protocol.normalization": (["backbone", "clip"], ["nothing"]),
    "protocol.augment": ([False], []),
    "protocol.optimizer": (["adamw", "sgd"], ["nothing"]),
    "protocol.learning_rate": ([1e-9], [0.0, -1.0]),
    "protocol.momentum": ([0.0], [-1.0]),
    "protocol.weight_decay": ([0.0], [-1.0]),
    "protocol.schedule": (["cosine", "step", "constant"], ["nothing"]),
    "protocol.epochs": ([1], [0, -1]),
    "protocol.batch_size": ([2], [1]),
    "protocol.sampling": (["epoch", "independent"], ["nothing"]),
    "protocol.evaluate_every": ([1], [0, -1]),
    "protocol.select": (["val", "test", "last"], ["nothing"]),
    "protocol.fit": (["squash", "crop"], ["pad"]),
    "protocol.subjects": (["image", "caption"], ["nothing"]),
    "protocol.targets": (["hard", "soft"], ["nothing"]),
    "protocol.captions_per_image": (["one", "all"], ["5"]),
    "protocol.learned": (["auto", "off"], ["on"]),
    **RAY,
}
WRONG_TYPE = {
    bool: ["maybe", 2, [True]],
    int: ["many", "2.5", 2.5, True, [1], {"a": 1}, math.inf, math.nan],
    float: ["a fifth", "nan", True, [1], {"a": 1}, math.inf, -math.inf, math.nan],
    str: [True, ["a", "b"], {"a": 1}],
}


def known(top: type) -> dict[str, Option]:
    groups = (top, *sections(top).values())
    return {option.name: option for group in groups for option in options(group).values()}


EDGES = {RunConfig: RUN, EvaluateConfig: EVALUATION}
EVERY = [(top, option) for top in EDGES for option in known(top).values()]
BOUNDED = [each for each in EVERY if each[1].allowed or each[1].kind is float]
PARSER = cli.build_parser()


def each_of(found: list[tuple[type, Option]]) -> pytest.MarkDecorator:
    names = [f"{top.__name__}-{option.name}" for top, option in found]
    return pytest.mark.parametrize(("top", "option"), found, ids=names)


def by_constructor(top: type, name: str, value: Any) -> Any:
    section, _, field = name.rpartition(".")
    made = {**sections(top), "": top}[section](**{field: value})
    return top(**{section: made}) if section else made


def by_name(top: type, name: str, value: Any) -> Any:
    return replace(top(), {name: value})


def by_flag(top: type, name: str, value: Any, *command: str) -> Any:
    default = ("distill",) if top is RunConfig else ("evaluate", "x")
    return resolved(top, *(command or default), f"--{name}={value}")


def resolved(top: type, *args: str) -> Any:
    parsed: argparse.Namespace = PARSER.parse_args(args)
    return cli.resolve(parsed) if top is RunConfig else cli.resolve_evaluation(parsed)


@pytest.fixture(scope="module")
def by_file(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path: Path = tmp_path_factory.mktemp("config") / "config.yaml"

    def resolve(top: type, name: str, value: Any) -> Any:
        section, _, field = name.rpartition(".")
        path.write_text(yaml.safe_dump({section: {field: value}} if section else {field: value}))
        command = ("distill",) if top is RunConfig else ("evaluate", "x")
        return resolved(top, *command, "--config", str(path))

    return resolve


def values(config: Any) -> dict[str, Any]:
    return flatten(to_dict(config), type(config))


def refusal(make: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("top", EDGES)
def test_every_option_is_tried_here(top: type) -> None:
    assert sorted(EDGES[top]) == sorted(known(top)) == sorted(values(top()))


@each_of(EVERY)
def test_values_at_the_edges(top: type, option: Option, by_file: Any) -> None:
    """No other option changes; what is beyond the edge, or of another type, is refused by name."""
    before, (inside, outside) = values(top()), EDGES[top][option.name]
    for value in inside:
        for make in (by_name, by_file, by_flag, by_constructor):
            found = values(make(top, option.name, value))
            assert found == {**before, **freed(option, found), option.name: value}
            assert type(found[option.name]) is type(value)
    for value in outside:
        for make in (by_name, by_file, by_flag, by_constructor):
            assert option.name in refusal(make, top, option.name, value)
    for value in WRONG_TYPE[option.kind] + ([] if option.optional else [None]):
        as_text = option.kind is str and value is True  # a file holds text, as a flag does
        for make in (by_name,) if as_text else (by_name, by_file):
            assert option.name in refusal(make, top, option.name, value)


@each_of(EVERY)
def test_every_option_has_a_flag_in_each_command(top: type, option: Option) -> None:
    """With dashes or underscores, and a value that differs from the default."""
    other = next(value for value in EDGES[top][option.name][0] if value != option.default)
    commands = [("distill",)] if top is RunConfig else [("evaluate", "x"), ("compare",)]
    for command in commands:
        for name in (option.name, option.name.replace("_", "-"), *option.aliases):
            found = values(by_flag(top, name, other, *command))
            assert found == {**values(top()), **freed(option, found), option.name: other}


def beyond(option: Option, number: float, direction: float) -> float:
    if option.kind is float:
        return math.nextafter(number, direction)
    return number + (1 if direction > 0 else -1)


def ends(option: Option) -> tuple[Any, Any]:
    """The smallest and the largest number that are allowed, if there are such."""
    low = option.at_least if option.above is None else beyond(option, option.above, math.inf)
    high = option.at_most if option.below is None else beyond(option, option.below, -math.inf)
    return low, high


def inside(option: Option) -> st.SearchStrategy[Any]:
    if option.choices:
        return st.sampled_from(option.choices)
    if option.multiple_of:
        return st.integers(1).map(lambda number: number * option.multiple_of)
    if option.name.endswith("_gpus"):  # a share of one, or whole ones
        return st.floats(0, 1) | st.integers(2, 64).map(float)
    if option.name == "pairs":  # 0 goes with a budget alone
        return st.integers(1)
    if option.kind is int:
        return st.integers(*ends(option))
    return st.floats(*ends(option), allow_nan=False, allow_infinity=False)


def outside(option: Option) -> st.SearchStrategy[Any]:
    if option.choices:
        # argparse drops a value of "--", even behind the = of a flag
        return st.text().filter(lambda text: text not in (*option.choices, "--"))
    if option.multiple_of:
        return st.integers().filter(lambda n: n <= 0 or n % option.multiple_of)
    (low, high), wrong, numbers = ends(option), [], st.integers
    if option.kind is float:
        wrong, numbers = [st.sampled_from([math.nan, math.inf, -math.inf])], st.floats
    if low is not None:
        wrong.append(numbers(max_value=beyond(option, low, -math.inf)))
    if high is not None:
        wrong.append(numbers(min_value=beyond(option, high, math.inf)))
    return st.one_of(wrong)


def freed(option: Option, found: dict[str, Any]) -> dict[str, Any]:
    """Return the options that an option may change besides: a budget alone decides the pairs."""
    return {"pairs": found["pairs"]} if option.name == "budget" else {}


@each_of(BOUNDED)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_bounds_hold_at_every_door(
    top: type, option: Option, by_file: Any, data: st.DataObject
) -> None:
    """Values inside are taken, values outside are refused in one line that says what is allowed."""
    value = data.draw(inside(option))
    for make in (by_name, by_file, by_flag, by_constructor):
        assert values(make(top, option.name, value))[option.name] == value
    value = data.draw(outside(option))
    finite = not isinstance(value, float) or math.isfinite(value)
    allowed = [] if finite else ["a finite number"]
    allowed += [option.allowed] if option.allowed else []
    line = f"{option.name} is {value!r}; it must be {', '.join(allowed)}"
    for make in (by_name, by_file, by_flag, by_constructor):
        assert refusal(make, top, option.name, value) == line


MULTIPLE = "a positive multiple of 16 (so that results do not depend on it)"


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("pairs", 0, "positive"),
        ("pairs", -1, "0 or positive"),
        ("budget", "much", "a size such as 500kB, 2MB or 1.5MiB"),
        ("budget", "0MB", "at least a byte"),
        ("pairs", "ten", "a whole number"),
        ("pairs", 2.5, "a whole number"),
        ("seed", -1, "from 0 to 2147483647"),
        ("read.captions", "shiny", "basic, paper or none"),
        ("embed.precision", "int8", "auto, fp32, fp16 or bf16"),
        ("embed.batch_size", 17, MULTIPLE),
        ("select.forgotten", "some", "fewest or most"),
        ("select.epochs", 1, "at least 2"),
        ("prune.ratio", 1.5, "at least 0 and below 1"),
        ("prune.ratio", math.nan, "a finite number, at least 0 and below 1"),
        ("cluster.normalize", "maybe", "true or false"),
        ("cluster.memory_gib", math.inf, "a finite number, positive"),
        ("decode.guidance", math.inf, "a finite number"),
        ("decode.image_size", -1, "0 or positive"),
        ("ray.embed_gpus", 1.5, "a share of one GPU or a whole number"),
        ("ray.embed_resources", "H100", "NAME=AMOUNT, more of them by comma"),
        ("ray.decode_resources", "GPU=1", "custom resources, each with a positive amount"),
        ("prune", 5, "a section with fields of its own"),
        ("protocol.select", "best", "val, test or last"),
        ("protocol.batch_size", 1, "at least 2 (a pair needs another to differ from)"),
        ("backbones", " , ", "at least one name"),
    ],
)
def test_the_line_says_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    top = EvaluateConfig if name in EVALUATION.keys() - RUN.keys() else RunConfig
    assert refusal(by_name, top, name, value) == f"{name} is {value!r}; it must be {allowed}"


@pytest.mark.parametrize("stage", ["embed", "decode"])
def test_a_pool_does_not_shrink_below_its_size(stage: str) -> None:
    line = refusal(replace, RunConfig(), {f"ray.{stage}_workers": 2, f"ray.{stage}_min_workers": 3})
    assert line == f"ray.{stage}_min_workers is 3; it must be from 1 to {stage}_workers"


def test_the_options_that_may_differ_when_a_run_is_continued() -> None:
    run = ("out", "embed.batch_size", "embed.store", "decode.batch_size")
    assert (*run, "experts.store", "experts.cpus", "experts.gpus") == FREE_FIELDS


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_build_and_survive_yaml(name: str) -> None:
    config = recipe(name)
    text = yaml.safe_dump(to_dict(config))
    assert replace(RunConfig(), flatten(yaml.safe_load(text))) == config
    assert replace(config, {}) == config


def test_recipes_do_what_their_names_promise() -> None:
    demo, paper, web = (recipe(name) for name in ("demo", "paper", "web_scale"))
    assert (demo.source, demo.embed.encoder) == ("scenes:10000", "demo")
    assert (paper.seed, paper.prune.ratio, paper.read.captions) == (42, 0.2, "paper")
    assert (paper.decode.steps, paper.decode.guidance, paper.decode.noise_level) == (100, 5.0, 10)
    assert paper.decode.negative_prompt == "text, watermark"
    assert web.match.solver == "sparse"


def test_an_unknown_recipe_lists_the_known() -> None:
    assert all(name in refusal(recipe, "papre") for name in RECIPES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("prun", ["unknown option prun;", "pairs", "prune"]),
        ("prune.ration", ["unknown option prune.ration; known: prune.ratio"]),
        ("prnue.ratio", ["prnue", *sections()]),
        ("a.b.c", ["a.b"]),
        ("", ["known: source"]),
        ("prune.", ["known: prune.ratio"]),
    ],
)
def test_an_unknown_name_lists_the_known(name: str, words: list[str]) -> None:
    line = refusal(by_name, RunConfig, name, 1)
    assert all(word in line for word in words), line


@pytest.mark.parametrize("section", sorted(sections()))
@pytest.mark.parametrize("value", [5, None, "x", {"no such": 1}])
def test_a_section_is_no_value(section: str, value: Any) -> None:
    """As from `prune: 5` in a YAML file."""
    assert section in refusal(by_name, RunConfig, section, value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, False) for text in ("False", "false", "no", "0", 0, "off", False)),
        *((text, True) for text in ("True", "TRUE", "yes", "1", 1, "on", True)),
    ],
)
def test_booleans_are_read_as_written(text: Any, value: bool) -> None:
    """A plain bool("False") would be True."""
    for start in (True, False):
        config = replace(RunConfig(), {"cluster.normalize": start})
        assert replace(config, {"cluster.normalize": text}).cluster.normalize is value


@pytest.mark.parametrize("nothing", [None, "", "none", "null"])
@pytest.mark.parametrize(
    "option", [option for _, option in EVERY if option.optional], ids=lambda option: option.name
)
def test_optional_options_can_be_unset(option: Option, nothing: str | None) -> None:
    top = RunConfig if option.name in RUN else EvaluateConfig
    config = replace(top(), {option.name: EDGES[top][option.name][0][0]})
    assert values(replace(config, {option.name: nothing}))[option.name] is None


@given(
    st.sampled_from(list(known(RunConfig).values())),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
)
def test_any_value_is_taken_or_refused(option: Option, value: Any) -> None:
    """Nothing but ConfigError is raised, and what is taken has the option's own type."""
    try:
        config = replace(RunConfig(), {option.name: value})
    except ConfigError:
        refusal(replace, RunConfig(), {option.name: value})
        return
    found = values(config)[option.name]
    assert type(found) is option.kind or (found is None and option.optional)
    assert replace(RunConfig(), values(config)) == config


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pairs = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.prune.ratio = 0.1


def test_a_yaml_file_may_nest_or_dot_its_options() -> None:
    text = (
        "pairs: 5\nprune: {ratio: 0.1}\ndecode:\n  steps: 3\n  rescale: yes\nembed.encoder: demo\n"
    )
    config = replace(RunConfig(), flatten(yaml.safe_load(text)))
    assert (config.pairs, config.prune.ratio, config.embed.encoder) == (5, 0.1, "demo")
    assert (config.decode.steps, config.decode.rescale) == (3, True)


def test_every_option_is_documented() -> None:
    for top in EDGES:
        assert all(group.__doc__ for group in (top, *sections(top).values()))
    assert all(option.doc for _, option in EVERY)


@pytest.mark.parametrize("name", ["source", "out", "embed.store", "embed.encoder"])
def test_a_name_that_is_not_utf_8_is_refused(name: str) -> None:
    """Python hands out the bytes of such a file name as half characters, which no file can hold."""
    with pytest.raises(ConfigError, match="a name must be UTF-8: rename the file"):
        replace(RunConfig(), {name: os.fsdecode(b"/data/\xff")})
    assert replace(RunConfig(), {"out": "/tmp/Jürgen 図"}).out == "/tmp/Jürgen 図"
