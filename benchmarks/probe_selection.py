"""Try rules for the choice of real pairs: embed a source once, choose, train small models, print.

    python -m benchmarks.probe_selection embed runs/probe --source scenes:10000 --encoder demo \\
        --test scenes:1000:7 --val scenes:1000:1000000007 --size 64
    python -m benchmarks.probe_selection try runs/probe --rules random,cover,cover:herded=0 \\
        --pairs 100 --set-seeds 3 --seeds 2 --backbones small_conv

A rule is a name with options behind it, all of which are fields of `Rule`. A line of the result is
the mean r_mean in percent, its deviation over sets (each the mean of its models), and that over
models. With `--features BACKBONE`, which `embed` takes, a frozen pretrained backbone sees each
image once, and heads alone are trained: a minute per rule. `--judge ridge` trains nothing: captions
are mapped to features by ridge regression on the chosen pairs, in seconds; the features are those
of the frozen backbone, or of convolutions with random weights. It ranks rules; its recalls are not
those of trained models.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pds_ray import catalog
from pds_ray.config import EmbedConfig, ProtocolConfig, ReadConfig
from pds_ray.encoders.base import Encoder, EncoderInfo
from pds_ray.modalities.image import Preprocess, decode_image
from pds_ray.modalities.text import CLEANERS
from pds_ray.sources.base import Fault
from pds_ray.stages import cover, whiten
from pds_ray.stages.trial import TextInput, Trial, TrialData, encode, run_trial, train_model
from pds_ray.stages.vectors import normalized
from pds_ray.training.data import Gallery, Pixels, TrainingPairs
from pds_ray.training.recall import recalls
from pds_ray.training.retrieval import embed_images
from pds_ray.training.two_towers import TwoTowers
from pds_ray.training.workers import Workers

TOGETHER = 256  # images encoded at once


@dataclass(frozen=True)
class Rule:
    """A rule for the choice of pairs. The first field is the name; the others are options."""

    name: str
    """random; or k_center, or cover, on pruned and whitened pairs."""
    prune: float = 0.2
    """Share of pairs of lowest cosine that is dropped first."""
    ridge: float = 0.1
    """That of whitening."""
    candidates: int = 10_000
    """Images drawn by the seed of the choice."""
    herded: float = 0.5
    """Share of the picks of `cover` by herding; the others cover."""
    power: float = 1.0
    """The power of the distance 1 - cosine that `cover` makes small."""
    prune_by: str = "cosine"
    """cosine, or negative: the cosine less what the pair has with others (negCLIPLoss)."""
    caption_by: str = "cosine"
    """The caption that an image keeps: that of highest cosine, or of highest negative."""
    captions: str = "one"
    """one: that caption alone; all: all captions of the image that pruning keeps."""
    kernel: str = "sum"
    """Similarity of pairs: the sum of the two cosines, or their product."""

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Parse `cover:power=2:prune=0.3`."""
        name, *changes = text.split(":")
        given, plain = dict(change.split("=") for change in changes), cls(name)
        return replace(plain, **{key: type(getattr(plain, key))(given[key]) for key in given})


@dataclass(frozen=True)
class World:
    """An embedded source and what models are trained and measured on."""

    inputs: np.ndarray
    """uint8 [n, 3, S, S], or features float32 [n, f]."""
    image: np.ndarray
    """float32 [n, d]: embeddings at unit length."""
    text: np.ndarray
    """float32 [N, d]: raw embeddings."""
    owner: np.ndarray
    """int64 [N]."""
    val: Gallery
    test: Gallery

    @classmethod
    def load(cls, folder: Path) -> World:
        train, val, test = (dict(np.load(folder / f"{name}.npz")) for name in SPLITS)
        image = normalized(train["image"])
        galleries = (
            Gallery(*(torch.from_numpy(split[name]) for name in ("inputs", "text", "owner")))
            for split in (val, test)
        )
        return cls(train["inputs"], image, train["text"], train["owner"], *galleries)


