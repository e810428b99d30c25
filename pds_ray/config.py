"""What a run can be told: one small frozen dataclass per stage, composed into `RunConfig`.

YAML files and the command line are views of these classes: a field added here is reachable from both. Only checks
that need no data, no network and no model are made here; each names the field, the value given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from pds_ray import catalog
from pds_ray.errors import ConfigError as ConfigError
from pds_ray.errors import without_secrets
from pds_ray.modalities.text import CLEANERS

PRECISIONS = ("fp32", "fp16", "bf16")


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


def option(default: Any, doc: str, *aliases: str) -> Any:
    """A dataclass field with its help line and, where users know it by another name, that name's flag."""
    return field(default=default, metadata={"doc": doc, "aliases": aliases})


@dataclass(frozen=True, kw_only=True)
class ReadConfig:
    """How samples are read and cleaned."""

    captions: str = option("basic", "caption cleaning: basic, paper (lower case, 30 words) or none")
    max_pixels: int = option(64_000_000, "pictures that declare more pixels are refused undecoded")
    min_side: int = option(2, "pictures with a shorter side are refused, pixels")

    def __post_init__(self) -> None:
        _require(
            self.captions in CLEANERS,
            "read.captions",
            self.captions,
            "one of " + ", ".join(CLEANERS),
        )
        _require(self.max_pixels > 0, "read.max_pixels", self.max_pixels, "positive")
        _require(self.min_side > 0, "read.min_side", self.min_side, "positive")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig:
    """CLIP embedding of every image and every caption."""

    encoder: str = option(
        "ViT-L-14:openai",
        "open_clip MODEL:TAG, MODEL:/path/to/checkpoint, local-dir:/path, hf-hub:org/repo, or 'demo'",
        "encoder",
    )
    precision: str = option("auto", "fp32, fp16, bf16 or auto (bf16 on a GPU, fp32 on a CPU)")
    batch_size: int = option(256, "images or captions a forward pass; a multiple of 16")
    store: str | None = option(
        None, "embedding store that several runs share; default OUT/embeddings"
    )
    store_dtype: str = option("float16", "dtype of the embeddings on disk: float16 or float32")

    def __post_init__(self) -> None:
        _require(
            self.precision in ("auto", *PRECISIONS),
            "embed.precision",
            self.precision,
            "auto, fp32, fp16 or bf16",
        )
        _require(
            self.batch_size > 0 and self.batch_size % 16 == 0,
            "embed.batch_size",
            self.batch_size,
            "a positive multiple of 16 (so that results do not depend on it)",
        )
        _require(
            self.store_dtype in ("float16", "float32"),
            "embed.store_dtype",
            self.store_dtype,
            "float16 or float32",
        )


METHODS = tuple(catalog.METHODS)


