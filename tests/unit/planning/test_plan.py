"""The plan's arithmetic: against published sizes and times, closed forms and invariants."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pds_ray import catalog
from pds_ray.config import Actors
from pds_ray.distributed.sizes import decoded_where_read
from pds_ray.errors import ConfigError
from pds_ray.methods.coverage import COVERAGE
from pds_ray.methods.pds import PDS
from pds_ray.planning.choose import flop_rate, image_flop
from pds_ray.planning.phases import (
    LOOK_TRIPS,
    READ_TRIPS,
    WRITE_TRIPS,
    Demand,
    Inputs,
    distance_flop,
    embed_tasks,
    images_looked_through,
)
from pds_ray.planning.plan import Plan, make_plan, phase_seconds, to_json
from pds_ray.planning.workload import Cluster, Workload, make_cluster, parse_count, web_workload
from pds_ray.store.storage import Folder
from tests.support.object_store import Faults, proxy, uri
from tests.support.plans import (
    MACHINE,
    MACHINE_HERE,
    PRICES,
    demand,
    forecast,
    machine_config,
    rate,
    rates_file,
    stage,
    web,
)

H100_PEAK, HOUR = 989e12, 3600.0

# ---- a planning table of 400 million and 5.85 billion pairs, computed by hand ------------------


@pytest.mark.parametrize(
    ("pairs", "encoder", "terabytes"),
    [
        ("400M", "ViT-L-14", 0.61),
        ("400M", "ViT-H-14", 0.82),
        ("5.85B", "ViT-L-14", 9.0),
        ("5.85B", "ViT-H-14", 12.0),
    ],
)
def test_embeddings_on_disk(pairs: str, encoder: str, terabytes: float) -> None:
    """The table is per modality; there are two, and 120 bytes of text per pair."""
    count = parse_count(pairs, "")
    embed = stage(forecast(count, embed__encoder=encoder), "embed")
    assert (embed.disk_bytes - 120 * count) / 2e12 == pytest.approx(terabytes, rel=0.01)


def test_core_hours_of_decoding() -> None:
    decode = demand(forecast(), "embed", "decode and resize")
    assert decode.unit_seconds / HOUR == pytest.approx(370, rel=0.01)
    assert decode.work / decode.rate.best / HOUR == pytest.approx(160, rel=0.01)


@pytest.mark.parametrize(("pairs", "slow", "fast"), [(400e6, 111, 48), (5.85e9, 1625, 707)])
def test_gpu_hours_at_given_rates(pairs: float, slow: float, fast: float) -> None:
    for per_second, hours in ((1000, slow), (2300, fast)):
        encode = Demand("encode", pairs, rate(per_second, "GPU"))
        seconds, _ = phase_seconds((encode,), Cluster(64, "H100", 512, 64))
        assert seconds * 64 / HOUR == pytest.approx(hours, rel=0.01)


def test_gpu_hours_by_flop() -> None:
    """Clip-retrieval published 17.5 % of the peak; 40 % is assumed at best, 100 % is the bound."""
    plan = forecast()
    images, captions = (demand(plan, "embed", f"encode {side}") for side in ("images", "captions"))
    assert (images.unit_seconds + captions.unit_seconds) / HOUR == pytest.approx(111, rel=0.02)
    best = images.work / images.rate.best + captions.work / captions.rate.best
    assert best / HOUR == pytest.approx(48, rel=0.03)
    assert 400e6 / flop_rate(H100_PEAK, 1.0, 175.3e9) / HOUR == pytest.approx(20, rel=0.02)
    assert flop_rate(312e12, 0.175, 175.3e9) == pytest.approx(312, rel=0.01)


@pytest.mark.parametrize(
    ("pairs", "hours"), [(400e6, (0.06, 0.6, 5.7)), (5.85e9, (0.8, 8.3, 83))], ids=["400M", "5.85B"]
)
def test_labelling_at_30_tflops(pairs: float, hours: tuple[float, ...]) -> None:
    for clusters, expected in zip((1e4, 1e5, 1e6), hours, strict=True):
        found = distance_flop(pairs, clusters, 768) / 3.0e13 / HOUR
        assert found == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize(
    ("clusters", "rows", "hours"), [(1e4, 2.56e6, 0.01), (1e5, 25.6e6, 0.9), (1e6, 256e6, 91)]
)
def test_fitting_at_30_tflops(clusters: float, rows: float, hours: float) -> None:
    assert 25 * distance_flop(rows, clusters, 768) / 3.0e13 / HOUR == pytest.approx(hours, rel=0.1)


def test_whitened_coverage_of_400m_pairs() -> None:
    """A million candidates of width 1,536 in 64 parts, each gain computed 13 times."""
    plan = forecast(method="coverage", pairs=100_000)
    assert [found.name for found in plan.stages] == list(COVERAGE.names)
    gains = demand(plan, "cover", "gains")
    assert gains.at_most == 64
    herded = 50_000 * (1e6 / 64) * 2 * 1536
    assert gains.work == pytest.approx(13 * 2 * 1e6 * (1e6 / 64) * 1536 + herded)
    assert stage(plan, "cover").store_bytes == pytest.approx(1e6 * 1536 * 4)
    assert demand(plan, "decode", "look images up").work > 0
    with pytest.raises(StopIteration):
        demand(plan, "decode", "draw")
    drawn = forecast(method="coverage", pairs=100_000, decode__decoder="unclip")
    assert demand(drawn, "decode", "draw").work == 100_000


def test_drawing() -> None:
    """An image of 768 pixels takes 91.7 TFLOP with 20 steps and guidance.

    100,000 at 35 % of the peak are 7.4 GPU-h, a million at 20 % 129.
    """
    assert image_flop(web(decode__steps=20)) == pytest.approx(91.7e12, rel=0.01)
    assert image_flop(web(decode__steps=10)) == pytest.approx(48.7e12, rel=0.01)
    draw = demand(forecast(decode__steps=20), "decode", "draw")
    assert draw.work / draw.rate.best / HOUR == pytest.approx(7.4, rel=0.01)
    assert 10 * draw.unit_seconds / HOUR == pytest.approx(129, rel=0.01)
    unguided = image_flop(web(decode__steps=20, decode__guidance=1))
    assert unguided == pytest.approx(20 * 2.15e12 + 5.8e12)


def test_money() -> None:
    """2 USD per GPU-hour for 64 GPUs, 0.1 per hour of each core beyond 8 per GPU, idle or not."""
    plan, more = forecast(), forecast(cpus=1000)
    assert plan.usd == pytest.approx(plan.seconds / HOUR * 128)
    assert more.usd == pytest.approx(more.seconds / HOUR * (128 + 48.8))
    assert plan.egress_usd == pytest.approx(9.6 * 50)
    stored = sum(found.disk_bytes for found in plan.stages)
    assert plan.storage_usd_month == pytest.approx(stored / 1e12 * 10)
    assert forecast(gpus="8xH200").usd is None  # a kind without a price


# ---- closed forms ------------------------------------------------------------------------------


def test_a_phase_waits_for_its_busiest_resource() -> None:
    cluster = Cluster(2, "H100", 10, 10)
    read = Demand("read", 1000, rate(10))  # 100 s of a core
    resize = Demand("resize", 3000, rate(10))  # 300 s
    encode = Demand("encode", 60, rate(1, "GPU"))  # 60 s of a GPU
    assert phase_seconds((read, resize, encode), cluster) == (40.0, "CPU: resize")
    assert phase_seconds((read, resize, replace(encode, work=90)), cluster) == (45.0, "GPU: encode")
    alone = replace(read, at_most=2)
    assert phase_seconds((alone, resize, encode), cluster) == (50.0, "CPU: read")
    solve = Demand("solve", 70, rate(1, "driver"))
    assert phase_seconds((solve, encode), cluster) == (70.0, "driver: solve")


def test_embedding_on_two_cores_is_the_sum_of_its_work() -> None:
    """On CPUs alone readers and encoder share the cores, whatever the pools reserve for each."""
    scenes = Workload(20_000, 100_000, 19.4e6, 20, False)
    plan = make_plan(machine_config(), scenes, MACHINE_HERE, MACHINE, PRICES)
    work = 20_000 * (1 / 4000 + 1 / 5000 + 1 / 500) + 100_000 * (1 / 2000 + 1 / 50_000)
    assert stage(plan, "embed").seconds == pytest.approx(9 + work / 2)
    assert stage(plan, "embed").core_hours == pytest.approx(work / HOUR)


def test_tasks_of_embedding() -> None:
    """40,000 shards of 10,000 images, 240 MB; pixels take 150,528 bytes each.

    Where there are four shards per CPU, a task reads and decodes one, and blocks for GPUs have
    256 MiB. Elsewhere blocks have 64 MiB, before they are decoded and afterwards.
    """
    work, pixels = web_workload(400_000_000, 1, 24_000), 400e6 * 150_528

    def tasks(cluster: Cluster) -> float:
        return embed_tasks(Inputs(web(), work, cluster, {}, 768, 224))

    assert tasks(Cluster(64, "H100", 512, 64)) == pytest.approx(40_000 + pixels / 2**28)
    assert tasks(Cluster(0, "", 512, 64)) == pytest.approx(40_000 + pixels / 2**26)
    many = Cluster(1250, "H100", 10_001, 64)
    assert tasks(many) == pytest.approx(40_000 + 9.6e12 / 2**26 + pixels / 2**26)
    tiny = Workload(8000, 8000, 1e6, 1000, False)
    assert embed_tasks(Inputs(web(), tiny, Cluster(0, "", 2, 2), {}, 768, 16)) == 2000


@pytest.mark.parametrize(
    ("gpus", "wish", "executions", "groups"),
    [
        ("8xH100", 0, 1, 5),  # 64 CPUs; 8,000 shards at once
        ("64xH100", 0, 2, 4),  # 512 CPUs; a quarter of what an execution embeds, 5,000 shards
        ("512xH100", 0, 16, 1),  # 2,500 shards each, too few for two groups of 2,000
        ("64xH100", 100, 64, 1),  # one per actor at most
        ("64xH100", 3, 3, 4),
    ],
)
def test_executions_share_the_scheduling(
    gpus: str, wish: int, executions: int, groups: int
) -> None:
    """A minute to load the encoders, and 260 tasks per second, are what is assumed."""
    plan = forecast(gpus=gpus, ray__executions=wish)
    embed = stage(plan, "embed")
    tasks = 40_000 + 400e6 * 150_528 / 2**28
    scheduled = demand(plan, "embed", "schedule blocks of an execution")
    assert scheduled.unit_seconds == pytest.approx(tasks / executions / 260)
    busy, _ = phase_seconds(embed.phases[0], plan.cluster)
    assert embed.seconds == pytest.approx(busy + 60 * groups)


def test_k_means_side_by_side_on_several_nodes() -> None:
    """20 iterations and the seeds' on a sample of the memory's size: each on 4 GPUs of a node."""
    one, two = (
        forecast(gpus=f"{gpus}xH100", pairs=100_000, cluster__solver="faiss") for gpus in (8, 16)
    )
    image, text = (demand(one, "cluster", f"fit {side} k-means") for side in ("image", "text"))

    def fitting(plan: Plan) -> float:
        fits = [phase for phase in stage(plan, "cluster").phases if "fit" in phase[0].what]
        return sum(phase_seconds(phase, plan.cluster)[0] for phase in fits)

    assert fitting(one) == pytest.approx((image.unit_seconds + text.unit_seconds) / 4)
    assert fitting(two) == pytest.approx(max(image.unit_seconds, text.unit_seconds) / 4)
    sample = stage(one, "cluster").store_bytes
    assert stage(two, "cluster").store_bytes == pytest.approx(2 * sample)


def test_faiss_draws_seeds_on_one_core() -> None:
    """AFK-MC2 takes 3 ns per squared number of clusters and dimension, and one thread."""
    for clusters, seconds in ((2_000, 0), (10_000, 233), (100_000, 23_273)):
        plan = forecast(gpus="16xH100", pairs=clusters, cluster__solver="faiss")
        drawn = [
            phase_seconds(phase, plan.cluster)[0]
            for phase in stage(plan, "cluster").phases
            if phase[0].what == "draw image seeds"
        ]
        assert sum(drawn) == pytest.approx(seconds, rel=2e-3), "side by side"


def test_a_k_means_over_all_nodes() -> None:
    """25 iterations, the start's and the objective's pass, of 11,184,810 vectors by 374 tasks."""
    plan = forecast(gpus="512xH100", pairs=100_000, cluster__solver="distributed")
    rows = 64 * 2**30 / (8 * 768)

    def found(what: str) -> Demand:
        return demand(plan, "cluster", what)

    labels = found("label image vectors")
    assert labels.work == pytest.approx(27 * distance_flop(rows, 1e5, 768), rel=1e-6)
    assert labels.rate.per == "GPU"
    assert labels.at_most == 374
    assert found("sum image vectors").work == pytest.approx(27 * rows, rel=1e-6)
    own = rows / 374
    sums = 374 * 1e5 * (1 - math.exp(-own / 1e5)) * 768 * 8
    assert found("add sums").work == pytest.approx(27 * sums, rel=1e-6)
    assert found("send centroids and sums").work == pytest.approx(
        27 * (64 * 1e5 * 768 * 4 + sums), rel=1e-6
    )
    first, *_ = (d for p in stage(plan, "cluster").phases for d in p if d.what == "schedule")
    assert first.work == pytest.approx(27 * (374 + 10 * (24 + 2 + 1)) + 18 * 374)
    assert found("collect centroids").work == pytest.approx(27 * 1e5 * 768 * 4)
    assert stage(plan, "cluster").store_bytes == pytest.approx(
        4 * rows * 768 + sums + 64 * 1e5 * 768 * 4, rel=1e-6
    )
    assert not any("fit" in d.what for phase in stage(plan, "cluster").phases for d in phase)


def test_a_k_means_over_all_nodes_of_one_machine_sends_nothing() -> None:
    plan = forecast(gpus="0", cpus=64, pairs=1_000, cluster__solver="distributed")
    names = [d.what for phase in stage(plan, "cluster").phases for d in phase]
    assert "send centroids and sums" not in names
    assert demand(plan, "cluster", "label image vectors").rate.per == "core"
    # the seeds of so few are no pass of their own
    assert demand(plan, "cluster", "sum image vectors").work == pytest.approx(
        26 * 64 * 2**30 / (8 * 768), rel=1e-6
    )


def test_images_looked_through_by_nearest() -> None:
    """In one shard of n images the last of b wanted lies at n b / (b + 1) on average."""
    work = Workload(1000, 1000, 0.0, 1, False)
    assert images_looked_through(64, 16, work) == pytest.approx(4 * 1000 * 16 / 17)
    many = Workload(10**9, 10**9, 0.0, 10**6, False)
    assert images_looked_through(64, 16, many) == pytest.approx(64 * 1000 / 2, rel=1e-3)


@pytest.mark.parametrize(
    ("out", "source_is_remote", "counted"),
    [
        ("", True, True),
        ("s3://bucket/run", False, True),
        ("/data/run", True, False),
        ("", False, False),
    ],
)
def test_round_trips_to_a_store(out: str, source_is_remote: bool, counted: bool) -> None:
    """A round trip takes 50 ms, and a process makes 32 at once. 64 actors write the tables of each
    256 MiB of pixels (4 trips), and the 32 images of each of 3,125 chunks side by side (look for
    one, 2, write it, 4). Tasks of 1,000 files hash a file per shard (2) and 100,000 images (2),
    of 4,096 images read (2), of 1,000 copy them (2 + 4), and of 10,000 read them for a tar (2)."""
    work = replace(web_workload(400_000_000, 1, 24_000), remote=source_is_remote)
    plan = make_plan(web(out=out), work, make_cluster("64xH100", None, None), None, PRICES)
    found: dict[str, list[float]] = {}
    for name in PDS.names:
        for phase in stage(plan, name).phases:
            for trips in (d for d in phase if d.rate.per == "connection"):
                assert trips.at_most is not None
                found.setdefault(name, []).append(trips.unit_seconds / trips.at_most)
    if not counted:
        assert found == {}
        return
    shards, images = 40_000 * 0.05 / 32, 100_000 * 0.05 / 32
    blocks = 400_000_000 * 3 * 224**2 / 2**28
    expected = {
        "embed": [4 * blocks * 0.05 / 64],
        "prune": [2 * shards / 40],
        "cluster": [2 * shards / 40],
        "decode": [6 * 3125 * 0.05 / 64, 2 * images / 100],
        "caption": [2 * images / 25],
        "materialize": [6 * images / 100, 2 * images / 10],
    }
    assert found == {name: pytest.approx(seconds) for name, seconds in expected.items()}
    assert stage(plan, "materialize").seconds == pytest.approx(1 + 0.26 * images)
    assert stage(plan, "materialize").bottleneck == "round trips: read images for tars"


@pytest.mark.parametrize(
    ("ray", "gpus"),
    [
        ({}, 64),
        ({"workers": 8}, 8),
        ({"workers": 128}, 64),
        ({"gpus": 0.5}, 64),
        ({"gpus": 0.5, "workers": 64}, 32),
        ({"gpus": 2}, 32),
        ({"gpus": 2, "workers": 64}, 32),
        ({"gpus": 2, "workers": 8}, 8),
        ({"gpus": 1, "workers": 64}, 64),
    ],
)
def test_gpus_at_work(ray: dict[str, float], gpus: int) -> None:
    """Two actors fit on a GPU of which each takes half; an actor's second GPU has no work."""
    options = {
        f"ray__{stage}_{name}": value
        for name, value in ray.items()
        for stage in ("embed", "decode")
    }
    plan = forecast(**options)
    assert demand(plan, "embed", "encode images").at_most == gpus
    assert demand(plan, "decode", "draw").at_most == gpus


