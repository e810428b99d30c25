"""The plan of passes over the embeddings: where they run, their tasks, their memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from pds_ray.planning.choose import choose_figures
from pds_ray.planning.workload import Cluster
from tests.support.plans import demand, forecast, machine, rate, stage, web

PRODUCTS = [("cluster", "distances of labels"), ("prototypes", "nearest captions and images")]
CAPTIONS = ("caption", "nearest captions")
SHARDS, PAIRS = 40_000, 400_000_000  # of web data: one caption per image, 10,000 per shard
H100_PEAK = 989e12


@pytest.mark.parametrize(("name", "what"), [*PRODUCTS, CAPTIONS])
def test_products_are_of_gpus_where_there_are_any(name: str, what: str) -> None:
    """With 100,000 clusters of width 768; a tenth of the peak is assumed."""
    sides = 1 if (name, what) == CAPTIONS else 2
    for gpus in (8, 64):
        found = demand(forecast(gpus=f"{gpus}xH100"), name, what)
        assert found.rate.per == "GPU"
        assert found.at_most is None
        assert found.work == sides * 2 * PAIRS * 100_000 * 768
        assert found.unit_seconds == pytest.approx(found.work / (0.1 * H100_PEAK))
    cores = demand(forecast(gpus="0", cpus=512), name, what)
    assert cores.rate.per == "core"
    assert cores.work == found.work


def test_labels_and_searches_are_no_bottleneck_beside_embedding() -> None:
    """They take minutes of a plan of many hours."""
    for gpus in ("8xH100", "64xH100", "512xH100"):
        plan = forecast(gpus=gpus)
        labels = [
            phase for phase in stage(plan, "cluster").phases if phase[0].what == PRODUCTS[0][1]
        ]
        assert len(labels) == 1
        for name in ("prune", "match", "prototypes"):
            alone = demand(plan, "match", "solve").unit_seconds if name == "match" else 0
            assert stage(plan, name).seconds - alone < 0.05 * plan.seconds


def test_each_pass_reads_the_store_once() -> None:
    """After labels the vectors are read for sums, for both searches at once, and for captions."""

    def reads(**changes: object) -> list[str]:
        plan = forecast(**changes)
        return [
            d.what
            for name in ("prototypes", "caption")
            for phase in stage(plan, name).phases
            for d in phase
            if d.rate.per == "node"
        ]

    once = ["read vectors", "read captions and images", "read captions"]
    assert reads() == once
    assert reads(prototypes__center="medoid") == ["read vectors", *once]
    assert reads(caption__nearest_to="prototype") == once[:2]


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        # 1,000 tasks are enough for passes that take less than 80 minutes of a core
        ("prune", [4 * 1_000]),
        # a k-means: 27 passes of 374 tasks, whose sums 24 + 2 + 1 add up in each of 10 ranges, and
        # two passes for each of the nine rounds of draws; then labels: 20,000 vectors of a shard,
        # 0.447 s with a share of a GPU, so eleven shards per task
        (
            "cluster",
            [pytest.approx(27 * (374 + 10 * 27) + 18 * 374)] * 2
            + [pytest.approx(SHARDS * 0.4472 / 5, abs=1)],
        ),
        # two files of a shard: 60 ms. The cells of 24 ranges are added up by 63 + 4 + 1 tasks each,
        # and counted; then a pass for the cosines
        ("match", [1_000 + 24 * 69, 1_000]),
        # 112,000 pairs of 40 shards are summed in 826 MB by each task, and added up in 5 ranges;
        # then a search like labels, and look-ups
        ("prototypes", [1_121 + 5 * 78, pytest.approx(SHARDS * 0.4872 / 5 + 1_000, abs=2)]),
        ("caption", [pytest.approx(SHARDS * 0.2436 / 5 + 1_000, abs=1)]),
    ],
)
def test_tasks_of_web_data(name: str, tasks: list[object]) -> None:
    plan = forecast()
    found = [d.work for phase in stage(plan, name).phases for d in phase if d.what == "schedule"]
    assert found == tasks


def test_answers_under_way() -> None:
    """512 tasks share 64 GPUs, and a window has twice as many; of each query 16 bytes per side."""
    caption, prototypes = (
        stage(forecast(), name).store_bytes for name in ("caption", "prototypes")
    )
    queries = 8 * 100_000 * 768 * 4  # on eight nodes
    assert caption == queries + 2 * 512 * 16 * 100_000
    assert prototypes > 2 * caption, "sums of a window, and of those that wait to be added up"
    few = forecast(pairs=1_000)
    assert stage(few, "caption").store_bytes == caption / 100


def test_scheduling_is_bounded_however_much_data_there_is() -> None:
    """A pass has at most 10,000 tasks for shards, where these have less than a minute of work.

    All passes of a k-means over its sample are 25,000 at most.
    """
    plan = forecast(5_850_000_000, "512xH100")
    for name in ("cluster", "match", "prototypes", "caption"):
        for phase in stage(plan, name).phases:
            for d in (d for d in phase if d.what == "schedule"):
                assert d.work <= 25_000


def test_sums_under_way() -> None:
    """On 512 CPUs: 1,024 answers of a window, and 33 times 16 that are added up, or wait for it."""
    plan, matches = forecast(), 100_000 * (1 - math.exp(-0.35 * 0.8 * PAIRS / 1_121 / 100_000))
    answer = 2 * 8 * 768 * matches
    add = demand(plan, "prototypes", "add sums")
    assert add.work == pytest.approx(1_121 * answer)
    assert add.at_most == 5 * 32
    totals = 2 * 8 * 768 * 100_000
    assert stage(plan, "prototypes").store_bytes == pytest.approx(1_121 * answer + totals)
    small = forecast(gpus="8xH100")
    waiting = 2 * 64 + 16 * 5
    assert stage(small, "prototypes").store_bytes == pytest.approx(waiting * answer + totals)
    assert demand(small, "prototypes", "add sums").at_most == 5 * 4


def test_memory_of_the_driver() -> None:
    """Beyond the 350 MB of its start."""

    def beyond(name: str, pairs_in: int = PAIRS, **changes: object) -> float:
        return stage(forecast(pairs_in, **changes), name).driver_bytes - 0.35e9

    vectors = 100_000 * 768 * 4
    # 24 and 96 million cells, and a core of a billion: 12 bytes, and three flags
    assert beyond("match", 10**8) == pytest.approx(15 * 0.3 * 0.8 * 10**8)
    assert beyond("match") == pytest.approx(15 * 0.3 * 0.8 * PAIRS)
    assert beyond("match", 5_850_000_000) == 15 * 100_000_000
    # a million pairs are in one part: two numbers of each cell
    assert beyond("match", 10**6) == pytest.approx((12 + 16) * 0.3 * 0.8 * 10**6)
    few = {"pairs": 5_000, "match__solver": "auto"}
    assert beyond("match", **few) == beyond("match", 10**9, **few) == 8 * 5_000**2
    # a table of so few clusters is full
    assert beyond("match", pairs=1_000) == pytest.approx((12 + 16) * 1_000**2)
    assert beyond("embed") == beyond("prune") == 0
    assert beyond("cluster") == 2 * vectors
    assert beyond("prototypes") == 2 * vectors + 1_500 * 100_000
    assert beyond("prototypes", prototypes__center="medoid") == 6 * vectors + 1_500 * 100_000
    names = 1_500 * 100_000
    assert beyond("caption", caption__round_trip=False) == vectors + names
    lists = {"caption__round_trip": True}
    assert beyond("caption", **lists) == vectors + names + 2 * 64 * 24 * 100_000
    both = {**lists, "caption__nearest_to": "both"}
    assert beyond("caption", **both) == beyond("caption", **lists) + 4 * vectors
    assert beyond("caption", caption__nearest_to="prototype") == names
    # a row group of vectors, nine times
    assert beyond("materialize") == 9 * 4 * 16_384 * 768 + 5_000 * 100_000
    with_targets = beyond("materialize", pairs=1_000, extras__similarity="clip")
    assert with_targets == beyond("materialize", pairs=1_000) + 2 * 4 * 1_000**2


def test_a_measured_rate_of_products_carries_over_to_another_gpu() -> None:
    a100, h100 = Cluster(8, "A100", 64, 64), Cluster(8, "H100", 64, 64)
    measured = machine("GPU", ("NVIDIA A100-SXM4-80GB",))
    measured.figures["products"] = rate(50e12, "GPU", "FLOP")
    assert choose_figures(web(), a100, measured)["products"].value == 50e12
    assert choose_figures(web(), h100, measured)["products"].value == pytest.approx(
        50e12 * 989 / 312
    )
    of_cores = replace(measured, figures={**machine().figures}, gpus=())
    assumed = choose_figures(web(), h100, of_cores)["products"]
    assert assumed.value == pytest.approx(0.1 * H100_PEAK)
    assert "assumed" in assumed.origin
    assert "products" not in choose_figures(web(), Cluster(0, "", 64, 64), None)


def test_a_large_table_is_solved_by_its_core() -> None:
    """A billion cells are looked through six times by 32 tasks, and a core is solved as often."""
    few, many = forecast(), forecast(5_850_000_000)
    once, times = demand(few, "match", "solve"), demand(many, "match", "solve")
    assert times.work == 6 * once.work == 6 * 100_000**2
    prices = demand(many, "match", "find prices")
    assert prices.work == 6 * 50_000_000
    assert times.rate.per == prices.rate.per == "driver"
    look = demand(many, "match", "look through cells")
    assert look.work == pytest.approx(6 * 0.3 * 0.8 * 5_850_000_000)
    assert look.at_most == 32
    scheduled = [d.work for p in stage(many, "match").phases for d in p if d.what == "schedule"]
    assert scheduled[1] == 6 * 2 * 32, "what is found is counted"
    names = [d.what for phase in stage(few, "match").phases for d in phase]
    assert "look through cells" not in names