@dataclass(frozen=True, kw_only=True)
class SelectConfig:
    """Choice of real pairs, for the methods other than pds."""

    forgotten: str = option(
        "fewest", "method forgetting takes the pairs forgotten fewest or most times"
    )
    epochs: int = option(10, "method forgetting: epochs of training on all pairs")

    def __post_init__(self) -> None:
        _require(
            self.forgotten in ("fewest", "most"),
            "select.forgotten",
            self.forgotten,
            "fewest or most",
        )
        _require(self.epochs > 1, "select.epochs", self.epochs, "at least 2")


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """The pairs of lowest image-caption cosine are dropped before clustering."""

    ratio: float = option(0.2, "share of pairs dropped", "rm-ratio", "rm_ratio")

    def __post_init__(self) -> None:
        _require(0 <= self.ratio < 1, "prune.ratio", self.ratio, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """FAISS k-means, once per modality, with as many clusters as pairs requested."""

    iterations: int = option(25, "Lloyd iterations at most")
    tolerance: float = option(
        1e-4,
        "a fit of equal weights ends when an iteration changes its objective by a smaller share",
    )
    restarts: int = option(1, "independent fits of which the best is kept")
    normalize: bool = option(
        False,
        "cluster L2-normalised vectors; centroids are means of raw ones",
        "normalize-embedding",
        "normalize_embedding",
    )
    memory_gib: float = option(
        8.0,
        "budget for the training vectors; more rows than fit are sampled, and Ray holds half as much in passing",
    )
    modality: str = option(
        "separate",
        "separate (each by itself, then matched), joint (one k-means on both), image or text (one decides)",
    )

    def __post_init__(self) -> None:
        allowed = ("separate", "joint", "image", "text")
        _require(
            self.modality in allowed,
            "cluster.modality",
            self.modality,
            "separate, joint, image or text",
        )
        _require(self.iterations > 0, "cluster.iterations", self.iterations, "positive")
        _require(
            0 <= self.tolerance < 1, "cluster.tolerance", self.tolerance, "at least 0 and below 1"
        )
        _require(self.restarts > 0, "cluster.restarts", self.restarts, "positive")
        _require(self.memory_gib > 0, "cluster.memory_gib", self.memory_gib, "positive")

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces with a k-means of their own; a pair's image cluster is of the first."""
        return ("image", "text") if self.modality == "separate" else (self.modality,)


@dataclass(frozen=True, kw_only=True)
class MatchConfig:
    """One-to-one assignment of image clusters to text clusters by the pairs they share."""

    solver: str = option("auto", "dense (Hungarian), sparse, or auto (dense up to 5,000 clusters)")
    pairless: str = option(
        "auto", "couples that share no pair: keep, drop, or auto (keep below 300 pairs)"
    )
    filter: bool = option(
        True, "average the shared pairs of a couple only; false averages its two whole clusters"
    )

    def __post_init__(self) -> None:
        _require(
            self.solver in ("auto", "dense", "sparse"),
            "match.solver",
            self.solver,
            "auto, dense or sparse",
        )
        _require(
            self.pairless in ("auto", "keep", "drop"),
            "match.pairless",
            self.pairless,
            "auto, keep or drop",
        )


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """From prototypes to pictures."""

    decoder: str = option(
        "unclip",
        "unclip (diffusers) or nearest (the real image nearest to the prototype)",
        "decoder",
    )
    model: str = option(
        "auto",
        "diffusers unCLIP repository id or folder; auto takes the one that fits the encoder",
        "decoder-model",
    )
    revision: str | None = option(None, "revision of the repository")
    condition: str = option(
        "prototype", "what the decoder sees: prototype (and caption), or caption (text alone)"
    )
    steps: int = option(100, "denoising steps", "steps")
    guidance: float = option(
        5.0, "classifier-free guidance scale; 1 or less switches it off", "guidance"
    )
    noise_level: int = option(10, "noise added to the prototype, 0 to 999", "noise")
    negative_prompt: str = option("text, watermark", "what the picture should not show")
    rescale: bool = option(
        False, "scale prototypes to the mean norm of their members before decoding"
    )
    precision: str = option("auto", "fp32, fp16, bf16 or auto (fp16 on a GPU, fp32 on a CPU)")
    batch_size: int = option(16, "prototypes decoded together")
    image_size: int = option(
        224,
        "side of the saved pictures in pixels; 0 keeps the decoder's",
        "image-size",
        "image_size",
    )

    def __post_init__(self) -> None:
        _require(
            self.condition in ("prototype", "caption"),
            "decode.condition",
            self.condition,
            "prototype or caption",
        )
        _require(self.steps > 0, "decode.steps", self.steps, "positive")
        _require(math.isfinite(self.guidance), "decode.guidance", self.guidance, "a finite number")
        _require(0 <= self.noise_level <= 999, "decode.noise_level", self.noise_level, "0 to 999")
        _require(self.batch_size > 0, "decode.batch_size", self.batch_size, "positive")
        _require(self.image_size >= 0, "decode.image_size", self.image_size, "0 or positive")
        _require(
            self.precision in ("auto", *PRECISIONS),
            "decode.precision",
            self.precision,
            "auto, fp32, fp16 or bf16",
        )


@dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """The caption that goes with each picture."""

    nearest_to: str = option(
        "picture",
        "a pair's caption is the real one nearest to its picture, or, as published, to its text prototype",
    )

    def __post_init__(self) -> None:
        allowed = ("picture", "prototype")
        _require(
            self.nearest_to in allowed,
            "caption.nearest_to",
            self.nearest_to,
            "picture or prototype",
        )


@dataclass(frozen=True)
class Actors:
    """What is wished of a pool of actors."""

    workers: int
    """At most; 0: as many as the cluster has room for."""
    min_workers: int
    gpus: float | None
    """Each takes so many; None: what the cluster has decides."""
    resources: dict[str, float]
    """Custom resources that each takes."""


@dataclass(frozen=True, kw_only=True)
class RayConfig:
    """Where it runs, and what is given up. What comes out depends on it only by what is refused: pictures that take
    more time (`sample_timeout_s`) or memory than they may."""

    address: str | None = option(
        None, "address of a running cluster; without it a local Ray is started", "address"
    )
    num_cpus: int | None = option(None, "CPUs of the local Ray; default all")
    object_store_gib: float | None = option(
        None, "object store of the local Ray; default a quarter of free memory, at most 8 GiB"
    )
    read_resources: str = option(
        "", "custom resources of each task that reads or decodes pictures, NAME=AMOUNT,..."
    )
    embed_workers: int = option(
        0, "embedding actors at most; 0 is one a GPU, or what the CPUs allow"
    )
    embed_min_workers: int = option(1, "embedding actors at least, as the cluster shrinks")
    embed_gpus: float | None = option(
        None,
        "GPUs of each embedding actor, such as 0.5; default 1 where there are any; say it if they are yet to come",
    )
    embed_resources: str = option("", "custom resources of each embedding actor, NAME=AMOUNT,...")
    decode_workers: int = option(
        0, "decoding actors at most; 0 is one a GPU, or what the CPUs allow"
    )
    decode_min_workers: int = option(1, "decoding actors at least, as the cluster shrinks")
    decode_gpus: float | None = option(None, "GPUs of each decoding actor")
    decode_resources: str = option("", "custom resources of each decoding actor, NAME=AMOUNT,...")
    max_bad_share: float = option(
        0.5, "the run stops when more than this share of the samples is bad"
    )
    max_failed_share: float = option(
        0.1, "the run stops when more than this share of the shards cannot be read"
    )
    sample_timeout_s: float = option(
        60.0, "a picture that takes longer to decode is given up, seconds"
    )

    def __post_init__(self) -> None:
        _require(
            self.num_cpus is None or self.num_cpus > 0, "ray.num_cpus", self.num_cpus, "positive"
        )
        store = self.object_store_gib
        _require(store is None or 0 < store < math.inf, "ray.object_store_gib", store, "positive")
        _amounts("ray.read_resources", self.read_resources)
        for stage, actors in (("embed", self.embed_actors), ("decode", self.decode_actors)):
            _require(actors.workers >= 0, f"ray.{stage}_workers", actors.workers, "0 or positive")
            least, most = actors.min_workers, actors.workers or math.inf
            _require(
                1 <= least <= most, f"ray.{stage}_min_workers", least, f"from 1 to {stage}_workers"
            )
            gpus = actors.gpus
            _require(
                gpus is None or 0 <= gpus <= 1 or (1 < gpus < math.inf and gpus == int(gpus)),
                f"ray.{stage}_gpus",
                gpus,
                "a share of one GPU or a whole number",
            )
        _require(
            0 <= self.max_bad_share <= 1, "ray.max_bad_share", self.max_bad_share, "from 0 to 1"
        )
        _require(
            0 <= self.max_failed_share <= 1,
            "ray.max_failed_share",
            self.max_failed_share,
            "from 0 to 1",
        )
        timeout = self.sample_timeout_s
        _require(0 < timeout < math.inf, "ray.sample_timeout_s", timeout, "positive")

    @property
    def embed_actors(self) -> Actors:
        resources = _amounts("ray.embed_resources", self.embed_resources)
        return Actors(self.embed_workers, self.embed_min_workers, self.embed_gpus, resources)

    @property
    def decode_actors(self) -> Actors:
        resources = _amounts("ray.decode_resources", self.decode_resources)
        return Actors(self.decode_workers, self.decode_min_workers, self.decode_gpus, resources)

    @property
    def reader_resources(self) -> dict[str, float]:
        """Custom resources of each task that reads or decodes."""
        return _amounts("ray.read_resources", self.read_resources)


def _amounts(name: str, text: str) -> dict[str, float]:
    """ "H100=1,nvme=0.1" -> {"H100": 1.0, "nvme": 0.1}. Raises ConfigError."""
    amounts: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        resource, _, amount = part.partition("=")
        try:
            amounts[resource.strip()] = float(amount)
        except ValueError:
            raise ConfigError(
                f"{name} is {text!r}; it must be NAME=AMOUNT, more of them by comma"
            ) from None
    good = all(
        key and key not in ("CPU", "GPU", "memory") and 0 < value < math.inf
        for key, value in amounts.items()
    )
    _require(good, name, text, "custom resources, each with a positive amount")
    return amounts


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole distillation: source and result, and a section per stage."""

    source: str = option(
        "",
        "tar path, glob or brace range (local, s3://, gs://), flickr30k:ROOT, coco:ROOT, or scenes:N[:SEED[:NOISE]]",
        "source",
    )
    out: str = option("", "run folder", "out")
    method: str = option("pds", "pds, or real pairs chosen by " + ", ".join(METHODS[1:]), "method")
    pairs: int = option(100, "distilled pairs", "pairs", "num-pairs", "num_pairs")
    seed: int = option(0, "seed of everything drawn at random", "seed")
    read: ReadConfig = field(default_factory=ReadConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _require(self.method in METHODS, "method", self.method, "one of " + ", ".join(METHODS))
        _require(self.pairs > 0, "pairs", self.pairs, "positive")
        _require(0 <= self.seed < 2**31, "seed", self.seed, "from 0 to 2147483647")


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """How models are trained on a set and judged. Named protocols are in recipes.py."""

    train: str = option(
        "all", "what is trained: text_head, heads (image and text), backbone (and text head) or all"
    )
    text: str = option(
        "captions", "text input: captions (encoded anew), or the text prototypes of the set"
    )
    text_encoder: str = option(
        "auto", "auto (the CLIP of the set), an open_clip model, bert:MODEL or distilbert:MODEL"
    )
    captions: str = option(
        "basic", "cleaning of the captions that are encoded: basic, paper or none"
    )
    image_size: int = option(
        0, "side of the pictures in pixels; 0 is what the backbone was made for"
    )
    normalization: str = option("backbone", "constants of the pixels: backbone (its own) or clip")
    augment: bool = option(
        True,
        "random shifts and scales while the backbone is trained; nothing that belies a caption",
    )
    optimizer: str = option("adamw", "adamw or sgd")
    learning_rate: float = option(1e-3, "learning rate at the start")
    momentum: float = option(0.9, "momentum of sgd")
    weight_decay: float = option(0.05, "weight decay")
    schedule: str = option(
        "cosine", "cosine (to zero), or step (a tenth from half of the epochs on)"
    )
    epochs: int = option(100, "epochs")
    batch_size: int = option(128, "pairs a step, over all workers of a trial")
    sampling: str = option(
        "epoch", "epoch (every pair once), or independent (a fresh draw for every batch)"
    )
    evaluate_every: int = option(20, "epochs between evaluations")
    select: str = option(
        "val", "the epoch reported is the best on val, the best on test, or the last"
    )

    def __post_init__(self) -> None:
        for name, allowed in (
            ("train", ("text_head", "heads", "backbone", "all")),
            ("text", ("captions", "prototypes")),
            ("captions", tuple(CLEANERS)),
            ("normalization", ("backbone", "clip")),
            ("optimizer", ("adamw", "sgd")),
            ("schedule", ("cosine", "step")),
            ("sampling", ("epoch", "independent")),
            ("select", ("val", "test", "last")),
        ):
            _require(
                getattr(self, name) in allowed,
                name,
                getattr(self, name),
                "one of " + ", ".join(allowed),
            )
        for name in ("learning_rate", "epochs", "evaluate_every"):
            value = getattr(self, name)
            _require(0 < value < math.inf, name, value, "positive")
        for name in ("image_size", "momentum", "weight_decay"):
            value = getattr(self, name)
            _require(0 <= value < math.inf, name, value, "0 or positive")
        _require(
            self.batch_size > 1,
            "batch_size",
            self.batch_size,
            "at least 2 (a pair needs another to differ from)",
        )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """An evaluation: which models are trained how often, on what they are tested, and where that runs."""

    test: str = option(
        "", "source of the held-out pictures and captions, as --source of distill", "test"
    )
    val: str | None = option(
        None, "source that selects the epoch; default the one that belongs to --test", "val"
    )
    backbones: str = option(
        "small_conv,small_vit,small_mixer", "evaluation models, by comma", "backbones"
    )
    seeds: int = option(5, "models trained a backbone, with seeds 0, 1, ...", "seeds")
    workers: int = option(1, "workers that share one trial, with gathered negatives", "workers")
    trials: int = option(0, "trials at once; 0 is what the GPUs, or the CPUs, allow", "trials")
    max_failures: int = option(
        3,
        "deaths of workers that each row of trials survives without getting further",
        "max-failures",
    )
    save_every_s: float = option(
        30.0, "seconds of training that the death of a worker costs at most, or one evaluation"
    )
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        _require(bool(self.backbone_names), "backbones", self.backbones, "at least one name")
        _require(self.seeds > 0, "seeds", self.seeds, "positive")
        _require(self.workers > 0, "workers", self.workers, "positive")
        _require(self.trials >= 0, "trials", self.trials, "0 or positive")
        _require(self.max_failures >= 0, "max_failures", self.max_failures, "0 or positive")
        _require(self.save_every_s >= 0, "save_every_s", self.save_every_s, "0 or positive")

    @property
    def backbone_names(self) -> list[str]:
        """The backbones one by one."""
        return list(
            dict.fromkeys(name.strip() for name in self.backbones.split(",") if name.strip())
        )


FREE_FIELDS = (
    "out",
    "embed.batch_size",
    "embed.store",
    "decode.batch_size",  # unless some images of a model are there already
)
"""Options that may differ when a run is continued; so may all of ray.*."""

Config = TypeVar("Config", RunConfig, EvaluateConfig)


def to_dict(config: RunConfig | EvaluateConfig) -> dict[str, Any]:
    """The configuration as plain JSON values, sections nested."""
    return dataclasses.asdict(config)


def public(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as it may be shown and published; run.json holds it so."""
    values = to_dict(config)
    for name in ("source", "out"):
        values[name] = without_secrets(values[name])
    if config.embed.store:
        values["embed"]["store"] = without_secrets(config.embed.store)
    return values


def sections(cls: type = RunConfig) -> dict[str, type]:
    """Name -> dataclass of the nested sections, in order."""
    hints = get_type_hints(cls)
    return {
        f.name: hints[f.name]
        for f in dataclasses.fields(cls)
        if dataclasses.is_dataclass(hints[f.name])
    }


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """A copy with dotted fields changed: {"pairs": 200, "prune.ratio": "0.1"}; text is converted to the field's type.

    Raises ConfigError for an unknown field (naming the known ones) or a value of the wrong type.
    """
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        section, _, name = dotted.rpartition(".")
        (nested.setdefault(section, {}) if section else top)[name] = value
    known = sections(type(config))
    for section, values in nested.items():
        if section not in known:
            raise ConfigError(f"unknown section {section!r}; known: {', '.join(known)}")
        top[section] = _replace(getattr(config, section), values, f"{section}.")
    return _replace(config, top, "")


def _replace(config: Any, values: Mapping[str, Any], prefix: str) -> Any:
    hints = get_type_hints(type(config))
    unknown = [name for name in values if name not in hints]
    if unknown:
        raise ConfigError(
            f"unknown option {prefix}{unknown[0]}; known: {', '.join(prefix + name for name in hints)}"
        )
    return dataclasses.replace(
        config,
        **{name: _convert(value, hints[name], prefix + name) for name, value in values.items()},
    )


def _convert(value: Any, hint: Any, name: str) -> Any:
    """`value` as type `hint` (bool, int, float, str, a section, or one of these or None)."""
    if dataclasses.is_dataclass(hint):
        if type(value) is hint:
            return value
        raise ConfigError(f"{name} is {value!r}; it must be a section with fields of its own")
    kinds = (
        [kind for kind in get_args(hint) if kind is not type(None)] if get_origin(hint) else [hint]
    )
    optional = get_origin(hint) is not None
    if value is None or (optional and value in ("", "none", "null")):
        if optional:
            return None
        raise ConfigError(f"{name} has no value")
    kind = kinds[0]
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in ("true", "yes", "on", "1"):
            return True
        if str(value).lower() in ("false", "no", "off", "0"):
            return False
        raise ConfigError(f"{name} is {value!r}; it must be true or false")
    if isinstance(value, bool | dict | list):
        raise ConfigError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    try:
        number = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; it must be of type {kind.__name__}") from None
    if kind is int and isinstance(value, float) and value != number:
        raise ConfigError(f"{name} is {value!r}; it must be a whole number")
    return number


def flatten(mapping: Mapping[str, Any], cls: type = RunConfig) -> dict[str, Any]:
    """{"prune": {"ratio": 0.1}, "pairs": 5} -> {"prune.ratio": 0.1, "pairs": 5}: a YAML file's view of the fields."""
    flat: dict[str, Any] = {}
    known = sections(cls)
    for key, value in mapping.items():
        if key in known and isinstance(value, Mapping):
            flat.update({f"{key}.{name}": item for name, item in value.items()})
        else:
            flat[str(key)] = value
    return flat