@pytest.mark.parametrize(
    ("cluster", "wish", "actors"),
    [
        (Cluster(0, "", 64, 64), Actors(0, 1, None, {}), 8),  # 8 CPUs each
        (Cluster(0, "", 20, 2), Actors(0, 1, None, {}), 10),  # a node each
        (Cluster(0, "", 2, 2), Actors(0, 1, None, {}), 1),
        (Cluster(0, "", 2, 2), Actors(3, 1, None, {}), 3),
        (Cluster(4, "H100", 32, 32), Actors(0, 1, None, {}), 4),
        (Cluster(4, "H100", 32, 32), Actors(0, 6, None, {}), 6),
        (Cluster(4, "H100", 32, 32), Actors(0, 1, 0.25, {}), 16),
        (Cluster(4, "H100", 32, 32), Actors(3, 1, 2.0, {}), 2),  # the third finds no room
    ],
)
def test_actors_that_find_room(cluster: Cluster, wish: Actors, actors: int) -> None:
    inputs = Inputs(web(), web_workload(10**6, 1, 1), cluster, {}, 768, 224)
    assert inputs.actors(wish) == actors


# ---- invariants --------------------------------------------------------------------------------

CASES = {
    "pairs": st.integers(10**6, 10**10),
    "gpus": st.integers(1, 512),
    "kind": st.sampled_from(["H100", "A100", "L4"]),
    "cpus": st.none() | st.integers(4, 4096),
    "clusters": st.sampled_from([100, 5_000, 20_000]),
    "encoder": st.sampled_from(["ViT-B-32", "ViT-L-14", "ViT-H-14"]),
    "decoder": st.sampled_from(["unclip", "nearest"]),
}


