"""Every field can be reached by its dotted name, and every wrong value is one line."""

from __future__ import annotations

import dataclasses

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pds_ray.config import ConfigError, RunConfig, flatten, replace, sections, to_dict
from pds_ray.recipes import RECIPES, recipe

FIELDS = sorted(flatten(to_dict(RunConfig())))

# one value that differs from the default and is allowed, for every field; a new field must be added here
OTHER = {
    "source": "scenes:10",
    "out": "runs/x",
    "pairs": 7,
    "seed": 3,
    "read.captions": "paper",
    "read.max_pixels": 1000,
    "read.min_side": 5,
    "embed.encoder": "demo",
    "embed.precision": "fp32",
    "embed.batch_size": 32,
    "embed.store": "shared",
    "embed.store_dtype": "float32",
    "method": "herding",
    "select.forgotten": "most",
    "select.epochs": 3,
    "prune.ratio": 0.5,
    "cluster.modality": "joint",
    "match.filter": False,
    "decode.condition": "caption",
    "caption.nearest_to": "prototype",
    "cluster.iterations": 3,
    "cluster.tolerance": 0.01,
    "cluster.restarts": 2,
    "cluster.normalize": True,
    "cluster.memory_gib": 1.5,
    "match.solver": "sparse",
    "match.pairless": "drop",
    "decode.decoder": "nearest",
    "decode.model": "demo",
    "decode.revision": "abc",
    "decode.steps": 5,
    "decode.guidance": 1.5,
    "decode.noise_level": 0,
    "decode.negative_prompt": "",
    "decode.rescale": True,
    "decode.precision": "bf16",
    "decode.batch_size": 3,
    "decode.image_size": 0,
    "ray.address": "auto",
    "ray.num_cpus": 2,
    "ray.object_store_gib": 1.0,
    "ray.read_resources": "reader=1",
    "ray.embed_workers": 2,
    "ray.embed_min_workers": 2,
    "ray.embed_gpus": 0.5,
    "ray.embed_resources": "H100=1",
    "ray.decode_workers": 2,
    "ray.decode_min_workers": 2,
    "ray.decode_gpus": 2.0,
    "ray.decode_resources": "A100=0.5,nvme=1",
    "ray.max_bad_share": 0.1,
    "ray.max_failed_share": 0.2,
    "ray.sample_timeout_s": 5.0,
}


