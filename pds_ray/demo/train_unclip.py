"""Train a small unCLIP for a CLIP and write it as a diffusers `StableUnCLIPImg2ImgPipeline` folder.

python -m pds_ray.demo.train_unclip --clip runs/clip --source scenes:50000:1 --out runs/unclip
--evaluate

First the VAE, then, on its latents, the UNet. Run the same command again to go on after an
interruption; more `--unet-steps` than before train further.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import faiss
import open_clip
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own habit
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img import (
    StableUnCLIPImg2ImgPipeline,
)
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
    StableUnCLIPImageNormalizer,
)
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPTokenizer

from pds_ray.demo.convert import convert_image_tower, convert_text_tower
from pds_ray.demo.data import CaptionedImages, load_captioned_images, to_signed
from pds_ray.demo.roundtrip import Decoding, measure_round_trip
from pds_ray.demo.train_clip import CaptionTokens, embed_images, tokenize
from pds_ray.demo.training import Schedule, TrainingError, train
from pds_ray.errors import UserError, first_line
from pds_ray.report.contact_sheet import contact_sheet
from pds_ray.telemetry.progress import progress_bar

KL_WEIGHT = 1e-4
SQUARE_WEIGHT = 2.0
EDGE_WEIGHT = 1.0
LATENT_NOISE = 0.05
"""The noise, on latents with variance 1, on which the decoder is trained alone."""
SNR_CAP = 5.0
"""Min-SNR weighting: nearly noise-free steps count no more than this signal-to-noise ratio."""
DROP_ALL = 0.1
"""Share of samples trained without any condition, for guidance."""
DROP_PROMPT = 0.2
"""Share of samples trained with an empty prompt, so that the embedding alone is enough."""
CELL_MEMBERS = (400, 100, 25)
"""Mean sizes of the k-means cells over whose means the UNet also learns to decode."""
CELL_SHARE = 0.5
"""Share of samples whose condition is the mean of a cell they belong to instead of their own
embedding.
"""
NORM_GROUPS = 8
NOISE_LEVELS = 1000


@dataclass(frozen=True)
class Clip:
    """A trained CLIP, read from an open_clip folder."""

    model: open_clip.CLIP
    config: dict
    tokenizer: CLIPTokenizer
    sha256: str

    @property
    def dim(self) -> int:
        return self.config["embed_dim"]

    @property
    def image_size(self) -> int:
        return self.config["vision_cfg"]["image_size"]


def load_clip(folder: Path, device: str) -> Clip:
    """Load an open_clip folder. Raises TrainingError if it is not one."""
    weights = folder / "open_clip_model.safetensors"
    if not weights.is_file():
        raise TrainingError(
            f"--clip {folder}: no {weights.name} in it; train_clip writes such a folder"
        )
    return Clip(
        open_clip.create_model(f"local-dir:{folder}", device=device).eval().requires_grad_(False),
        json.loads((folder / "open_clip_config.json").read_text())["model_cfg"],
        CLIPTokenizer.from_pretrained(folder),
        hashlib.sha256(weights.read_bytes()).hexdigest(),
    )


def make_vae(image_size: int, channels: Sequence[int], latent_channels: int) -> AutoencoderKL:
    """Return a plain convolutional VAE; each of `channels` but the first halves the sides."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=tuple(channels),
        latent_channels=latent_channels,
        norm_num_groups=NORM_GROUPS,
        sample_size=image_size,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def painting_loss(painted: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return L1 and L2 on pixels, plus L1 on edges. float32 [B, 3, S, S] twice -> scalar.

    Edges are differences to the right and lower neighbours.
    """
    error = painted.float() - target
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + SQUARE_WEIGHT * error.square().mean() + EDGE_WEIGHT * edges


def _schedule(args: argparse.Namespace, steps: int, learning_rate: float) -> Schedule:
    return Schedule(steps, learning_rate, checkpoint_every=args.checkpoint_every, seed=args.seed)


def train_vae(
    vae: AutoencoderKL, pixels: torch.Tensor, args: argparse.Namespace, settings: dict
) -> None:
    """Train encoder and decoder together, with a slight pull of the latents to N(0, 1)."""
    device = torch.device(args.device)
    vae.train()

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(pixels), (args.vae_batch_size,), generator=generator)
        target = to_signed(pixels[rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            painted = vae.decode(posterior.mean + posterior.std * noise).sample
        pull = posterior.kl().mean() / posterior.mean[0].numel()
        return painting_loss(painted, target) + KL_WEIGHT * pull

    schedule = _schedule(args, args.vae_steps, args.vae_learning_rate)
    train("train VAE", vae, loss, schedule, args.out / "checkpoint" / "vae", settings)


def train_decoder(
    vae: AutoencoderKL,
    pixels: torch.Tensor,
    latents: torch.Tensor,
    args: argparse.Namespace,
    settings: dict,
) -> None:
    """Train the decoder alone, on slightly noisy latents such as the UNet makes.

    The latents, hence the UNet, stay valid.
    """
    device = torch.device(args.device)

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(pixels), (args.vae_batch_size,), generator=generator)
        noise = torch.randn(latents[rows].shape, generator=generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            painted = vae.decode((latents[rows] + LATENT_NOISE * noise).to(device)).sample
        return painting_loss(painted, to_signed(pixels[rows]).to(device))

    schedule = _schedule(args, args.decoder_steps, args.vae_learning_rate)
    train(
        "train decoder",
        vae.decoder,
        loss,
        schedule,
        args.out / "checkpoint" / "decoder",
        settings,
    )


@torch.inference_mode()
def encode_latents(vae: AutoencoderKL, pixels: torch.Tensor, batch_size: int = 250) -> torch.Tensor:
    """Return means of latents: uint8 [N, 3, S, S] -> float32 [N, C, S/f, S/f] on the CPU."""
    parts = []
    with progress_bar("encode", len(pixels), "images") as bar:
        for part in pixels.split(batch_size):
            with torch.autocast(vae.device.type, torch.bfloat16):
                parts.append(
                    vae.encode(to_signed(part).to(vae.device)).latent_dist.mean.float().cpu()
                )
            bar.update(len(part))
    return torch.cat(parts)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Give every latent channel mean 0 and variance 1 by a change of the VAE's 1x1 convolutions.

    Takes and returns latents [N, C, h, w]: those of the VAE before and after.
    """
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    shift, scale = mean.to(vae.device), std.to(vae.device)
    channels = len(mean)
    out: Any = vae.quant_conv
    back: Any = vae.post_quant_conv
    back.bias += back.weight[:, :, 0, 0] @ shift
    back.weight *= scale[None, :, None, None]
    out.weight[:channels] /= scale[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - shift) / scale
    out.bias[channels:] -= 2 * scale.log()  # the second half are log variances
    return (latents - mean[None, :, None, None]) / std[None, :, None, None]


def make_unet(
    clip: Clip, latent_shape: torch.Size, channels: Sequence[int]
) -> UNet2DConditionModel:
    """Return a UNet like that of Stable Diffusion unCLIP, for latents [C, h, h].

    Captions enter by attention, the embedding as a class label.
    """
    return UNet2DConditionModel(
        sample_size=latent_shape[-1],
        in_channels=latent_shape[0],
        out_channels=latent_shape[0],
        # Attention costs most at full size and is needed least there.
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * (len(channels) - 1)),
        up_block_types=(*("CrossAttnUpBlock2D",) * (len(channels) - 1), "UpBlock2D"),
        block_out_channels=tuple(channels),
        layers_per_block=1,
        # diffusers takes this as the number of heads
        attention_head_dim=[width // 64 for width in channels],
        cross_attention_dim=clip.config["text_cfg"]["width"],
        class_embed_type="projection",
        projection_class_embeddings_input_dim=2 * clip.dim,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=NORM_GROUPS,
    )


def make_schedulers() -> tuple[Any, Any]:  # diffusers' annotations contradict each other here
    """Return DDIM for the diffusion of images and DDPM for the noise of embeddings.

    Both are cosine schedules, which end in pure noise.
    """
    shape: Any = {
        "num_train_timesteps": NOISE_LEVELS,
        "beta_schedule": "squaredcos_cap_v2",
        "clip_sample": False,
    }
    return (
        DDIMScheduler(**shape, prediction_type="v_prediction", timestep_spacing="trailing"),
        DDPMScheduler(**shape),
    )


def make_normalizer(embeddings: torch.Tensor) -> StableUnCLIPImageNormalizer:
    """Return the statistics by which the pipeline standardises embeddings [N, d] before noise."""
    normalizer = StableUnCLIPImageNormalizer(embeddings.shape[1])
    normalizer.mean.data = embeddings.mean(0, keepdim=True)
    normalizer.std.data = embeddings.std(0, keepdim=True)
    return normalizer


def cell_means(embeddings: torch.Tensor, members: Sequence[int], seed: int) -> torch.Tensor:
    """Cluster embeddings [N, d] by k-means, coarsely to finely, `members` per cell on average.

    Returns [len(members), N, d]: for each clustering and row the mean of the cell that the row is
    in. The decoder will be asked for images of such means, so it learns on them.
    """
    means = []
    rows = embeddings.numpy()
    for size in members:
        kmeans = faiss.Kmeans(
            rows.shape[1], max(1, len(rows) // size), niter=15, seed=seed, min_points_per_centroid=1
        )
        kmeans.train(rows)
        centroids: Any = kmeans.centroids
        means.append(torch.from_numpy(centroids[kmeans.index.search(rows, 1)[1][:, 0]]))
    return torch.stack(means)


def add_embedding_noise(
    embeddings: torch.Tensor,
    levels: torch.Tensor,
    noise: torch.Tensor,
    normalizer: StableUnCLIPImageNormalizer,
    scheduler: Any,
) -> torch.Tensor:
    """Add noise as the pipeline's `noise_image_embeddings` does, with a level for each row.

    [B, d], levels int64 [B] -> [B, 2 d].
    """
    noisy = normalizer.unscale(scheduler.add_noise(normalizer.scale(embeddings), noise, levels))
    return torch.cat([noisy, get_timestep_embedding(levels, embeddings.shape[1], True, 0)], dim=1)


@dataclass(frozen=True)
class Conditions:
    """The captions, and the embeddings of images or of their cells, that a UNet is trained on."""

    choices: torch.Tensor
    """float32 [1 + cells, N, d]: the own embedding of each image, then the means of its cells."""
    tokens: CaptionTokens
    empty: torch.Tensor
    """The ids of the empty prompt, [1, context length]."""
    normalizer: StableUnCLIPImageNormalizer
    noising: Any

    def draw(
        self, rows: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw for the images `rows` [B]: time steps, int64 [B], labels [B, 2 d] and ids."""
        times, levels, use_cell, which, dropped = torch.rand(5, len(rows), generator=generator)
        which = torch.where(use_cell < CELL_SHARE, 1 + (which * len(CELL_MEMBERS)).long(), 0)
        levels = (levels**4 * NOISE_LEVELS).long()  # half of them below 63
        own = self.choices[which, rows]
        noise = torch.randn(own.shape, generator=generator)
        label = add_embedding_noise(own, levels, noise, self.normalizer, self.noising)
        label[dropped < DROP_ALL] = 0
        without_prompt = (dropped < DROP_ALL + DROP_PROMPT)[:, None]
        ids = torch.where(without_prompt, self.empty, self.tokens.draw(rows, generator))
        return (times * NOISE_LEVELS).long(), label, ids


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    clip: Clip,
    latents: torch.Tensor,
    embeddings: torch.Tensor,
    tokens: CaptionTokens,
    args: argparse.Namespace,
    settings: dict,
) -> None:
    """Train v-prediction on latents [N, C, h, h].

    The conditions are a caption and the embedding [N, d] of the image, or of its cell.
    """
    device = torch.device(args.device)
    scheduler, noising = make_schedulers()
    signal = scheduler.alphas_cumprod
    snr = signal / (1 - signal)
    loss_weight = snr.clamp(max=SNR_CAP) / (snr + 1)
    conditions = Conditions(
        torch.cat([embeddings[None], cell_means(embeddings, CELL_MEMBERS, args.seed)]),
        tokens,
        tokenize(clip.tokenizer, [""]),
        make_normalizer(embeddings).requires_grad_(False),
        noising,
    )
    unet.train()

    def loss(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (args.batch_size,), generator=generator)
        times, label, ids = conditions.draw(rows, generator)
        clean = latents[rows]
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, times).to(device)
        target = scheduler.get_velocity(clean, noise, times).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            with torch.no_grad():
                states = text_encoder(ids.to(device))[0]
            guess = unet(noisy, times.to(device), states, class_labels=label.to(device)).sample
        error = F.mse_loss(guess.float(), target, reduction="none").mean((1, 2, 3))
        return (loss_weight[times].to(device) * error).mean()

    schedule = _schedule(args, args.unet_steps, args.unet_learning_rate)
    train("train UNet", unet, loss, schedule, args.out / "checkpoint" / "unet", settings)


def make_pipeline(
    clip: Clip, vae: AutoencoderKL, unet: UNet2DConditionModel, embeddings: torch.Tensor
) -> StableUnCLIPImg2ImgPipeline:
    """Put the parts together; `embeddings` [N, d] give the statistics of the normaliser."""
    scheduler, noising = make_schedulers()
    size = clip.image_size
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=CLIPImageProcessor(
            size={"shortest_edge": size},
            crop_size={"height": size, "width": size},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        ),
        image_encoder=convert_image_tower(clip.model, clip.config),
        image_normalizer=make_normalizer(embeddings),
        image_noising_scheduler=noising,
        tokenizer=clip.tokenizer,
        text_encoder=convert_text_tower(clip.model, clip.config, clip.tokenizer),
        unet=unet.eval(),
        scheduler=scheduler,
        vae=vae.eval(),
    )


def save_pipeline(folder: Path, pipeline: StableUnCLIPImg2ImgPipeline, clip: Clip) -> None:
    """Write the folder, and the CLIP whose embeddings the decoder takes.

    UNet and VAE are left in half precision, as they are stored.
    """
    for part in (pipeline.unet, pipeline.vae):
        for parameter in part.parameters():
            parameter.data = parameter.data.half()
    pipeline.save_pretrained(folder)
    (folder / "pds_ray.json").write_text(
        json.dumps({"space": clip.sha256, "dim": clip.dim}, indent=2) + "\n"
    )


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train a small unCLIP and write it as a diffusers folder."
    )
    add = parser.add_argument
    add(
        "--clip",
        type=Path,
        required=True,
        help="open_clip folder whose embeddings are to be decoded",
    )
    add("--source", default="scenes:50000:1", help="what to train on (default %(default)s)")
    add(
        "--out",
        type=Path,
        required=True,
        help="folder of the result and, in checkpoint/, of the state to resume",
    )
    add(
        "--start",
        type=Path,
        metavar="FOLDER",
        help="go on from the VAE and UNet of this pipeline folder; of the VAE only the decoder is "
        "trained",
    )
    add(
        "--vae-channels",
        type=int,
        nargs="+",
        default=[16, 32, 64, 64],
        help="multiples of 8; all but one halve sides",
    )
    add("--latent-channels", type=int, default=8)
    add("--vae-steps", type=int, default=1500)
    add("--decoder-steps", type=int, default=300, help="of the VAE's decoder alone, at the end")
    add("--vae-batch-size", type=int, default=32)
    add("--vae-learning-rate", type=float, default=2e-3)
    add(
        "--unet-channels",
        type=int,
        nargs="+",
        default=[64, 128],
        help="multiples of 64; all but one halve sides",
    )
    add("--unet-steps", type=int, default=3600)
    add("--batch-size", type=int, default=64, help="of the UNet")
    add("--unet-learning-rate", type=float, default=1e-3)
    add("--checkpoint-every", type=int, default=500, help="steps")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="of VAE and UNet in training")
    add(
        "--evaluate",
        metavar="SOURCE",
        nargs="?",
        const="scenes:10000:3",
        help="measure the round trip on this source",
    )
    add("--prototypes", type=int, default=100, help="how many the round trip decodes")
    return parser.parse_args(argv)


def _start(args: argparse.Namespace, kind: type[Any], part: str) -> Any:
    """Return a part of the pipeline that the training goes on from; None if there is none.

    Raises TrainingError if the folder does not hold it.
    """
    if not args.start:
        return None
    try:
        return kind.from_pretrained(args.start / part, torch_dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TrainingError(
            f"--start {args.start}: no {part} in it ({first_line(error)})"
        ) from None


def fit(args: argparse.Namespace, clip: Clip, data: CaptionedImages) -> StableUnCLIPImg2ImgPipeline:
    """Train both models (or take them up where they were left) and put the pipeline together."""
    torch.manual_seed(args.seed)
    vae = _start(args, AutoencoderKL, "vae") or make_vae(
        clip.image_size, args.vae_channels, args.latent_channels
    )
    vae = vae.to(args.device)
    settings = {
        "source": args.source,
        "seed": args.seed,
        "vae_channels": args.vae_channels,
        "latents": vae.config.latent_channels,
    }
    if args.start:
        settings |= {"start": str(args.start)}
    else:
        train_vae(vae, data.pixels, args, settings | {"batch_size": args.vae_batch_size})
    latents = standardise_latents(vae, encode_latents(vae, data.pixels))
    embeddings = embed_images(clip.model, data.pixels)
    torch.manual_seed(args.seed)
    unet = _start(args, UNet2DConditionModel, "unet") or make_unet(
        clip, latents.shape[1:], args.unet_channels
    )
    unet = unet.to(args.device)
    text_encoder = (
        convert_text_tower(clip.model, clip.config, clip.tokenizer)
        .to(args.device)
        .requires_grad_(False)
    )
    settings |= {
        "clip": clip.sha256,
        "unet_channels": args.unet_channels,
        "batch_size": args.batch_size,
    }
    tokens = CaptionTokens(clip.tokenizer, data)
    train_unet(unet, text_encoder, clip, latents, embeddings, tokens, args, settings)
    train_decoder(vae, data.pixels, latents, args, settings)
    return make_pipeline(clip, vae, unet, embeddings)


def run(args: argparse.Namespace) -> dict[str, float]:
    """Train, write, and measure if asked to. Returns the metrics."""
    clip = load_clip(args.clip, args.device)
    pipeline = fit(args, clip, load_captioned_images(args.source, clip.image_size))
    metrics: dict[str, float] = {
        "vae_steps": 0 if args.start else args.vae_steps,
        "decoder_steps": args.decoder_steps,
        "unet_steps": args.unet_steps,
        "unet_parameters": sum(p.numel() for p in pipeline.unet.parameters()),
        "vae_parameters": sum(p.numel() for p in pipeline.vae.parameters()),
    }
    save_pipeline(args.out, pipeline, clip)
    if args.evaluate:
        saved = StableUnCLIPImg2ImgPipeline.from_pretrained(args.out, dtype=torch.float32).to(
            args.device
        )
        holdout = load_captioned_images(args.evaluate, clip.image_size)
        decoding = Decoding()
        result = measure_round_trip(
            saved, clip.model, clip.tokenizer, holdout, args.prototypes, decoding
        )
        metrics |= {"found": result.found, "prototypes": args.prototypes, **asdict(decoding)}
        contact_sheet(result).save(args.out / "checkpoint" / "contact_sheet.png")
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    return metrics


def main(argv: list[str] | None = None) -> int:
    try:
        metrics = run(parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if "found" in metrics:
        print(
            f"round trip: {metrics['found']} of {metrics['prototypes']} images "
            "find their own prototype"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