def random_plan(
    pairs: int, gpus: int, kind: str, cpus: int | None, clusters: int, encoder: str, decoder: str
) -> Plan:
    changes = {"embed__encoder": encoder, "decode__decoder": decoder}
    return forecast(pairs, f"{gpus}x{kind}", cpus, pairs=clusters, **changes)


@settings(max_examples=60)
@given(st.fixed_dictionaries(CASES))
def test_no_stage_is_shorter_than_the_work_for_any_resource(case: dict[str, Any]) -> None:
    plan = random_plan(**case)
    assert tuple(found.name for found in plan.stages) == PDS.names
    for found in plan.stages:
        for per in ("core", "GPU", "node", "driver"):
            work = sum(
                d.work / d.rate.value for phase in found.phases for d in phase if d.rate.per == per
            )
            assert found.seconds >= work / plan.cluster.units(per) * (1 - 1e-12)
        assert found.seconds >= found.start.value
    assert plan.seconds == pytest.approx(
        plan.start.value + sum(found.seconds for found in plan.stages)
    )
    assert plan.seconds_best <= plan.seconds <= plan.seconds_worst
    json.loads(json.dumps(to_json(plan), allow_nan=False))


@settings(max_examples=60)
@given(st.fixed_dictionaries(CASES))
def test_twice_the_gpus_are_never_slower(case: dict[str, Any]) -> None:
    few, many = random_plan(**case), random_plan(**{**case, "gpus": 2 * case["gpus"]})
    for before, after in zip(few.stages, many.stages, strict=True):
        assert after.seconds <= before.seconds * (1 + 1e-12)