SPLITS = ("train", "val", "test")


def embed(folder: Path, args: argparse.Namespace) -> None:
    """Write the three splits, each embedded; what is there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    info = catalog.describe_encoder(EmbedConfig(encoder=args.encoder))
    encoder = catalog.load_encoder(info, "fp32")
    for name, uri in zip(SPLITS, (args.source, args.val, args.test), strict=True):
        if not (folder / f"{name}.npz").exists():
            split = _embedded(uri, info, encoder, args)
            np.savez(folder / f"{name}.npz", **split)
            print(f"{name}: {len(split['inputs']):,} images, {len(split['text']):,} captions")


def _embedded(
    uri: str, info: EncoderInfo, encoder: Encoder, args: argparse.Namespace
) -> dict[str, Any]:
    """Return the arrays of a split; images that cannot be used are left out."""
    clean, square = CLEANERS["basic"], Preprocess(args.size, resize_mode="squash")
    source = catalog.make_source(uri, ReadConfig())
    owner, captions, images, inputs = list[int](), list[str](), [], []
    pixels: list[tuple[np.ndarray, np.ndarray]] = []
    to_features = _features(args.features, args.size) if args.features else np.asarray

    def flush() -> None:
        if pixels:
            of_encoder, squares = map(np.stack, zip(*pixels, strict=True))
            images.append(encoder.encode_images(of_encoder))
            inputs.append(to_features(squares))
            pixels.clear()

    number = 0
    for shard in source.shards():
        for item in source.read(shard):
            if isinstance(item, Fault):
                continue
            mine = [text for caption in item.captions if (text := clean(caption))]
            if mine:
                image = decode_image(item.image, max_pixels=1 << 26, min_side=2)
                pixels.append((info.preprocess(image), square(image).transpose(2, 0, 1)))
                owner += [number] * len(mine)
                captions += mine
                number += 1
            if len(pixels) == TOGETHER:
                flush()
    flush()
    return {
        "image": np.concatenate(images),
        "inputs": np.concatenate(inputs),
        "text": encode(encoder, captions),
        "owner": np.array(owner),
    }


def _features(backbone: str, size: int) -> Any:
    """Return the function from uint8 [n, 3, S, S] to features of a frozen backbone."""
    info = catalog.describe_backbone(backbone)
    net = catalog.build_backbone(info, size).eval()
    pixels = Pixels(info.mean, info.std)
    return lambda squares: embed_images(net, torch.from_numpy(squares), pixels, Workers()).numpy()


def choose(world: World, rule: Rule, pairs: int, seed: int) -> np.ndarray:
    """Return the chosen captions as rows of all: one of each image, int64 [pairs], or several."""
    rng = np.random.default_rng(seed)
    if rule.name == "random":
        rows = rng.permutation(len(world.owner))
        _, first = np.unique(world.owner[rows], return_index=True)
        rows = rows[np.sort(first)[:pairs]]
        return _captions(world, rows, rule, np.ones(len(world.owner), bool))
    text = normalized(world.text)
    cosine = np.einsum("nd,nd->n", world.image[world.owner], text)
    kept = np.ones(len(cosine), bool)
    dropped = np.argsort(_scores(world, text, cosine, rule.prune_by), kind="stable")
    kept[dropped[: int(rule.prune * len(cosine))]] = False
    best = cover.best_pairs(world.owner, _scores(world, text, cosine, rule.caption_by), kept)
    drawn = rng.permutation(best)[: min(rule.candidates, int(SHARE * len(best)))]
    times = np.bincount(world.owner[kept], minlength=len(world.image))
    white_image = whiten.whitening(whiten.moments(world.image, times), rule.ridge)
    white_text = whiten.whitening(whiten.moments(text, kept.astype(int)), rule.ridge)
    candidates = cover.Candidates(
        white_image(world.image[world.owner[drawn]]), white_text(text[drawn])
    )
    return _captions(world, drawn[CHOICES[rule.name](candidates, pairs, rule)], rule, kept)


def _captions(world: World, rows: np.ndarray, rule: Rule, kept: np.ndarray) -> np.ndarray:
    """Return the chosen captions, or in order all that their images keep."""
    if rule.captions == "one":
        return rows
    return np.flatnonzero(kept & np.isin(world.owner, world.owner[rows]))


def _scores(world: World, text: np.ndarray, cosine: np.ndarray, by: str) -> np.ndarray:
    """Return the cosines, or less a soft maximum over other captions and images (Wang, 2024)."""
    if by == "cosine":
        return cosine
    rng = np.random.default_rng(0)

    def soft_maximum(rows: np.ndarray, others: np.ndarray) -> np.ndarray:
        some = others[rng.choice(len(others), min(OTHERS, len(others)), replace=False)]
        return np.log(np.exp(rows @ some.T / TEMPERATURE).mean(axis=1))

    of_image = soft_maximum(world.image, text)[world.owner]
    return cosine / TEMPERATURE - (of_image + soft_maximum(text, world.image)) / 2


OTHERS, TEMPERATURE = 1_000, 0.05
SHARE = 0.8
"""Share of the images that is drawn at most, so that seeds differ in small sources too."""


@dataclass(frozen=True)
class Varied(cover.Candidates):
    """Candidates with another similarity, all of it still from -1 to 1."""

    rule: Rule

    def similarity(self, rows: np.ndarray) -> np.ndarray:
        """Return the similarity of all candidates and some rows. float32 [C, len(rows)]."""
        if self.rule.kernel == "product":
            found = (self.image @ self.image[rows].T) * (self.text @ self.text[rows].T)
        else:
            found = super().similarity(rows)
        power = self.rule.power
        if power == 1:
            return found
        return 1 - np.maximum(1 - found, 0) ** np.float32(power) / np.float32(2 ** (power - 1))


def _cover(candidates: cover.Candidates, pairs: int, rule: Rule) -> np.ndarray:
    varied = Varied(candidates.image, candidates.text, rule)
    return np.array(list(cover.choose(varied, pairs, rule.herded)))


def _k_center(candidates: cover.Candidates, pairs: int, _: Rule) -> np.ndarray:
    """Take the first candidate, then always the one least like its nearest pick."""
    picks = [0]
    nearest = candidates.similarity(np.array([0]))[:, 0]
    while len(picks) < pairs:
        picks.append(int(nearest.argmin()))
        np.maximum(nearest, candidates.similarity(np.array(picks[-1:]))[:, 0], out=nearest)
        nearest[picks[-1]] = np.inf
    return np.array(picks)


CHOICES = {"cover": _cover, "k_center": _k_center}


def recall(world: World, rows: np.ndarray, backbone: str, seed: int) -> float:
    """Train a model on chosen pairs by the standard protocol; return its r_mean on test."""
    frozen = world.inputs.ndim == 2
    images, owner = np.unique(world.owner[rows], return_inverse=True)
    several = len(images) < len(rows)
    shown = images if several else world.owner[rows]
    pairs = TrainingPairs(
        torch.from_numpy(world.inputs[shown]),
        torch.from_numpy(world.text[rows]),
        torch.from_numpy(owner) if several else None,
    )
    data = TrialData(pairs, world.val, world.test)
    per_image: Any = "all" if several else "one"
    protocol = ProtocolConfig(train="heads" if frozen else "all", captions_per_image=per_image)
    info = catalog.describe_backbone(backbone)
    text = TextInput("captions", "the encoder", "basic")
    size = world.inputs.shape[-1]
    trial = Trial("probe", "probe", info, size, seed, protocol, text, len(images))
    if not frozen:
        return run_trial(trial, data, catalog.build_backbone)["recalls"]["r_mean"]
    torch.manual_seed(seed)
    model = TwoTowers(None, size, pairs.text.shape[1], image_head=True)
    return train_model(trial, model, data, Workers())["recalls"]["r_mean"]


def random_features(images: np.ndarray) -> np.ndarray:
    """Return features of convolutions with random weights, float32 [n, f]."""
    parts = []
    for seed in range(RANDOM_NETS):
        torch.manual_seed(seed)
        net = catalog.build_backbone(catalog.describe_backbone("small_conv"), images.shape[-1])
        pixels = Pixels((0.5,) * 3, (0.25,) * 3)
        parts.append(embed_images(net.eval(), torch.from_numpy(images), pixels, Workers()).numpy())
    return np.concatenate(parts, axis=1)


def _unit(vectors: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(normalized(vectors).astype(np.float32))


class Ridge:
    """Judges sets by ridge regression from captions to features, its penalty chosen on val."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.features = np.asarray if world.inputs.ndim == 2 else random_features
        self.galleries = [(g, self.features(g.images.numpy())) for g in (world.val, world.test)]

    def __call__(self, rows: np.ndarray) -> float:
        """Return the r_mean on test of the pairs, rows of the captions."""
        text = normalized(self.world.text[rows])
        images = self.features(self.world.inputs[self.world.owner[rows]])
        mean, scale = images.mean(axis=0), images.std(axis=0) + 1e-3 * images.std()
        centred = text - text.mean(axis=0)
        kernel = centred @ centred.T
        found = []
        for penalty in PENALTIES:
            added = penalty * np.trace(kernel) / len(rows) * np.eye(len(rows))
            weights = centred.T @ np.linalg.solve(kernel + added, (images - mean) / scale)
            pair = []
            for gallery, features in self.galleries:
                mapped = (normalized(gallery.text.numpy()) - text.mean(axis=0)) @ weights
                sides = _unit((features - mean) / scale), _unit(mapped)
                pair.append(recalls(*sides, gallery.owner)["r_mean"])
            found.append(pair)
        return max(found)[1]