def value_of(config, dotted):
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def refusal(changes) -> str:
    with pytest.raises(ConfigError) as caught:
        replace(RunConfig(), changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_field_is_tried_here():
    assert sorted(set(FIELDS) & set(OTHER)) == FIELDS


@pytest.mark.parametrize("dotted", FIELDS)
def test_every_field_is_reached_by_its_dotted_name(dotted):
    """As a value, as the text of a command line, and through YAML; no other field changes."""
    before = flatten(to_dict(RunConfig()))
    value = OTHER[dotted]
    assert value != before[dotted]
    for given_value in (value, str(value), yaml.safe_load(yaml.safe_dump(value))):
        changed = replace(RunConfig(), {dotted: given_value})
        assert value_of(changed, dotted) == value
        assert type(value_of(changed, dotted)) is type(value)
        assert flatten(to_dict(changed)) == {**before, dotted: value}


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_build_and_survive_yaml(name):
    config = recipe(name)
    text = yaml.safe_dump(to_dict(config))
    assert replace(RunConfig(), flatten(yaml.safe_load(text))) == config
    assert replace(config, {}) == config


def test_recipes_say_what_their_names_promise():
    demo, paper, web = (recipe(name) for name in ("demo", "paper", "web_scale"))
    assert (demo.source, demo.embed.encoder) == ("scenes:10000", "demo")
    assert (paper.seed, paper.prune.ratio, paper.read.captions) == (42, 0.2, "paper")
    assert (paper.decode.steps, paper.decode.guidance, paper.decode.noise_level) == (100, 5.0, 10)
    assert paper.decode.negative_prompt == "text, watermark"
    assert web.match.solver == "sparse"


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(ConfigError) as caught:
        recipe("papre")
    assert all(name in str(caught.value) for name in RECIPES)


def test_an_unknown_name_lists_the_known():
    message = refusal({"prun": 1})
    assert "prun" in message
    assert "pairs" in message
    message = refusal({"prune.ration": 0.1})
    assert "prune.ration" in message
    assert "prune.ratio" in message
    message = refusal({"prnue.ratio": 0.1})
    assert "prnue" in message
    assert all(section in message for section in sections())
    assert "a.b" in refusal({"a.b.c": 1})
    refusal({"": 1})
    refusal({"prune.": 1})


@pytest.mark.parametrize(
    ("dotted", "value"),
    [
        ("pairs", 0),
        ("pairs", -5),
        ("pairs", "many"),
        ("pairs", 2.5),
        ("pairs", "2.5"),
        ("pairs", None),
        ("pairs", True),
        ("pairs", [1]),
        ("pairs", {"a": 1}),
        ("pairs", float("inf")),
        ("pairs", float("nan")),
        ("seed", -1),
        ("seed", 2**31),
        ("source", None),
        ("source", ["a", "b"]),
        ("read.captions", "shiny"),
        ("read.max_pixels", 0),
        ("read.min_side", 0),
        ("embed.batch_size", 17),
        ("embed.batch_size", 0),
        ("embed.precision", "int8"),
        ("embed.store_dtype", "float64"),
        ("prune.ratio", 1),
        ("prune.ratio", -0.1),
        ("prune.ratio", "nan"),
        ("prune.ratio", "a fifth"),
        ("cluster.iterations", 0),
        ("cluster.tolerance", -1e-9),
        ("cluster.tolerance", 1),
        ("cluster.tolerance", "nan"),
        ("cluster.restarts", 0),
        ("cluster.normalize", "maybe"),
        ("cluster.normalize", 2),
        ("cluster.normalize", None),
        ("cluster.memory_gib", 0),
        ("cluster.memory_gib", "nan"),
        ("match.solver", "greedy"),
        ("match.pairless", ""),
        ("decode.steps", 0),
        ("decode.noise_level", 1000),
        ("decode.noise_level", -1),
        ("decode.batch_size", 0),
        ("decode.image_size", -1),
        ("decode.precision", "fp8"),
        ("decode.guidance", "nan"),
        ("ray.num_cpus", 0),
        ("ray.object_store_gib", -1),
        ("ray.embed_workers", -1),
        ("ray.embed_min_workers", 0),
        ("ray.embed_gpus", -0.5),
        ("ray.embed_gpus", 1.5),
        ("ray.embed_gpus", float("inf")),
        ("ray.embed_resources", "H100"),
        ("ray.embed_resources", "H100=many"),
        ("ray.embed_resources", "=1"),
        ("ray.embed_resources", "H100=0"),
        ("ray.embed_resources", "H100=nan"),
        ("ray.decode_resources", "GPU=1"),
        ("ray.read_resources", "reader=-1"),
        ("ray.decode_workers", -1),
        ("ray.max_bad_share", 1.1),
        ("ray.max_failed_share", 1.1),
        ("ray.sample_timeout_s", 0),
    ],
)
def test_wrong_values_are_refused_by_name(dotted, value):
    assert dotted in refusal({dotted: value})


@pytest.mark.parametrize("section", sorted(sections()))
@pytest.mark.parametrize("value", [5, None, "x", {"no such": 1}])
def test_a_section_is_no_value(section, value):
    """What `prune: 5` in a YAML file gives."""
    assert section in refusal({section: value})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((text, False) for text in ("False", "false", "no", "0", 0, "off", False)),
        *((text, True) for text in ("True", "TRUE", "yes", "1", 1, "on", True)),
    ],
)
def test_booleans_are_read_as_written(text, value):
    """A plain bool("False") would be True."""
    for start in (True, False):
        config = replace(RunConfig(), {"cluster.normalize": start})
        assert replace(config, {"cluster.normalize": text}).cluster.normalize is value


@pytest.mark.parametrize("nothing", [None, "", "none", "null"])
@pytest.mark.parametrize(
    "dotted", ["embed.store", "decode.revision", "ray.address", "ray.num_cpus"]
)
def test_optional_fields_can_be_unset(dotted, nothing):
    config = replace(RunConfig(), {dotted: OTHER[dotted]})
    assert value_of(replace(config, {dotted: nothing}), dotted) is None


@given(
    st.sampled_from(FIELDS),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()),
)
def test_any_value_is_taken_or_refused(dotted, value):
    """Nothing but ConfigError comes out, and what is taken is of the field's own type."""
    try:
        config = replace(RunConfig(), {dotted: value})
    except ConfigError:
        assert "\n" not in refusal({dotted: value})
        return
    found = value_of(config, dotted)
    assert found is None or type(found) is type(OTHER[dotted])
    assert replace(RunConfig(), flatten(to_dict(config))) == config


def test_a_configuration_cannot_be_changed_in_place():
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.pairs = 5
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.prune.ratio = 0.1


def test_flatten_is_the_view_of_a_yaml_file():
    text = (
        "pairs: 5\nprune: {ratio: 0.1}\ndecode:\n  steps: 3\n  rescale: yes\nembed.encoder: demo\n"
    )
    config = replace(RunConfig(), flatten(yaml.safe_load(text)))
    assert (config.pairs, config.prune.ratio, config.decode.steps, config.decode.rescale) == (
        5,
        0.1,
        3,
        True,
    )
    assert config.embed.encoder == "demo"


def test_every_field_says_what_it_is():
    for cls in (RunConfig, *sections().values()):
        assert cls.__doc__
        for field in dataclasses.fields(cls):
            if field.name not in sections():
                assert field.metadata["doc"], field.name
