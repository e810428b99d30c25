"""Every option of a run and of an evaluation: one frozen dataclass per section.

YAML files and the command line are views of these classes: an option added here is reachable from
both, is checked by its type and bounds wherever it comes from, and explains itself in `--help`.
Only checks that need no data, no network and no model are made here; each refusal is one line with
the option, the value given and what is allowed.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import cache
from types import NoneType
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from pds_ray import catalog
from pds_ray.errors import ConfigError, is_utf8, without_secrets
from pds_ray.modalities.text import CLEANERS

METHODS = tuple(catalog.METHODS)
_MOST_NOISE = 999
"""The highest noise level of an unCLIP."""
PRECISIONS = ("fp32", "fp16", "bf16")
PAIRS, QUALITY = 100, 90
"""Distilled pairs, and the quality of JPEG and WebP, of runs that say neither, nor a budget."""
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
"""Types of options, in words."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option: its type, its bounds, and the words and flags by which users know it."""

    doc: str
    aliases: tuple[str, ...] = ()
    """Other names of its flag."""
    free: bool = False
    """It may differ when a run is continued."""
    choices: tuple[str, ...] = ()
    """The values of text; those of a `Literal` type need not be repeated."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    multiple_of: int | None = None
    """The value is a positive multiple of it."""
    because: str = ""
    """Added to what is allowed, for bounds that do not explain themselves."""
    name: str = ""
    """With its section, such as prune.ratio; like the rest, taken from the field by `options`."""
    kind: type = str
    """bool, int, float or str."""
    optional: bool = False
    """None is allowed."""
    default: Any = None

    @property
    def allowed(self) -> str:
        """The values that are allowed, in words; "" if all of the type are."""
        return self._range() + (f" ({self.because})" if self.because else "")

    def _range(self) -> str:
        if self.choices:
            return f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
        if self.multiple_of:
            return f"a positive multiple of {self.multiple_of}"
        if self.at_least is not None and self.at_most is not None:
            return f"from {self.at_least} to {self.at_most}"
        if (self.at_least, self.below) == (0, None):
            return "0 or positive"
        if (self.above, self.below) == (0, None):
            return "positive"
        limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most}
        limits["below"] = self.below
        return " and ".join(f"{w} {limit}" for w, limit in limits.items() if limit is not None)

    def check(self, value: Any) -> None:
        """Raise ConfigError if `value`, which has the option's type, is not allowed."""
        if value is None and self.optional:
            return
        if isinstance(value, float) and not math.isfinite(value):
            allowed = ", ".join(filter(None, ("a finite number", self.allowed)))
            raise ConfigError(f"{self.name} is {value!r}; it must be {allowed}")
        if isinstance(value, str) and not is_utf8(value):
            raise ConfigError(f"{self.name} is {value!r}; a name must be UTF-8: rename the file")
        _require(self._holds(value), self.name, value, self.allowed)

    def _holds(self, value: Any) -> bool:
        return (
            (not self.choices or value in self.choices)
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
            and (self.multiple_of is None or (value > 0 and value % self.multiple_of == 0))
        )


def option(default: Any, doc: str, *aliases: str, **about: Any) -> Any:
    """Make a dataclass field with a help line, flags of other names, and the fields of `Option`."""
    return field(default=default, metadata={"option": Option(doc=doc, aliases=aliases, **about)})


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


class Options:
    """A group of options, each checked against its bounds when the group is made."""

    section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str = "") -> None:
        cls.section = section

    def __post_init__(self) -> None:
        known_here = options(type(self))  # type: ignore[arg-type]  # classes can be hashed
        for field_name, known in known_here.items():
            known.check(getattr(self, field_name))


@cache
def options(group: Any) -> dict[str, Option]:
    """Return the options of one group by field name, without those of its sections."""
    hints, found = get_type_hints(group), {}
    for each in dataclasses.fields(group):
        if "option" not in each.metadata:
            continue
        hint, known = hints[each.name], each.metadata["option"]
        literal = get_origin(hint) is Literal
        found[each.name] = dataclasses.replace(
            known,
            name=f"{group.section}.{each.name}".lstrip("."),
            kind=str if literal else (get_args(hint) or (hint,))[0],
            optional=NoneType in get_args(hint),
            choices=get_args(hint) if literal else known.choices,
            default=each.default,
        )
    return found


