"""Measure whether a decoded image finds its way back.

Prototypes are decoded, the images are embedded, and for each the nearest prototype is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass

import faiss
import open_clip
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own habit
from diffusers.pipelines.stable_diffusion.pipeline_stable_unclip_img2img import (
    StableUnCLIPImg2ImgPipeline,
)
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from transformers import CLIPTokenizer

from pds_ray.demo.data import CaptionedImages
from pds_ray.demo.train_clip import CaptionTokens, embed_captions, embed_images
from pds_ray.stages.products import nearest_rows

BATCH_SIZE = 50
KMEANS_ITERATIONS = 25


@dataclass(frozen=True)
class Decoding:
    """Options of the pipeline."""

    steps: int = 20
    guidance: float = 3.0
    noise_level: int = 0
    rescale: bool = False
    """Stretch a prototype to the mean norm of its members, which averaging has shrunk."""
    seed: int = 0


@dataclass(frozen=True)
class RoundTrip:
    """K decoded prototypes, as `report.contact_sheet` takes them."""

    images: list[Image.Image]
    prompts: list[str]
    hits: list[bool]
    """True if the prototype nearest to the image's embedding, by cosine, is its own."""

    @property
    def found(self) -> int:
        return sum(self.hits)

    @property
    def captions(self) -> list[str]:
        return [
            f"{'found' if hit else 'not found'}: {prompt}"
            for prompt, hit in zip(self.prompts, self.hits, strict=True)
        ]

    def __len__(self) -> int:
        return len(self.images)

    def image(self, pair: int) -> Image.Image:
        return self.images[pair]


@dataclass(frozen=True)
class Prototypes:
    """Means of the clusters of a k-means on raw image embeddings."""

    means: torch.Tensor
    """float32 [K, d]."""
    member_norms: torch.Tensor
    """float32 [K]: mean norm of the embeddings in each cluster."""
    prompts: list[str]
    """K captions: of all, the one nearest by cosine to the cluster's mean caption embedding."""


def find_prototypes(
    clip: open_clip.CLIP, tokenizer: CLIPTokenizer, data: CaptionedImages, count: int, seed: int = 0
) -> Prototypes:
    """Cluster a data set into `count` clusters and describe each."""
    images = embed_images(clip, data.pixels)
    kmeans = faiss.Kmeans(
        images.shape[1],
        count,
        niter=KMEANS_ITERATIONS,
        seed=seed,
        max_points_per_centroid=len(images),
    )
    kmeans.train(images.numpy())
    cluster = torch.from_numpy(kmeans.index.search(images.numpy(), 1)[1][:, 0])
    tokens = CaptionTokens(tokenizer, data)
    captions = [caption for group in data.captions for caption in group]
    texts = embed_captions(clip, tokens.ids)
    text_means = _means(texts, torch.repeat_interleave(cluster, tokens.counts), count)
    _, nearest = nearest_rows(text_means.numpy(), texts.numpy())
    return Prototypes(
        _means(images, cluster, count),
        _means(images.norm(dim=1, keepdim=True), cluster, count)[:, 0],
        [captions[row] for row in nearest.tolist()],
    )


def _means(rows: torch.Tensor, cluster: torch.Tensor, count: int) -> torch.Tensor:
    """Return the mean of the rows [N, d] of each of `count` clusters; an empty one has mean 0.

    cluster int64 [N].
    """
    sums = torch.zeros(count, rows.shape[1]).index_add_(0, cluster, rows)
    return sums / torch.bincount(cluster, minlength=count).clamp(min=1)[:, None]


def decode(
    pipeline: StableUnCLIPImg2ImgPipeline, prototypes: Prototypes, decoding: Decoding
) -> list[Image.Image]:
    """Decode each prototype to an image, by the call that real unCLIP checkpoints take too."""
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
    """Distil `data` into `count` prototypes, decode them, and count those that find their own."""
    prototypes = find_prototypes(clip, tokenizer, data, count)
    images = decode(pipeline, prototypes, decoding)
    return look_up(clip, prototypes, images)


def look_up(clip: open_clip.CLIP, prototypes: Prototypes, images: list[Image.Image]) -> RoundTrip:
    """Embed the K images and look up the prototype nearest to each."""
    embeddings = embed_images(clip, torch.stack([pil_to_tensor(image) for image in images]))
    _, nearest = nearest_rows(embeddings.numpy(), prototypes.means.numpy())
    hits = [row == own for own, row in enumerate(nearest.tolist())]
    return RoundTrip(images, prototypes.prompts, hits)
