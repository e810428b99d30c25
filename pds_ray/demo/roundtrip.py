"""Does a decoded picture find its way back? Decode prototypes, embed the pictures, look for the nearest prototype."""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import open_clip
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own habit
from diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img import (
    StableUnCLIPImg2ImgPipeline,
)
from PIL import Image, ImageDraw
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTokenizer

from pds_ray.demo.data import CaptionedImages
from pds_ray.demo.train_clip import CaptionTokens, embed_captions, embed_images

BATCH_SIZE = 50
KMEANS_ITERATIONS = 25


@dataclass(frozen=True)
class Decoding:
    """How the pipeline is asked to decode."""

    steps: int = 20
    guidance: float = 3.0
    noise_level: int = 0
    rescale: bool = False
    """Stretch a prototype to the mean norm of its members, which averaging has shrunk."""
    seed: int = 0


@dataclass(frozen=True)
class RoundTrip:
    """K decoded prototypes."""

    images: list[Image.Image]
    prompts: list[str]
    hits: list[bool]
    """Whether the picture's embedding has its own prototype as the nearest of all K, by cosine."""

    @property
    def found(self) -> int:
        return sum(self.hits)


@dataclass(frozen=True)
class Prototypes:
    """Means of the cells of a k-means on raw image embeddings."""

    means: torch.Tensor
    """float32 [K, d]."""
    member_norms: torch.Tensor
    """float32 [K]: mean norm of the embeddings in each cell."""
    prompts: list[str]
    """K captions: of all, the one nearest by cosine to the mean caption embedding of the cell."""


def find_prototypes(
    clip: open_clip.CLIP, tokenizer: CLIPTokenizer, data: CaptionedImages, count: int, seed: int = 0
) -> Prototypes:
    """Cluster a data set into `count` cells and describe each."""
    images = embed_images(clip, data.pixels)
    kmeans = faiss.Kmeans(
        images.shape[1],
        count,
        niter=KMEANS_ITERATIONS,
        seed=seed,
        max_points_per_centroid=len(images),
    )
    kmeans.train(images.numpy())
    cell = torch.from_numpy(kmeans.index.search(images.numpy(), 1)[1][:, 0])
    tokens = CaptionTokens(tokenizer, data)
    captions = [caption for group in data.captions for caption in group]
    texts = embed_captions(clip, tokens.ids)
    text_means = _means(texts, torch.repeat_interleave(cell, tokens.counts), count)
    nearest = (F.normalize(text_means, dim=1) @ F.normalize(texts, dim=1).T).argmax(1)
    return Prototypes(
        _means(images, cell, count),
        _means(images.norm(dim=1, keepdim=True), cell, count)[:, 0],
        [captions[i] for i in nearest.tolist()],
    )


def _means(rows: torch.Tensor, cell: torch.Tensor, count: int) -> torch.Tensor:
    """Mean of the rows [N, d] of each of `count` cells; cell int64 [N]. An empty cell has mean 0."""
    sums = torch.zeros(count, rows.shape[1]).index_add_(0, cell, rows)
    return sums / torch.bincount(cell, minlength=count).clamp(min=1)[:, None]


def decode(
    pipeline: StableUnCLIPImg2ImgPipeline, prototypes: Prototypes, decoding: Decoding
) -> list[Image.Image]:
    """One picture for each prototype, by the call that real unCLIP checkpoints take too."""
    embeds = prototypes.means
    if decoding.rescale:
        embeds = F.normalize(embeds, dim=1) * prototypes.member_norms[:, None]
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(embeds), BATCH_SIZE):
        prompts = prototypes.prompts[start : start + BATCH_SIZE]
        images += pipeline(
            prompt=prompts,
            image_embeds=embeds[start : start + BATCH_SIZE].to(pipeline.device, pipeline.dtype),
            num_inference_steps=decoding.steps,
            guidance_scale=decoding.guidance,
            noise_level=decoding.noise_level,
            generator=[
                torch.Generator().manual_seed(decoding.seed + start + i)
                for i in range(len(prompts))
            ],
        ).images
    return images


def measure_round_trip(
    pipeline: StableUnCLIPImg2ImgPipeline,
    clip: open_clip.CLIP,
    tokenizer: CLIPTokenizer,
    data: CaptionedImages,
    count: int,
    decoding: Decoding,
) -> RoundTrip:
    """Distil `data` into `count` prototypes, decode them, and count the pictures that are nearest to their own."""
    prototypes = find_prototypes(clip, tokenizer, data, count)
    images = decode(pipeline, prototypes, decoding)
    return judge(clip, prototypes, images)


def judge(clip: open_clip.CLIP, prototypes: Prototypes, images: list[Image.Image]) -> RoundTrip:
    """Embed the K pictures and look up the prototype nearest to each."""
    embeddings = embed_images(clip, torch.stack([pil_to_tensor(image) for image in images]))
    similarity = F.normalize(embeddings, dim=1) @ F.normalize(prototypes.means, dim=1).T
    hits = similarity.argmax(1) == torch.arange(len(images))
    return RoundTrip(images, prototypes.prompts, hits.tolist())


def contact_sheet(result: RoundTrip, columns: int = 10, side: int = 128) -> Image.Image:
    """All pictures in rows, enlarged without smoothing, each framed green if it found its prototype, else red."""
    rows = -(-len(result.images) // columns)
    sheet = Image.new("RGB", (columns * side, rows * side))
    brush = ImageDraw.Draw(sheet)
    for i, (image, hit) in enumerate(zip(result.images, result.hits, strict=True)):
        x, y = i % columns * side, i // columns * side
        sheet.paste(image.resize((side - 6, side - 6), Image.Resampling.NEAREST), (x + 3, y + 3))
        brush.rectangle(
            (x, y, x + side - 1, y + side - 1), outline="lime" if hit else "red", width=3
        )
    return sheet
