"""Measure on a GPU: `python -m benchmarks.gpu [--json FILE] [--only PART,...] [--quick]`.

| part | measured | target |
| --- | --- | --- |
| ceiling | bf16 matrix products, the best of some sizes | |
| encoder | ViT-L-14 on pixels in memory, engine and bare model | 0.6 of the ceiling at best |
| engine | the embedding stage with JPEG decode in front | GPU idle under 10 % with 16 cores |
| kmeans | the fit: FAISS on the GPU, FAISS on the CPUs, and that over all nodes | |
| products | labels and nearest rows of a shard, 1,000 to 100,000 clusters | the CPU's answers |
| unclip | size of SD 2.1 unCLIP: batched bf16 against one by one fp16 | 3x at equal steps |
| evaluation | one trial of a timm model trained on 100 pairs | |

Weights are random, so no network is needed: the computation costs the same. FLOPs are counted by
torch, 2 per multiplication with addition. Rates are medians of --repeats.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import Concepts, save_random_clip, write_shards
from benchmarks.measure import GIB, Found, peak_rss
from benchmarks.results import machine
from pds_ray.store.manifest import versions

MODEL = "ViT-L-14"
PIXELS, TOKENS = 224, 77
BATCHES = (64, 128, 256, 512, 1024)
UNCLIP_STEPS, UNCLIP_BATCHES = 20, (4, 8, 16)
JPEG_SIDES = (500, 375)


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of `work` on the GPU, after a first call that does not count."""
    import torch

    found = []
    for repeat in range(repeats + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if repeat:
            found.append(time.perf_counter() - began)
    return statistics.median(found)


def ceiling(repeats: int, quick: bool) -> Found:
    """Measure TFLOP/s of bf16 products of square matrices."""
    import torch

    rates = {}
    for side in (1024,) if quick else (4096, 8192, 16384):
        a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b) -> None:
            for _ in range(10):
                a @ b

        rates[side] = 10 * 2 * side**3 / seconds_of(multiply, repeats) / 1e12
    return {"tflops": max(rates.values()), "of_side": rates}