RANDOM_NETS, PENALTIES = 3, (0.01, 0.1, 0.5)


def try_rules(folder: Path, args: argparse.Namespace) -> None:
    """Print a line per rule: r_mean, its deviations over sets and over models, seconds."""
    world = World.load(folder)
    backbones, ridge = args.backbones.split(","), args.judge == "ridge" and Ridge(world)
    args.seeds = 1 if ridge else args.seeds
    print("| rule | pairs | r_mean | over sets | over models | seconds |\n" + "| --- " * 6 + "|")
    for text in args.rules.split(","):
        began, found = time.monotonic(), []
        for seed in range(args.set_seeds):
            rows = choose(world, Rule.parse(text), args.pairs, seed)
            models = [(name, model) for model in range(args.seeds) for name in backbones]
            found.append(
                [ridge(rows)]
                if ridge
                else [recall(world, rows, name, model) for name, model in models]
            )
        by_model = np.reshape(found, (args.set_seeds, args.seeds, -1)).mean(axis=2)
        sets, models_std = by_model.mean(axis=1), by_model.std(axis=1).mean()
        seconds = time.monotonic() - began
        print(
            f"| {text} | {args.pairs} | {sets.mean():.1f} | {sets.std():.1f} | {models_std:.1f} | "
            f"{seconds:.0f} |",
            flush=True,
        )


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("embed", "try"))
    parser.add_argument("folder", type=Path)
    for name in ("source", "val", "test", "encoder", "features", "rules"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--backbones", default="small_conv")
    parser.add_argument("--judge", choices=("training", "ridge"), default="training")
    for name, value in (("size", 64), ("pairs", 100), ("set-seeds", 3), ("seeds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    {"embed": embed, "try": try_rules}[args.command](args.folder, args)


if __name__ == "__main__":
    main()