@settings(max_examples=60)
@given(st.fixed_dictionaries(CASES))
def test_twice_the_pairs_are_never_cheaper(case: dict[str, Any]) -> None:
    few, many = random_plan(**case), random_plan(**{**case, "pairs": 2 * case["pairs"]})
    ways = {decoded_where_read(p.workload.shards, p.cluster.cpus) for p in (few, many)}
    assume(len(ways) == 1)  # few shards for the CPUs are read by more and smaller tasks
    for before, after in zip(few.stages, many.stages, strict=True):
        assert after.seconds >= before.seconds * (1 - 1e-12)
        assert after.disk_bytes >= before.disk_bytes
        assert after.traffic_bytes >= before.traffic_bytes
    assert few.usd is not None
    assert many.usd is not None
    assert many.usd >= few.usd * (1 - 1e-12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": 2_000_000}, "only 1,000,000 images"),
        ({"embed__encoder": "demo"}, "nothing is known of encoder demo .*ViT-L-14"),
        ({"decode__model": "mine"}, "nothing is known of decoder mine"),
        ({"cluster__memory_gib": 0.01}, "raise it to"),
        ({"ray__embed_gpus": 128}, r"ray\.embed_gpus is 128, of 64 GPUs"),
        ({"ray__decode_gpus": 0}, r"ray\.decode_gpus is 0: a stage on CPUs"),
    ],
)
def test_impossible_plans(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        forecast(1_000_000, **changes)
    assert "\n" not in str(error.value)


def test_a_stage_without_a_cost_model_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    method = PDS.replaced(replace(PDS.stage("match"), plan=""))
    monkeypatch.setattr(catalog, "method", lambda *_: method)
    with pytest.raises(ConfigError) as error:
        forecast(1_000_000)
    assert str(error.value) == (
        "method is 'pds'; its stage match has no cost model, so it cannot be planned"
    )


def test_a_budget_is_planned_with_the_pairs_that_it_may_hold() -> None:
    """250 pairs of 8 kB, as assumed; the stage that chooses comes after pruning."""
    plan = forecast(1_000_000, pairs=0, budget="2MB")
    names = [stage.name for stage in plan.stages]
    assert names == ["embed", "prune", "budget", *PDS.names[2:]]
    assert demand(plan, "decode", "draw").work == 250
    assert demand(plan, "budget", "save in each way").work == 256 * 5 * 7
    given = forecast(1_000_000, pairs=300, budget="2MB")
    assert demand(given, "decode", "draw").work == 300
    few = forecast(100, pairs=0, budget="2MB")
    assert demand(few, "decode", "draw").work == 80, "those that pruning keeps"


# ---- the engine that it models -----------------------------------------------------------------


@pytest.mark.usefixtures("s3_login")
def test_requests_of_a_store_are_those_of_the_engine(s3_port: int) -> None:
    """They are counted between the engine and a store."""
    requests = Faults()
    with proxy(s3_port, requests) as port:
        folder = Folder(uri(port, "trips"))
        folder.write_bytes("another", b"")
        for trips, call in (
            (LOOK_TRIPS, lambda: folder.exists("image")),
            (WRITE_TRIPS, lambda: folder.write_bytes("image", bytes(100_000))),
            (READ_TRIPS, lambda: folder.read_bytes("image")),
            (READ_TRIPS, lambda: folder.sha256("image")),
        ):
            before = len(requests.requests)
            call()
            assert len(requests.requests) - before == trips


def test_planning_is_quick_to_start(tmp_path: Path) -> None:
    """A plan from a file of rates loads neither Ray nor torch."""
    rates = rates_file(tmp_path / "rates.json")
    args = ["plan", "--pairs-in", "400M", "--gpus", "64xH100", "--pairs", "1000"]
    args += ["--encoder", "ViT-L-14", "--rates", str(rates)]
    code = f"""
import sys
from pds_ray.cli import main as cli
heavy = {{"ray", "torch", "faiss", "open_clip", "diffusers"}}
try:
    cli.main({args!r})
except SystemExit as ended:
    print(ended.code, sorted(heavy & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []", done.stderr