def _flops(work: Callable[[], object]) -> int:
    """Count FLOPs with gradients on: without them attention takes a fused path without counts."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def encoder(repeats: int, quick: bool) -> Found:
    """Measure images and captions per second, and their share of the ceiling.

    `engine`: the call of an embedding worker, from uint8 images in host memory to float32
    embeddings there. `plain`, `channels_last`, `compiled`: the image tower alone in bf16 on pixels
    on the GPU. `overlapped`: the compiled one, fed from pinned memory while the batch before is
    computed.
    """
    import torch

    from pds_ray import catalog
    from pds_ray.config import EmbedConfig

    top = ceiling(repeats, quick)["tflops"] * 1e12
    with tempfile.TemporaryDirectory() as folder:
        info = catalog.describe_encoder(
            EmbedConfig(encoder=save_random_clip(MODEL, Path(folder) / "clip"))
        )
        loaded: Any = catalog.load_encoder(info, "bf16")
    model = loaded.model
    one = torch.zeros(1, 3, PIXELS, PIXELS, device="cuda")
    of_image = _flops(lambda: model.encode_image(one))
    of_caption = _flops(
        lambda: model.encode_text(torch.zeros(1, TOKENS, dtype=torch.long, device="cuda"))
    )
    forms: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "plain": model.encode_image,
        "channels_last": lambda pixels: model.encode_image(
            pixels.contiguous(memory_format=torch.channels_last)
        ),
        "compiled": torch.compile(
            model.encode_image, mode="max-autotune-no-cudagraphs", dynamic=False
        ),
    }
    rows: list[dict[str, Any]] = []
    for batch in (16,) if quick else BATCHES:
        host = np.random.default_rng(0).integers(0, 256, (batch, PIXELS, PIXELS, 3), np.uint8)
        captions = ["a photo of a dog on the beach"] * batch
        rates = {
            "engine": batch / seconds_of(partial(loaded.encode_images, host), repeats),
            "captions": batch / seconds_of(partial(loaded.encode_captions, captions), repeats),
        }
        pixels = torch.randn(batch, 3, PIXELS, PIXELS, device="cuda")
        for name, form in forms.items():
            rates[name] = batch / seconds_of(partial(_bf16, form, pixels), repeats)
        rates["overlapped"] = _overlapped(forms["compiled"], host, repeats)
        shares = {
            name: rate * (of_caption if name == "captions" else of_image) / top
            for name, rate in rates.items()
        }
        rows.append({"batch": batch, "per_second": rates, "share_of_ceiling": shares})
    best = max(rows, key=lambda row: row["per_second"]["engine"])
    return {
        "flops": {"image": of_image, "caption": of_caption},
        "batches": rows,
        "best_batch": best["batch"],
        "reached": best["share_of_ceiling"]["engine"] >= 0.6,
        "gpu_hours_per_million_pairs": _hours(
            1 / best["per_second"]["engine"] + 1 / best["per_second"]["captions"], 1e6
        ),
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def _bf16(form: Callable[[Any], Any], pixels: Any) -> Any:
    import torch

    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        return form(pixels)


def _overlapped(
    form: Callable[[Any], Any], host: np.ndarray, repeats: int, rounds: int = 8
) -> float:
    """Measure images per second with copies from pinned memory on a stream of their own."""
    import torch

    pinned = torch.from_numpy(host).pin_memory()
    copies = torch.cuda.Stream()

    def fetch() -> torch.Tensor:
        with torch.cuda.stream(copies):
            return pinned.to("cuda", non_blocking=True)

    def work() -> None:
        coming = fetch()
        for _ in range(rounds):
            torch.cuda.current_stream().wait_stream(copies)
            now = coming
            now.record_stream(torch.cuda.current_stream())
            coming = fetch()
            _bf16(form, now.permute(0, 3, 1, 2).float().div_(255))

    return rounds * len(host) / seconds_of(work, repeats)


def _hours(seconds_each: float, things: float) -> float:
    """Return the GPU-hours of many things: seconds_each * things / 3600."""
    return seconds_each * things / 3600


def engine(repeats: int, quick: bool) -> Found:
    """Measure the embedding stage on a local Ray: images per second, and the GPU's idle share."""
    from PIL import Image

    from benchmarks.rows.embedding import embed_with_engine

    rng = np.random.default_rng(0)

    def jpegs() -> list[bytes]:
        """Make distinct images of 500 x 375, as hard to decode as photographs."""
        made = []
        for _ in range(16 if quick else 256):
            coarse = rng.integers(0, 256, (48, 64, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(coarse).resize(JPEG_SIDES, Image.Resampling.BICUBIC).save(
                file, "JPEG", quality=90
            )
            made.append(file.getvalue())
        return made

    count, per_shard = (32, 16) if quick else (40_000, 2_000)
    pool = jpegs()
    samples = (
        {"jpg": pool[row % len(pool)], "txt": b"a photo of a dog on the beach"}
        for row in range(count)
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_shards(samples, Path(folder) / "shards", per_shard)
        name = save_random_clip(MODEL, Path(folder) / "clip")
        for repeat in range(repeats):
            found.append(
                embed_with_engine(f"{folder}/shards/*.tar", name, Path(folder) / f"store-{repeat}")
            )
    idle = statistics.median(one["idle"] for one in found)
    rate = count / statistics.median(one["seconds"] for one in found)
    return {
        "images_per_second": rate,
        "idle": idle,
        "reached": idle < 0.1,
        "cores": os.cpu_count(),
        "gpu_hours_per_million_pairs": _hours(1 / rate, 1e6),
        "runs": found,
    }


def kmeans(repeats: int, quick: bool) -> Found:
    """Measure the engine's k-means: FAISS on the GPU, if it was built for one, and on all CPUs.

    `distributed` is the one over all nodes, with its products on the GPU of this one.
    """
    import faiss

    from benchmarks.solvers import shared_out
    from pds_ray.config import ClusterConfig
    from pds_ray.stages.cluster import fit

    rows, clusters = (5_000, 20) if quick else (145_000, 500)
    concepts = Concepts(768, seed=0)
    vectors, weights = concepts.vectors(concepts.draw(rows)), np.ones(rows, np.float32)
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    found: Found = {"faiss_gpus": gpus}

    def measure(name: str) -> None:
        seconds, objectives = [], []
        for _ in range(repeats):
            began = time.perf_counter()
            objectives.append(fit(vectors, weights, clusters, 0, ClusterConfig()).objective / rows)
            seconds.append(time.perf_counter() - began)
        found[name] = {"seconds": statistics.median(seconds), "objective": objectives[0]}

    if gpus:
        few = slice(50 * clusters)
        fit(vectors[few], weights[few], clusters, 0, ClusterConfig())  # CUDA starts
        measure("gpu")
        asked, faiss.get_num_gpus = faiss.get_num_gpus, lambda: 0
        measure("cpu")
        faiss.get_num_gpus = asked
        found["factor"] = found["cpu"]["seconds"] / found["gpu"]["seconds"]
    else:
        measure("cpu")
    shares = [shared_out(vectors, clusters, ClusterConfig()) for _ in range(repeats)]
    found["distributed"] = {
        "seconds": statistics.median(share["seconds"] for share in shares),
        "objective": shares[0]["objective"],
    }
    return found


def products(repeats: int, quick: bool) -> Found:
    """Measure labels and nearest rows of one shard; the side that stays is prepared before.

    `share`: of the ceiling, by the FLOPs of one product of all pairs.
    """
    from pds_ray.stages import products as core

    top = ceiling(repeats, quick)["tflops"]
    rows = 500 if quick else 10_000
    concepts = Concepts(768, seed=0)
    vectors = concepts.vectors(concepts.draw(rows))
    found: Found = {}
    for clusters in (50, 100) if quick else (1_000, 10_000, 100_000):
        centres = concepts.vectors(concepts.draw(clusters))
        centroids = core.as_centroids(centres, "cuda")
        queries = core.as_queries(centres, "cuda")
        if clusters <= 1_000:
            same = [
                np.array_equal(core.assign(vectors, centroids), core.assign(vectors, centres)),
                *map(
                    np.array_equal,
                    core.nearest_rows(queries, vectors),
                    core.nearest_rows(centres, vectors),
                ),
            ]
            found["same_as_cpu"] = all(same)
        works: dict[str, Callable[[], object]] = {
            "labels": partial(core.assign, vectors, centroids),
            "nearest": partial(core.nearest_rows, queries, vectors),
        }
        for name, work in works.items():
            seconds = seconds_of(work, repeats)
            tflops = 2 * rows * clusters * 768 / seconds / 1e12
            found[f"{name}_{clusters}"] = {
                "seconds": seconds,
                "tflops": tflops,
                "share": tflops / top,
            }
    return found


def _sd21_unclip(quick: bool) -> Any:
    """Build stable-diffusion-2-1-unclip-small with random weights and a tokenizer of letters."""
    import diffusers
    import transformers
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import (
        StableUnCLIPImageNormalizer,
    )

    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    words = ["<|startoftext|>", "<|endoftext|>", *letters]
    width, layers, channels, heads = (
        (32, 1, (32, 64), (2, 4)) if quick else (1024, 23, (320, 640, 1280, 1280), (5, 10, 20, 20))
    )
    blocks = len(channels) - 1
    text = transformers.CLIPTextConfig(
        vocab_size=49_408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if quick else 16,
        hidden_act="gelu",
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        projection_dim=768,
    )  # never called: embeddings are given
    pipeline: Any = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=transformers.CLIPImageProcessor(),
        image_encoder=transformers.CLIPVisionModelWithProjection(vision),
        image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=768),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        tokenizer=transformers.CLIPTokenizer(
            vocab={word: number for number, word in enumerate(words)},
            merges=[],
            model_max_length=TOKENS,
        ),
        text_encoder=transformers.CLIPTextModel(text),
        unet=diffusers.UNet2DConditionModel(
            sample_size=8 if quick else 96,
            block_out_channels=channels,
            down_block_types=("CrossAttnDownBlock2D",) * blocks + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * blocks,
            attention_head_dim=heads,
            cross_attention_dim=width,
            use_linear_projection=True,
            class_embed_type="projection",
            projection_class_embeddings_input_dim=2 * 768,
        ),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(32, 32, 32, 32) if quick else (128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=768,
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def unclip(repeats: int, quick: bool) -> Found:
    """Measure images per second at 768 pixels, guidance 5.

    The authors' way, one by one in fp16, is compared with batches in bf16. Latents become pixels
    one image at a time in both: batches of them outgrow 32-bit indices.
    """
    import torch

    pipeline = _sd21_unclip(quick)
    steps, batches, single = (2, (2,), 1) if quick else (UNCLIP_STEPS, UNCLIP_BATCHES, 4)

    def decode(count: int) -> None:
        pipeline(
            prompt=["a dog on the beach"] * count,
            negative_prompt=["text, watermark"] * count,
            image_embeds=torch.randn(count, 768, device="cuda", dtype=pipeline.unet.dtype),
            num_inference_steps=steps,
            guidance_scale=5.0,
            noise_level=10,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in range(count)],
        )

    def one_by_one() -> None:
        for _ in range(single):
            decode(1)

    pipeline.to("cuda", torch.float16)
    slow = single / seconds_of(one_by_one, repeats)
    pipeline.to("cuda", torch.bfloat16)
    batched = {count: count / seconds_of(partial(decode, count), repeats) for count in batches}
    fastest = max(batched.values())
    return {
        "steps": steps,
        "one_by_one_fp16": slow,
        "batched_bf16": batched,
        "factor": fastest / slow,
        "reached": fastest / slow >= 3,
        "gpu_hours_per_thousand_images_of_100_steps": _hours(100 / steps / fastest, 1e3),
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / GIB,
    }


def evaluation(repeats: int, quick: bool) -> Found:
    """Measure a trial: 100 random pairs at 224 pixels, everything trained, 1,000 test images."""
    import torch

    from pds_ray import catalog
    from pds_ray.config import replace
    from pds_ray.recipes import protocol
    from pds_ray.stages.trial import TextInput, Trial, TrialData, run_trial
    from pds_ray.training.data import Gallery, TrainingPairs
    from pds_ray.training.workers import Workers

    images = 20 if quick else 1_000
    draw = torch.Generator().manual_seed(0)

    def random_images(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (count, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=draw)

    pairs = TrainingPairs(random_images(100), torch.randn(100, 768, generator=draw))
    owner = torch.arange(images).repeat_interleave(5)
    test = Gallery(random_images(images), torch.randn(len(owner), 768, generator=draw), owner)
    epochs = 2 if quick else 100
    settings = replace(
        protocol("standard"), {"protocol.epochs": epochs, "protocol.select": "last"}
    ).protocol
    backbone = catalog.describe_backbone("nf_resnet50:scratch")
    trial = Trial("", "", backbone, PIXELS, 0, settings, TextInput("prototypes", "", "basic"), 100)

    def work() -> None:
        workers = Workers(device=torch.device("cuda"))
        run_trial(trial, TrialData(pairs, None, test), catalog.build_backbone, workers)

    return {"seconds": seconds_of(work, repeats), "backbone": backbone.name, "epochs": epochs}


PARTS: dict[str, Callable[[int, bool], Found]] = {
    "ceiling": ceiling,
    "encoder": encoder,
    "engine": engine,
    "kmeans": kmeans,
    "products": products,
    "unclip": unclip,
    "evaluation": evaluation,
}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure on a GPU."
    )
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"parts by comma, of {', '.join(PARTS)}"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes: a test that it works, its figures say nothing",
    )
    parser.add_argument(
        "--json", type=Path, default=Path("runs/gpu.json"), help="file for the figures"
    )
    args = parser.parse_args()
    chosen = [name.strip() for name in args.only.split(",")]
    if unknown := [name for name in chosen if name not in PARTS]:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: torch finds no GPU on this machine")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    found: Found = {
        "machine": machine(),
        "versions": versions(),
        "quick": args.quick,
        "repeats": args.repeats,
    }
    for name in chosen:
        torch.cuda.reset_peak_memory_stats()
        found[name] = {**PARTS[name](args.repeats, args.quick), "driver_peak_gib": peak_rss() / GIB}
        # after each part, as a later one may fail
        args.json.write_text(json.dumps(found, indent=1) + "\n")
        print(name, json.dumps(found[name]), flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