@dataclass(frozen=True, kw_only=True)
class FilesConfig(Options, section="read"):
    """Reading of images and captions from their files."""

    max_pixels: int = option(
        64_000_000, "images that declare more pixels are refused undecoded", above=0
    )
    min_side: int = option(2, "images with a shorter side are refused, pixels", above=0)
    image_suffixes: str = option(
        "auto", "suffixes of images by comma, such as jpg,input.jpg; auto takes all usual ones"
    )
    caption_suffixes: str = option(
        "auto", "suffixes of caption files by comma, such as txt,json; auto takes all usual ones"
    )
    caption_keys: str = option(
        "auto",
        "names of captions in a .json by comma; auto is captions and caption, or else TEXT, text, "
        "alt_text and the like",
    )
    caption_lines: Literal["auto", "each", "whole"] = option(
        "auto",
        "a text file of several lines is a caption per line (each) or one caption (whole); auto is "
        "each where dataset_type.txt beside the shards says retrieval, otherwise whole",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_suffixes", "caption_suffixes", "caption_keys"):
            text = getattr(self, name)
            _require(bool(listed(text)), f"read.{name}", text, "auto or at least one name")


@dataclass(frozen=True, kw_only=True)
class ReadConfig(FilesConfig, section="read"):
    """Reading and cleaning of samples."""

    captions: str = option(
        "basic",
        "caption cleaning; paper is lower case and at most 30 words",
        choices=tuple(CLEANERS),
    )

    @property
    def files(self) -> FilesConfig:
        """The options of the files alone, without cleaning."""
        return FilesConfig(**{name: getattr(self, name) for name in options(FilesConfig)})


def listed(text: str) -> tuple[str, ...]:
    """Return the names that an option holds by comma, each once, in order."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(Options, section="embed"):
    """CLIP embedding of every image and every caption."""

    encoder: str = option(
        "ViT-L-14:openai",
        "open_clip MODEL:TAG, MODEL:/path/to/checkpoint, local-dir:/path, hf-hub:org/repo, "
        "or 'demo'",
        "encoder",
    )
    precision: str = option(
        "auto", "auto is bf16 on a GPU and fp32 on a CPU", choices=("auto", *PRECISIONS)
    )
    batch_size: int = option(
        256,
        "images or captions per forward pass",
        free=True,
        multiple_of=16,
        because="so that results do not depend on it",
    )
    store: str | None = option(
        None, "embedding store that several runs share; default OUT/embeddings", free=True
    )
    store_dtype: Literal["float16", "float32"] = option(
        "float16", "dtype of the embeddings on disk"
    )


@dataclass(frozen=True, kw_only=True)
class SelectConfig(Options, section="select"):
    """Choice of real pairs, for methods that choose them."""

    forgotten: Literal["fewest", "most"] = option(
        "fewest", "method forgetting takes the pairs forgotten fewest or most times"
    )
    epochs: int = option(10, "method forgetting: epochs of training on all pairs", at_least=2)


@dataclass(frozen=True, kw_only=True)
class PruneConfig(Options, section="prune"):
    """The pairs of lowest image-caption cosine are dropped before clustering."""

    ratio: float = option(
        0.2, "share of pairs dropped", "rm-ratio", "rm_ratio", at_least=0, below=1
    )


@dataclass(frozen=True, kw_only=True)
class WhitenConfig(Options, section="whiten"):
    """Whitening of each modality, for method coverage."""

    ridge: float = option(
        0.1, "variance added along every axis, as a share of the mean variance", above=0
    )


@dataclass(frozen=True, kw_only=True)
class CoverConfig(Options, section="cover"):
    """Choice of real pairs that cover the whitened space, for method coverage."""

    candidates: int = option(
        0,
        "images, drawn at random, that are to be covered and may be chosen; 0 is 20,000, or 10 per "
        "pair if more",
        at_least=0,
    )
    herded: float = option(
        0.5,
        "share of the pairs picked by herding, which follow the mean; the others cover what those "
        "leave",
        at_least=0,
        at_most=1,
    )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig(Options, section="cluster"):
    """K-means, once per modality, with as many clusters as pairs requested."""

    solver: Literal["faiss", "distributed"] = option(
        "faiss",
        "faiss fits on one node, with all its CPUs or GPUs; distributed fits on all nodes",
    )
    iterations: int = option(25, "Lloyd iterations at most", above=0)
    tolerance: float = option(
        1e-4,
        "a fit ends when an iteration changes its objective by a smaller share; with faiss, only "
        "one of equal weights does",
        at_least=0,
        below=1,
    )
    restarts: int = option(1, "independent fits of which the best is kept", above=0)
    normalize: bool = option(
        False,
        "cluster L2-normalised vectors; centroids are means of raw ones",
        "normalize-embedding",
        "normalize_embedding",
    )
    memory_gib: float = option(
        8.0,
        "budget for the training vectors; more rows than fit are sampled, and Ray's object stores "
        "hold half as much, with solver distributed until the fit ends",
        above=0,
    )
    modality: Literal["separate", "joint", "image", "text"] = option(
        "separate",
        "separate clusters each modality by itself and matches them, joint runs one k-means on "
        "both, image or text clusters that one for both",
    )

    @property
    def spaces(self) -> tuple[str, ...]:
        """The spaces with a k-means of their own; a pair's image cluster is of the first."""
        return ("image", "text") if self.modality == "separate" else (self.modality,)


@dataclass(frozen=True, kw_only=True)
class MatchConfig(Options, section="match"):
    """One-to-one assignment of image clusters to text clusters by the pairs they share."""

    solver: Literal["auto", "dense", "sparse"] = option(
        "auto", "dense is the Hungarian method; auto is dense up to 5,000 clusters"
    )
    pairless: Literal["auto", "keep", "drop"] = option(
        "auto", "empty matches: clusters that share no pair; auto keeps them below 300 pairs"
    )
    filter: bool = option(
        True,
        "average only the pairs that matched clusters share; false averages the two whole clusters",
    )


@dataclass(frozen=True, kw_only=True)
class PrototypesConfig(Options, section="prototypes"):
    """From matched clusters to prototypes."""

    center: Literal["mean", "medoid"] = option(
        "mean",
        "a prototype is the mean of the pairs that matched clusters share, or their medoid: the "
        "embeddings of the real pair nearest to that mean",
    )


@dataclass(frozen=True, kw_only=True)
class DecodeConfig(Options, section="decode"):
    """From prototypes to images."""

    decoder: str = option(
        "auto",
        "unclip (diffusers) or nearest (the real image nearest to the prototype); auto is nearest "
        "for method coverage, otherwise unclip",
        "decoder",
    )
    model: str = option(
        "auto",
        "diffusers unCLIP repository id or folder; auto takes the one that fits the encoder",
        "decoder-model",
    )
    revision: str | None = option(None, "revision of the repository; default its main branch")
    condition: Literal["prototype", "caption"] = option(
        "prototype", "input of the decoder: the prototype (and caption), or the caption alone"
    )
    steps: int = option(100, "denoising steps", "steps", above=0)
    guidance: float = option(
        5.0, "classifier-free guidance scale; 1 or less switches it off", "guidance"
    )
    noise_level: int = option(
        10, "noise added to the prototype", "noise", at_least=0, at_most=_MOST_NOISE
    )
    negative_prompt: str = option("text, watermark", "what the image should not show")
    rescale: bool = option(
        False, "scale prototypes to the mean norm of their members before decoding"
    )
    precision: str = option(
        "auto", "auto is fp16 on a GPU and fp32 on a CPU", choices=("auto", *PRECISIONS)
    )
    batch_size: int = option(16, "prototypes decoded together", free=True, above=0)
    """Free unless some images of a model are there already."""
    image_size: int = option(
        224,
        "side of the saved images in pixels; 0 keeps the decoder's",
        "image-size",
        "image_size",
        at_least=0,
    )
    format: Literal["auto", "png", "jpeg", "webp"] = option(
        "auto", "format of the saved images; auto is png, or what fits best in --budget"
    )
    quality: int | None = option(
        None,
        "quality of the saved images as jpeg or webp; default 90, or what fits best in --budget",
        at_least=1,
        at_most=100,
    )
    candidates: int = option(
        1, "images drawn per prototype, of which the one with the best score is kept", above=0
    )
    noise_levels: str = option(
        "", "noise levels of the candidates by comma, taken in turn; default noise_level for all"
    )
    image_weight: float = option(
        1.0, "weight of an image's cosine to its image prototype in its score", at_least=0
    )
    text_weight: float = option(
        1.0, "weight of an image's cosine to its text prototype in its score", at_least=0
    )
    real_fallback: bool = option(
        False,
        "take the nearest real image where the decoded one fails: its nearest image prototype is "
        "not its own, or its score is lower by more than real_margin; licences may forbid it",
        "real-fallback",
    )
    real_margin: float = option(
        0.05, "a decoded image may score so much less than the nearest real one", at_least=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for level in self.levels:
            text = f"levels from 0 to {_MOST_NOISE} by comma"
            _require(0 <= level <= _MOST_NOISE, "decode.noise_levels", self.noise_levels, text)

    @property
    def levels(self) -> list[int]:
        """The noise levels that the candidates take in turn. Raises ConfigError."""
        names = listed(self.noise_levels) or (str(self.noise_level),)
        # a sign or a blank is no level
        return [int(name) if name.isdecimal() else -1 for name in names]

    @property
    def judged(self) -> bool:
        """True if images are scored by the encoder before one per pair is kept."""
        return self.candidates > 1 or self.real_fallback


@dataclass(frozen=True, kw_only=True)
class CaptionConfig(Options, section="caption"):
    """The caption that goes with each image."""

    nearest_to: Literal["picture", "prototype", "both"] = option(
        "picture",
        "a pair's caption is the real one nearest to its image (picture), as published to its text "
        "prototype, or to both together",
    )
    round_trip: bool = option(
        False,
        "pass over captions whose nearest image is another pair's, and those that another pair has",
    )


@dataclass(frozen=True, kw_only=True)
class ExtrasConfig(Options, section="extras"):
    """Parts of a set besides one caption per image, for training that uses them."""

    captions: int = option(
        0,
        "further captions per pair at most: of a real image its own, of a made one those of its "
        "cluster nearest to the text prototype",
        at_least=0,
    )
    similarity: Literal["off", "clip", "table"] = option(
        "off",
        "soft targets: by the cosines of the pairs' embeddings (clip), or by the pairs that "
        "clusters share (table; method pds)",
    )
    temperature: float = option(0.2, "extras.similarity clip: temperature of the softmax", above=0)
    share: float = option(
        0.5, "share of the soft part in each target, beside the own caption", above=0, below=1
    )

    @property
    def used(self) -> dict[str, Any]:
        """The options that a set depends on, with their values; none where it has no extras."""
        unused = {"temperature"} if self.similarity == "table" else set()
        if self.similarity == "off":
            unused = {"similarity", "temperature", "share"}
        if not self.captions:
            unused.add("captions")
        names = options(type(self))  # type: ignore[arg-type]  # classes can be hashed
        return {name: getattr(self, name) for name in names if name not in unused}


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Options, section="experts"):
    """Experts: models trained on all of the source, whose weights after each epoch are kept."""

    store: str = option(
        "", "folder of experts that several runs share; default OUT/experts", free=True
    )
    count: int = option(20, "experts, each trained with seeds of its own", above=0)
    seed: int = option(
        0, "seed of the experts, apart from that of the set", at_least=0, at_most=2**31 - 1
    )
    epochs: int = option(10, "epochs of each expert", above=0)
    backbone: str = option(
        "small_conv", "image network of the experts: small_conv, small_vit, small_mixer or timm's"
    )
    text_encoder: str = option(
        "auto", "auto (embed.encoder), an open_clip model, bert:MODEL or distilbert:MODEL"
    )
    image_size: int = option(
        0, "side of the images in pixels; 0 is what the backbone was made for", at_least=0
    )
    train: Literal["all", "backbone", "heads", "lora"] = option(
        "all",
        "parts that are trained: all, the backbone and the text head, the heads of image and text, "
        "or adapters of the backbone (lora) and the text head",
    )
    rank: int = option(4, "experts.train lora: rank of the adapters", above=0)
    shared_start: bool = option(
        False,
        "all experts start from the same random weights, so that weights of several may be merged",
    )
    learning_rate: float = option(0.1, "learning rate of the image branch at the start", above=0)
    text_learning_rate: float = option(0.1, "learning rate of the text head at the start", above=0)
    momentum: float = option(0.0, "momentum of sgd", at_least=0, below=1)
    weight_decay: float = option(0.0, "weight decay", at_least=0)
    batch_size: int = option(
        128, "images per step", at_least=2, because="a pair needs another to differ from"
    )
    augment: bool = option(
        True, "random shifts and scales of the images, unless the heads alone are trained"
    )
    schedule: Literal["constant", "step", "cosine"] = option(
        "constant",
        "constant keeps the rates, step takes a tenth after half of the epochs, cosine falls to "
        "zero",
    )
    cpus: int = option(
        1,
        "CPUs of each expert, and its threads without a GPU; rounding depends on them",
        free=True,
        above=0,
    )
    gpus: float | None = option(
        None,
        "GPUs of each expert, such as 0.5; default 1 where there are any",
        free=True,
        at_least=0,
    )


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Options, section="distill"):
    """Optimisation of a set, for methods that learn its images and text vectors.

    Where a value is 0 or auto, the distiller has its own, which is the published one.
    """

    init: str = option(
        "random",
        "the set that is improved: random, noise, any method, which makes it first, or the folder "
        "of a finished run",
        "init",
    )
    iterations: int = option(0, "iterations; 0 is the distiller's own number", at_least=0)
    gradient: Literal["auto", "adjoint", "tesla", "unrolled"] = option(
        "auto",
        "gradient through the student's steps: adjoint is exact in little memory, unrolled exact "
        "in much, tesla as published and biased; auto is adjoint",
    )
    steps: int = option(0, "steps of the student per iteration", at_least=0)
    expert_epochs: int = option(
        0, "the target is the expert's weights so many epochs after the start", at_least=0
    )
    max_start: int = option(
        0, "the student starts from the expert after 0 to max_start - 1 epochs", at_least=0
    )
    independent_starts: bool = option(
        False, "images and text start from epochs of their own, by how far each branch moves"
    )
    smooth: bool = option(
        False, "experts' weights are put on the line from first to last, by the way gone"
    )
    batch_size: int = option(
        0, "pairs per step of the student; the distiller's own number is cut to the set", at_least=0
    )
    sampling: Literal["auto", "fresh", "chunks"] = option(
        "auto",
        "fresh draws the pairs of each step anew, chunks takes the parts of a permutation in turn",
    )
    image_rate: float = option(0.0, "learning rate of the images", at_least=0)
    text_rate: float = option(0.0, "learning rate of the text vectors", at_least=0)
    similarity_rate: float = option(0.0, "learning rate of the similarity", at_least=0)
    step_rate: float = option(0.0, "learning rate of the student's step sizes", at_least=0)
    step_size: float = option(0.0, "the student's step sizes at the start", at_least=0)
    step_floor: float = option(1e-4, "the student's step sizes at least", above=0)
    momentum: float = option(0.5, "momentum of all that is learned", at_least=0, below=1)
    loss: Literal["auto", "info_nce", "ence", "wbce", "soft_wbce"] = option(
        "auto", "loss of the student's steps; info_nce takes no similarity"
    )
    temperature: float = option(0.07, "temperature of the loss of the student's steps", above=0)
    similarity: Literal["auto", "identity", "full", "low_rank"] = option(
        "auto", "what is learned of the similarity of images and text vectors: identity is nothing"
    )
    rank: int = option(0, "rank of a similarity of low rank", at_least=0)
    alpha: float = option(0.0, "weight of the low-rank part of a similarity", at_least=0)
    mix: bool | None = option(
        None, "method repblend mixes the features of two pairs each in every step; default true"
    )
    merge_branches: bool | None = option(
        None,
        "the loss is one ratio over both branches, not the sum of a ratio each; default the "
        "distiller's own",
    )
    dropout: Literal["off", "replay"] = option(
        "off", "replay drops units in the student's steps, the same ones whenever a step is redone"
    )
    augment: bool = option(
        False, "the student's steps see images moved and scaled at random, as experts do"
    )
    anchor: float = option(
        0.0, "weight of the squared distance of the pixels to those of the start", at_least=0
    )
    evaluate_every: int = option(
        0, "iterations between validations, of which the best is kept; 0 is none", at_least=0
    )
    patience: int = option(4, "validations in a row without a better one that end it", above=0)


