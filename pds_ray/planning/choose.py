"""Choose the figures that hold for a run on a cluster: measured where possible, else assumed.

Figures that depend on the encoder or decoder are reused only for the same model. A rate of one kind
of GPU carries over to another kind only by the ratio of their peaks.
"""

from __future__ import annotations

from pds_ray.catalog import DISTILLERS, SOURCES
from pds_ray.config import RunConfig
from pds_ray.errors import ConfigError
from pds_ray.planning.figures import (
    JPEG,
    Estimate,
    Measured,
    assumed_figures,
    assumptions,
    gpu_kind,
)
from pds_ray.planning.workload import Cluster

UNCLIP = "stable-diffusion-2-1-unclip"


def flop_rate(peak: float, utilisation: float, flop: float) -> float:
    """Return items per second: peak FLOP/s x utilisation / FLOP per item."""
    return peak * utilisation / flop


def unet_passes(config: RunConfig) -> int:
    """Return the UNet passes per image: guidance takes a second one in each step."""
    return config.decode.steps * (2 if config.decode.guidance > 1 else 1)


def image_flop(config: RunConfig) -> float:
    """Return the FLOP of an image by Stable Diffusion 2.1 unCLIP."""
    unclip = assumptions()["unclip"]
    return unet_passes(config) * unclip["step"] + unclip["image"]


def model_name(encoder: str) -> str:
    """Return the name that decides an encoder's speed.

    That is its architecture, with any weights, or its whole name if the architecture is unknown.
    """
    architecture = encoder.partition(":")[0].removesuffix("-quickgelu")
    return architecture if architecture in assumptions()["encoders"] else encoder


def decoder_name(config: RunConfig) -> str:
    """Return the name of the decoder, with that of the encoder's own decoder for `auto`."""
    if config.decode.decoder != "unclip":
        return config.decode.decoder
    if config.decode.model != "auto":
        return config.decode.model
    encoder = model_name(config.embed.encoder)
    return UNCLIP if encoder in assumptions()["encoders"] else f"auto for {encoder}"


def encoder_shape(config: RunConfig, measured: Measured | None) -> tuple[int, int]:
    """Return the width of the encoder's embeddings and the side of its images in pixels.

    Raises ConfigError in one line for an unknown encoder.
    """
    name, table = model_name(config.embed.encoder), assumptions()["encoders"]
    if name in table:
        return table[name]["dim"], table[name]["size"]
    if measured is None or model_name(measured.encoder) != name:
        raise _unknown("encoder", name, ", ".join(table))
    return measured.dim, measured.size


def choose_figures(
    config: RunConfig, cluster: Cluster, measured: Measured | None
) -> dict[str, Estimate]:
    """Return the measured figures that hold for the run and the cluster, assumed ones elsewhere.

    Raises ConfigError in one line if nothing is known of a model.
    """
    chosen = assumed_figures()
    if measured is not None:
        own = {**measured.figures, **_source_figures(config.source, measured)}
        unfit = {"fit", *_figures_of_other_models(config, measured)}
        chosen |= {name: own[name] for name in (chosen.keys() & own.keys()) - unfit}
    chosen["fit"] = _fit(cluster, measured) or chosen["fit"]
    chosen["encode_images"] = _encode(config, cluster, measured, "image")
    chosen["encode_captions"] = _encode(config, cluster, measured, "caption")
    if config.decode.decoder == "unclip":
        chosen["draw"] = _draw(config, cluster, measured)
    if cluster.gpus:
        rate = measured and _carried_over(cluster, measured.figures.get("products"), measured)
        chosen["products"] = rate or _assumed_by_flop(cluster, "products", 1.0, "FLOP")
    if config.method in DISTILLERS:
        chosen["train"] = _assumed_by_flop(cluster, "train", 1.0, "FLOP")
    return chosen


def _fit(cluster: Cluster, measured: Measured | None) -> Estimate | None:
    """Return the rate of a k-means, None where it is the assumed one of cores.

    On GPUs it is that of FAISS's own, which the extra `gpu` installs, but for one that was measured
    on a machine that has GPUs and a FAISS that uses none.
    """
    if measured is not None:
        fit = measured.figures["fit"]
        if found := _carried_over(cluster, fit, measured):
            return found
        if fit.per == "core" and measured.gpus:
            return fit
    return _assumed_by_flop(cluster, "fit", 1.0, "FLOP") if cluster.gpus else None


