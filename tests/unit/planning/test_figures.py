"""Files of rates and prices, and the figures that are chosen for a run and a cluster."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pds_ray.errors import ConfigError
from pds_ray.methods.pds import PDS
from pds_ray.planning.choose import choose_figures
from pds_ray.planning.figures import Estimate, Measured, default_rates, read_prices, read_rates
from pds_ray.planning.plan import make_plan
from pds_ray.planning.workload import Cluster, parse_gpus, web_workload
from tests.support.plans import (
    MACHINE,
    MACHINE_HERE,
    PRICES,
    demand,
    entry,
    machine,
    machine_config,
    rate,
    rates_file,
    web,
)

H100_PEAK = 989e12
H100S, A100S = Cluster(8, "H100", 64, 64), Cluster(8, "A100", 64, 64)
A100_NAMES = ("NVIDIA A100-SXM4-80GB",)

# ---- choice ------------------------------------------------------------------------------------


def test_the_rate_of_the_configured_batch_size_is_used() -> None:
    figures = choose_figures(machine_config(), MACHINE_HERE, MACHINE)
    assert figures["encode_images"].value == 500
    figures = choose_figures(machine_config(embed__batch_size=48), MACHINE_HERE, MACHINE)
    assert figures["encode_images"].value == 400


@pytest.mark.parametrize(
    ("source", "read"),
    [("scenes:20000", 4000), ("", 1), ("/data/{0..9}.tar", 1), ("flickr30k:/data", 1)],
)
def test_rates_of_images_are_those_of_the_source_or_of_its_kind(source: str, read: float) -> None:
    """Other tars say nothing about a tar: JPEGs of a known size do."""
    figures = choose_figures(machine_config(source=source), MACHINE_HERE, MACHINE)
    assert figures["read"].value == read


def test_more_steps_take_more_time() -> None:
    """The rate was measured with 40 passes (20 steps with guidance)."""
    assert choose_figures(machine_config(), MACHINE_HERE, MACHINE)["draw"].value == 8
    longer = choose_figures(machine_config(decode__steps=80), MACHINE_HERE, MACHINE)["draw"]
    assert longer.value == pytest.approx(2)
    assert "40/160 passes" in longer.origin


def test_a_rate_carries_over_to_another_kind_of_gpu_by_the_peaks_and_says_so() -> None:
    measured = machine("GPU", A100_NAMES)
    same = choose_figures(machine_config(), A100S, measured)
    other = choose_figures(machine_config(), H100S, measured)
    for name in ("encode_images", "encode_captions", "draw"):
        assert same[name] == measured.figures.get(f"{name}@256", measured.figures[name])
        assert other[name].value == pytest.approx(same[name].value * 989 / 312)
        assert other[name].worst == pytest.approx(same[name].worst * 989 / 312)
        assert other[name].origin == "made up, x 989/312 TFLOP/s of H100 to A100"
    assert other["fit"] == measured.figures["fit"]  # of a core: FAISS used no GPU there


FAISS_GPU = {"fit": rate(7e12, "GPU", "FLOP")}


def with_faiss_on_gpu(gpu: str) -> Measured:
    measured = machine("GPU", (gpu,))
    return replace(measured, figures=measured.figures | FAISS_GPU)


def fit_rate(cluster: Cluster, measured: Measured | None) -> tuple[float, str, float | None]:
    work = web_workload(10**6, 1, 1)
    config = web(pairs=1000, cluster__solver="faiss")
    fit = demand(make_plan(config, work, cluster, measured, PRICES), "cluster", "fit image k-means")
    return fit.rate.value, fit.rate.per, fit.at_most


@pytest.mark.parametrize("gpu", ["NVIDIA GeForce RTX 4090", "NVIDIA L40"])
def test_k_means_on_a_gpu_says_nothing_where_that_does_not_carry_over(gpu: str) -> None:
    """An L40 is not an L4. The assumed rates are then used.

    Of an H100, 3 % of 989 TFLOP/s; of a core, straight from the file, 30 GFLOP/s.
    """
    measured = with_faiss_on_gpu(gpu)
    assert fit_rate(H100S, measured) == (pytest.approx(0.03 * 989e12), "GPU", 4)
    assert fit_rate(Cluster(0, "", 64, 64), measured) == (30e9, "core", 64)


def test_k_means_where_nothing_was_measured() -> None:
    """GPUs bring the extra that installs FAISS for them; 8 of one machine count as 4."""
    assert fit_rate(H100S, None) == (pytest.approx(0.03 * 989e12), "GPU", 4)
    assert fit_rate(Cluster(16, "H100", 128, 64), None)[2] == 4
    assert fit_rate(Cluster(2, "H100", 16, 16), None)[2] == 2
    assert fit_rate(Cluster(4, "H100", 32, 8), None)[2] == 1, "on four machines"
    assert fit_rate(Cluster(0, "", 64, 64), None) == (30e9, "core", 64)


def test_k_means_measured_on_cores_says_nothing_of_gpus() -> None:
    """Unless the machine had some: then its FAISS is one that uses none."""
    on_cores = machine("core", ())
    assert fit_rate(H100S, on_cores)[1] == "GPU"
    fit = machine("GPU", A100_NAMES).figures["fit"]
    assert fit_rate(H100S, machine("GPU", A100_NAMES)) == (fit.value, "core", 64)


def test_k_means_on_a_gpu_carries_over_by_the_peaks() -> None:
    measured = with_faiss_on_gpu(*A100_NAMES)
    assert choose_figures(machine_config(), A100S, measured)["fit"] == FAISS_GPU["fit"]
    carried = choose_figures(machine_config(), H100S, measured)["fit"].value
    assert carried == pytest.approx(7e12 * 989 / 312)


# property of a model -> names of the figures that depend on it
DEPENDENT = {
    "dim": {"commit", "sample", "label_rows", "sums", "search_rows"},
    "size": {"preprocess"},
    "encoder": {"start_embed", "start_caption", "encode_images", "encode_captions"},
    "decoder": {"start_decode", "draw"},
}
MADE_UP = Estimate(7.0, 7.0, 7.0, "things", "core", "made up")


def measured_all(**changes: Any) -> Measured:
    """Return rates with every figure measured, by default with the models of `web()`."""
    names = {*choose_figures(web(), MACHINE_HERE, None), *(f"start_{name}" for name in PDS.names)}
    models = {
        "encoder": "ViT-L-14:openai",
        "dim": 768,
        "size": 224,
        "decoder": "stable-diffusion-2-1-unclip",
        "passes": 50,
    }
    sources = {"jpeg": {"read": MADE_UP, "preprocess": MADE_UP}}
    figures = dict.fromkeys(names, MADE_UP)
    return replace(MACHINE, sources=sources, figures=figures, **{**models, **changes})


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({}, set()),
        ({"dim": 128}, {"dim"}),
        ({"size": 64}, {"size"}),
        ({"encoder": "ViT-B-32:openai"}, {"encoder"}),
        ({"encoder": "ViT-L-14:laion2b_s32b_b82k"}, set()),
        ({"decoder": "auto for demo"}, {"decoder"}),
        ({"encoder": "demo", "dim": 128, "size": 64, "decoder": "auto for demo"}, {*DEPENDENT}),
    ],
)
def test_figures_of_another_model_are_assumed(changes: dict[str, Any], other: set[str]) -> None:
    figures = choose_figures(web(), MACHINE_HERE, measured_all(**changes))
    assumed = {name for name, figure in figures.items() if figure.origin != "made up"}
    assert assumed == set().union(*(DEPENDENT[name] for name in other))


def test_rates_of_a_cpu_say_nothing_about_a_gpu() -> None:
    with pytest.raises(ConfigError, match="nothing is known of encoder demo"):
        choose_figures(machine_config(), H100S, MACHINE)
    config = machine_config(embed__encoder="ViT-B-32:openai")
    measured = replace(MACHINE, encoder="ViT-B-32:laion400m_e32")
    encode = choose_figures(config, H100S, measured)["encode_images"]
    assert encode.value == pytest.approx(H100_PEAK * 0.175 / 8.8e9)
    assert "published" in encode.origin


def test_weights_and_activation_do_not_change_the_speed() -> None:
    measured = replace(MACHINE, encoder="ViT-B-32-quickgelu:openai")
    config = web(embed__encoder="ViT-B-32:laion400m_e32")
    assert choose_figures(config, MACHINE_HERE, measured)["encode_captions"].value == 2000


def test_nothing_assumed_is_called_measured() -> None:
    figures = choose_figures(web(), Cluster(64, "H100", 512, 64), None)
    assert not [name for name, figure in figures.items() if "measured" in figure.origin]
    assert all(figure.origin for figure in figures.values())


# ---- files -------------------------------------------------------------------------------------


def test_a_file_of_rates_is_read(tmp_path: Path) -> None:
    measured = read_rates(rates_file(tmp_path / "rates.json"))
    origin = "measured on a CPU, 2026-01-02"
    assert measured.figures["encode_images"] == Estimate(2.0, 1.0, 3.0, "images", "core", origin)
    assert (measured.cpus, measured.dim, measured.size, measured.passes) == (4, 128, 64, 40)


@pytest.mark.parametrize(
    "changes",
    [
        {"schema": 2},
        {"machine": None},
        {"sources": {}},
        {"figures": {"read": entry(0.0)}},
        {"figures": {"read": entry(math.inf)}},
        {"figures": {"read": entry("fast")}},
        {"figures": {"read": 3}},
    ],
)
def test_another_file_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = rates_file(tmp_path / "rates.json", **changes)
    match = r"rates\.json is not what this version's pds-ray bench writes"
    with pytest.raises(ConfigError, match=match) as error:
        read_rates(path)
    assert "\n" not in str(error.value)


def test_no_file_of_rates(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read --rates .*no\.json: No such file"):
        read_rates(tmp_path / "no.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ConfigError, match=r"broken\.json is not what"):
        read_rates(tmp_path / "broken.json")


def test_rates_lie_in_the_cache_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_rates() == tmp_path / "pds-ray" / "rates.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_rates() == tmp_path / ".cache" / "pds-ray" / "rates.json"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[", "is not YAML"),
        ("3", "must hold gpu_hour, core_hour, storage_tb_month, egress_tb"),
        ("{gpu_hour: 3, core_hour: 1, storage_tb_month: 1, egress_tb: 1}", "gpu_hour by kind"),
        ("{gpu_hour: {H100: -1}, core_hour: 1, storage_tb_month: 1, egress_tb: 1}", "H100 is -1"),
        (
            "{gpu_hour: {}, core_hour: free, storage_tb_month: 1, egress_tb: 1}",
            "core_hour is 'free'",
        ),
    ],
)
def test_bad_prices(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "prices.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words) as error:
        read_prices(str(tmp_path / "prices.yaml"))
    assert "\n" not in str(error.value)


def test_prices() -> None:
    prices = read_prices(None)
    assert "assumed" in prices["from"]
    for kind in prices["gpu_hour"]:  # each has a peak, too
        assert parse_gpus(f"1x{kind}") == (1, kind)


def test_prices_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text("{gpu_hour: {H100: 7}, core_hour: 0, storage_tb_month: 1, egress_tb: 1}")
    prices = read_prices(str(path))
    assert (prices["gpu_hour"], prices["from"]) == ({"H100": 7}, str(path))