@dataclass(frozen=True)
class Actors:
    """Size and resources of a pool of actors."""

    workers: int
    """At most; 0: as many as the cluster has room for."""
    min_workers: int
    gpus: float | None
    """GPUs per actor; None: decided by the cluster's GPUs."""
    resources: dict[str, float]
    """Custom resources per actor."""


@dataclass(frozen=True, kw_only=True)
class RayConfig(Options, section="ray"):
    """Place and size of the work, and its limits.

    The result depends on it only by what is refused: images that take more time
    (`sample_timeout_s`) or memory than they may. All of these options are free.
    """

    address: str | None = option(
        None, "address of a running cluster; default a local Ray that is started", "address"
    )
    num_cpus: int | None = option(None, "CPUs of the local Ray; default all", above=0)
    object_store_gib: float | None = option(
        None,
        "object store of the local Ray; default a quarter of free memory, at most 8 GiB",
        at_least=0.08,
    )
    read_resources: str = option(
        "",
        "custom resources of each task that reads or decodes images, NAME=AMOUNT,...; default none",
    )
    executions: int = option(
        0,
        "parts of the cluster that embed side by side, each scheduled by a process of its own, "
        "at most one per embedding actor; 0 is one per 256 CPUs",
        at_least=0,
    )
    embed_workers: int = option(
        0, "embedding actors at most; 0 is one per GPU, or what the CPUs allow", at_least=0
    )
    embed_min_workers: int = option(
        1, "embedding actors at least, as the cluster shrinks", at_least=1
    )
    embed_gpus: float | None = option(
        None,
        "GPUs of each embedding actor, such as 0.5; default 1 where there are any; "
        "give it if they are yet to come",
        at_least=0,
        because="a share of one GPU or a whole number",
    )
    embed_resources: str = option(
        "", "custom resources of each embedding actor, NAME=AMOUNT,...; default none"
    )
    decode_workers: int = option(
        0, "decoding actors at most; 0 is one per GPU, or what the CPUs allow", at_least=0
    )
    decode_min_workers: int = option(
        1, "decoding actors at least, as the cluster shrinks", at_least=1
    )
    decode_gpus: float | None = option(
        None,
        "GPUs of each decoding actor; default 1 where there are any",
        at_least=0,
        because="a share of one GPU or a whole number",
    )
    decode_resources: str = option(
        "", "custom resources of each decoding actor, NAME=AMOUNT,...; default none"
    )
    max_bad_share: float = option(
        0.5,
        "the run stops when more than this share of the samples is bad",
        at_least=0,
        at_most=1,
    )
    max_failed_share: float = option(
        0.1,
        "the run stops when more than this share of the shards cannot be read",
        at_least=0,
        at_most=1,
    )
    sample_timeout_s: float = option(
        60.0, "an image that takes longer to decode is given up, seconds", above=0
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _amounts("ray.read_resources", self.read_resources)
        _check_actors("embed", self.embed_actors)
        _check_actors("decode", self.decode_actors)

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


def _check_actors(stage: str, actors: Actors) -> None:
    """Check what bounds of one option cannot say. Raises ConfigError."""
    fewest, gpus = actors.min_workers, actors.gpus
    allowed = f"from 1 to {stage}_workers"
    _require(
        not actors.workers or fewest <= actors.workers, f"ray.{stage}_min_workers", fewest, allowed
    )
    allowed = "a share of one GPU or a whole number"
    _require(gpus is None or gpus <= 1 or gpus == int(gpus), f"ray.{stage}_gpus", gpus, allowed)


def _amounts(name: str, text: str) -> dict[str, float]:
    """Parse "H100=1,nvme=0.1" to {"H100": 1.0, "nvme": 0.1}. Raises ConfigError."""
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
class RunConfig(Options):
    """A whole distillation: source, result, and sections of options."""

    source: str = option(
        "",
        "tar path, glob or brace range (local or on a store), a folder, parquet:PATTERN, "
        "hf:ORG/NAME[:SPLIT], flickr30k:ROOT, coco:ROOT, or scenes:N[:SEED[:NOISE[:SHARD]]]",
        "source",
    )
    out: str = option("", "run folder", "out", free=True)
    method: str = option(
        "pds",
        "pds distils; coverage and the selectors choose real pairs",
        "method",
        choices=METHODS,
    )
    pairs: int = option(
        PAIRS,
        "distilled pairs; with --budget alone as many as fit, which is written 0",
        "pairs",
        "num-pairs",
        "num_pairs",
        at_least=0,
    )
    budget: str = option(
        "",
        "bytes of the images and captions of the set at most, such as 500kB, 2MB or 1.5MiB: pairs, "
        "side and format of the images are chosen for it; by default the pairs decide",
        "budget",
    )
    seed: int = option(0, "seed of all random draws", "seed", at_least=0, at_most=2**31 - 1)
    read: ReadConfig = field(default_factory=ReadConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    whiten: WhitenConfig = field(default_factory=WhitenConfig)
    cover: CoverConfig = field(default_factory=CoverConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    match: MatchConfig = field(default_factory=MatchConfig)
    prototypes: PrototypesConfig = field(default_factory=PrototypesConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    extras: ExtrasConfig = field(default_factory=ExtrasConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget:
            parse_bytes(self.budget, "budget")
        else:
            _require(self.pairs > 0, "pairs", self.pairs, "positive")

    @property
    def budget_bytes(self) -> int:
        """The budget in bytes; 0 if there is none."""
        return parse_bytes(self.budget, "budget") if self.budget else 0

    @property
    def start(self) -> str:
        """The method that makes the pairs: that of the start, where the method improves one.

        "" where they are those of a finished run.
        """
        return catalog.start_of(self.method, self.distill.init)


def parse_bytes(text: str, name: str) -> int:
    """Parse "500kB", "2MB", "1.5MiB" or "4096" to bytes, rounded down. Raises ConfigError."""
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt]?)(i?)b?)\s*", text, re.IGNORECASE)
    _require(
        found is not None and not (found[3] and not found[2]),
        name,
        text,
        "a size such as 500kB, 2MB or 1.5MiB",
    )
    assert found is not None
    scale = (1024 if found[3] else 1000) ** " kmgt".index(found[2].lower() or " ")
    size = int(Decimal(found[1]) * scale)
    _require(size > 0, name, text, "at least a byte")
    return size


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig(Options, section="protocol"):
    """Training of models on a set and their evaluation. Named protocols are in recipes.py."""

    train: Literal["text_head", "heads", "backbone", "all"] = option(
        "all",
        "parts that are trained: the text head, the heads of image and text, the backbone and the "
        "text head, or all",
    )
    text: Literal["captions", "prototypes"] = option(
        "captions", "text input: captions, encoded again, or the text prototypes of the set"
    )
    text_encoder: str = option(
        "auto", "auto (the CLIP of the set), an open_clip model, bert:MODEL or distilbert:MODEL"
    )
    captions: str = option(
        "basic", "cleaning of the captions that are encoded", choices=tuple(CLEANERS)
    )
    image_size: int = option(
        0, "side of the images in pixels; 0 is what the backbone was made for", at_least=0
    )
    normalization: Literal["backbone", "clip"] = option(
        "backbone", "constants that normalise pixels: the backbone's own, or those of CLIP"
    )
    augment: bool = option(
        True,
        "random shifts and scales while the backbone is trained; nothing that contradicts a "
        "caption",
    )
    optimizer: Literal["adamw", "sgd"] = option("adamw", "optimizer")
    learning_rate: float = option(1e-3, "learning rate at the start", above=0)
    momentum: float = option(0.9, "momentum of sgd", at_least=0)
    weight_decay: float = option(0.05, "weight decay", at_least=0)
    schedule: Literal["cosine", "step", "constant"] = option(
        "cosine",
        "cosine falls to zero, step to a tenth after half of the epochs, constant stays",
    )
    epochs: int = option(100, "epochs", above=0)
    batch_size: int = option(
        128,
        "pairs per step, over all workers of a trial",
        at_least=2,
        because="a pair needs another to differ from",
    )
    sampling: Literal["epoch", "independent"] = option(
        "epoch", "epoch takes every pair once, independent draws every batch afresh"
    )
    evaluate_every: int = option(20, "epochs between evaluations", above=0)
    select: Literal["val", "test", "last"] = option(
        "val", "the epoch reported: the best on val, the best on test, or the last"
    )
    fit: Literal["squash", "crop"] = option(
        "squash",
        "how images become squares: squash changes their aspect, crop takes the middle",
    )
    subjects: Literal["image", "caption"] = option(
        "image",
        "what counts as found: the image itself, or also any whose first caption is the same",
    )
    targets: Literal["hard", "soft"] = option(
        "hard",
        "an image's targets: its own caption alone (hard), or the similarity that the set holds",
    )
    captions_per_image: Literal["one", "all"] = option(
        "one", "one trains on the caption of each image, all on one of its captions per visit"
    )
    learned: Literal["auto", "off"] = option(
        "auto",
        "learned parts of a set: auto takes those that fit the model and the protocol, off its "
        "pictures and captions alone",
    )


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """An evaluation: the models and how often each is trained, the test data, and where it runs."""

    test: str = option(
        "", "source of the held-out images and captions, as --source of distill", "test"
    )
    val: str | None = option(
        None, "source that selects the epoch; default the one that belongs to --test", "val"
    )
    backbones: str = option(
        "small_conv,small_vit,small_mixer", "evaluation models, by comma", "backbones"
    )
    seeds: int = option(5, "models trained per backbone, with seeds 0, 1, ...", "seeds", above=0)
    workers: int = option(
        1, "workers that share one trial, with gathered negatives", "workers", above=0
    )
    trials: int = option(
        0, "trials at once; 0 is what the GPUs, or the CPUs, allow", "trials", at_least=0
    )
    max_failures: int = option(
        3,
        "worker failures tolerated per trial queue without progress",
        "max-failures",
        at_least=0,
    )
    save_every_s: float = option(
        30.0,
        "seconds of training that a worker failure costs at most, or one evaluation",
        at_least=0,
    )
    read: FilesConfig = field(default_factory=FilesConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(bool(self.backbone_names), "backbones", self.backbones, "at least one name")

    @property
    def backbone_names(self) -> list[str]:
        """The backbones one by one."""
        return list(listed(self.backbones))


Config = TypeVar("Config", RunConfig, EvaluateConfig)


def sections(cls: type = RunConfig) -> dict[str, type[Options]]:
    """Return name -> dataclass of the nested sections, in order."""
    hints = get_type_hints(cls)
    return {
        each.name: hints[each.name]
        for each in dataclasses.fields(cls)
        if "option" not in each.metadata
    }


FREE_FIELDS = tuple(
    known.name
    for group in (RunConfig, *sections().values())
    for known in options(group).values()
    if known.free
)
"""Options that may differ when a run is continued; so may all of ray.*."""


def changed(group: Options) -> dict[str, Any]:
    """Return the options of one group that are not at their default, and their values."""
    known = options(type(group))  # type: ignore[arg-type]  # classes can be hashed
    values = {name: getattr(group, name) for name in known}
    return {name: value for name, value in values.items() if value != known[name].default}


def to_dict(config: RunConfig | EvaluateConfig) -> dict[str, Any]:
    """Return the configuration as plain JSON values, sections nested."""
    return dataclasses.asdict(config)


def settled(config: RunConfig) -> RunConfig:
    """Return the configuration of a run without a budget with what a budget would have chosen.

    That of a run with a budget is returned as it is.
    """
    if config.budget:
        return config
    format = "png" if config.decode.format == "auto" else config.decode.format
    quality = None if format == "png" else config.decode.quality or QUALITY
    saved = {"decode.format": format, "decode.quality": quality}
    return replace(config, saved)


def public(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as it may be shown and published; run.json holds it so."""
    values = to_dict(config)
    for name in ("source", "out"):
        values[name] = without_secrets(values[name])
    if config.embed.store:
        values["embed"]["store"] = without_secrets(config.embed.store)
    values["experts"]["store"] = without_secrets(config.experts.store)
    return values


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a copy with dotted options changed: {"pairs": 200, "prune.ratio": "0.1"}.

    Text is converted to the option's type. A budget alone also decides the number of pairs.

    Raises ConfigError for an unknown option, naming the known ones, and for a value of the wrong
    type or out of bounds.
    """
    top: dict[str, Any] = {}
    nested: dict[str, dict[str, Any]] = {}
    for dotted, value in changes.items():
        section, _, name = dotted.rpartition(".")
        (nested.setdefault(section, {}) if section else top)[name] = value
    if top.get("budget") and "pairs" not in top:
        top["pairs"] = 0  # those of a recipe are no wish of a user who gives bytes
    known = sections(type(config))
    for section, values in nested.items():
        if section not in known:
            raise ConfigError(f"unknown section {section!r}; known: {', '.join(known)}")
        top[section] = _replace(getattr(config, section), values, f"{section}.")
    return _replace(config, top, "")


def _replace(config: Any, values: Mapping[str, Any], prefix: str) -> Any:
    known, groups = options(config.__class__), sections(config.__class__)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name in known:
            converted[name] = _convert(value, known[name])
        elif name not in groups:
            names = ", ".join(prefix + each.name for each in dataclasses.fields(config))
            raise ConfigError(f"unknown option {prefix}{name}; known: {names}")
        elif isinstance(value, groups[name]):
            converted[name] = value
        else:
            _require(False, name, value, "a section with fields of its own")
    return dataclasses.replace(config, **converted)


def _convert(value: Any, known: Option) -> Any:
    """Return `value` as the type of the option. Raises ConfigError."""
    name, kind = known.name, known.kind
    if known.optional and value in (None, "", "none", "null"):
        return None
    if value is None:
        raise ConfigError(f"{name} has no value")
    if kind is bool:
        return _to_bool(value, name)
    if isinstance(value, bool | dict | list):
        raise ConfigError(f"{name} is {value!r}; it must be {KINDS[kind]}")
    try:
        converted = kind(value)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{name} is {value!r}; it must be {KINDS[kind]}") from None
    whole = kind is not int or not isinstance(value, float) or value == converted
    _require(whole, name, value, "a whole number")
    return converted


def _to_bool(value: Any, name: str) -> bool:
    """Return a bool from what people write; a plain bool("False") would be True."""
    written = {True: ("true", "yes", "on", "1"), False: ("false", "no", "off", "0")}
    for meaning, texts in written.items():
        if str(value).lower() in texts:
            return meaning
    raise ConfigError(f"{name} is {value!r}; it must be true or false")


def flatten(mapping: Mapping[str, Any], cls: type = RunConfig) -> dict[str, Any]:
    """Return {"prune": {"ratio": 0.1}, "pairs": 5} as {"prune.ratio": 0.1, "pairs": 5}.

    Raises ConfigError if an option is in it nested and dotted.
    """
    flat: dict[str, Any] = {}
    known = sections(cls)
    for key, value in mapping.items():
        if key in known and isinstance(value, Mapping):
            named = {f"{key}.{name}": item for name, item in value.items()}
        else:
            named = {str(key): value}
        for name in flat.keys() & named.keys():
            raise ConfigError(f"{name} is given twice, with values {flat[name]} and {named[name]}")
        flat |= named
    return flat