def _source_figures(source: str, measured: Measured) -> dict[str, Estimate]:
    """Return the rates of reading and decoding images for a source.

    Measured with that source, with one of its kind, or with the JPEGs of the benchmark.
    """
    scheme = source.partition(":")[0]
    for uri, found in measured.sources.items():
        if uri == source or (scheme in SOURCES and scheme == uri.partition(":")[0]):
            return found
    return measured.sources[JPEG]


def _figures_of_other_models(config: RunConfig, measured: Measured) -> set[str]:
    """Return the figures that depend on a model and were measured with another one."""
    dim, size = encoder_shape(config, measured)
    same_encoder = model_name(measured.encoder) == model_name(config.embed.encoder)
    holds = {
        ("commit", "sample", "label_rows", "sums", "search_rows"): measured.dim == dim,
        ("preprocess",): measured.size == size,
        ("start_embed", "start_caption"): same_encoder,
        ("start_decode",): measured.decoder == decoder_name(config),
    }
    return {name for names, same in holds.items() if not same for name in names}


def _encode(config: RunConfig, cluster: Cluster, measured: Measured | None, item: str) -> Estimate:
    """Return the rate of encoding: `item` is "image" or "caption"."""
    name, encoder = f"encode_{item}s", model_name(config.embed.encoder)
    if measured is not None and model_name(measured.encoder) == encoder:
        at_batch_size = f"{name}@{config.embed.batch_size}"
        rate = measured.figures.get(at_batch_size, measured.figures[name])
        if (found := _carried_over(cluster, rate, measured)) is not None:
            return found
    table = assumptions()["encoders"]
    if encoder not in table:
        raise _unknown("encoder", encoder, ", ".join(table))
    return _assumed_by_flop(cluster, "encode", table[encoder][item], f"{item}s")


def _draw(config: RunConfig, cluster: Cluster, measured: Measured | None) -> Estimate:
    model, passes = decoder_name(config), unet_passes(config)
    if measured is not None and measured.decoder == model:
        found = _carried_over(cluster, measured.figures.get("draw"), measured)
        if found is not None and passes != measured.passes:
            note = f"{found.origin}, x {measured.passes}/{passes} passes of the UNet"
            return found.scaled(measured.passes / passes, note)
        if found is not None:
            return found
    if UNCLIP not in model:
        raise _unknown("decoder", model, UNCLIP)
    return _assumed_by_flop(cluster, "draw", image_flop(config), "images")


def _unknown(kind: str, name: str, known: str) -> ConfigError:
    return ConfigError(
        f"nothing is known of {kind} {name} on such machines; "
        f"measure it on one (pds-ray bench), or take one of {known}"
    )


def _carried_over(cluster: Cluster, rate: Estimate | None, measured: Measured) -> Estimate | None:
    """Return a measured rate for the cluster's hardware; None if it does not carry over."""
    if rate is None:
        return None
    if (rate.per == "GPU") != (cluster.gpus > 0):
        return None
    if rate.per == "core":
        return rate
    peaks, kind = assumptions()["gpus"], gpu_kind(measured.gpus[0])
    if kind == cluster.gpu:
        return rate
    if kind not in peaks or cluster.gpu not in peaks:
        return None
    tflops, measured_tflops = (f"{peaks[gpu] / 1e12:g}" for gpu in (cluster.gpu, kind))
    ratio = f"x {tflops}/{measured_tflops} TFLOP/s of {cluster.gpu} to {kind}"
    return rate.scaled(peaks[cluster.gpu] / peaks[kind], f"{rate.origin}, {ratio}")


def _assumed_by_flop(cluster: Cluster, work: str, flop: float, unit: str) -> Estimate:
    """Return a model's rate by its FLOP per item, on a GPU or a core."""
    table = assumptions()
    share = table["utilisation"][work] if cluster.gpus else table["core_flops"]
    if cluster.gpus and cluster.gpu not in table["gpus"]:
        raise ConfigError(f"nothing is known of GPU {cluster.gpu}; measure it (pds-ray bench)")
    peak = table["gpus"][cluster.gpu] if cluster.gpus else 1.0
    value, worst, best = (flop_rate(peak, share[case], flop) for case in ("value", "worst", "best"))
    reached = (
        f"{peak / 1e12:g} TFLOP/s x {share['value']:.1%}"
        if cluster.gpus
        else f"{share['value'] / 1e9:g} GFLOP/s"
    )
    per_item = "" if unit == "FLOP" else f" / {flop / 1e9:,.4g} GFLOP"
    origin = f"{reached}{per_item} ({share['from']})"
    return Estimate(value, worst, best, unit, "GPU" if cluster.gpus else "core", origin)
