"""Embedding on Ray Data with the built-in encoder, against the same stage in one process."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray

from pds_ray import catalog
from pds_ray.config import ConfigError, EmbedConfig, RayConfig, RunConfig
from pds_ray.distributed import embed as embed_module
from pds_ray.distributed import embed_executions, sizes
from pds_ray.distributed.embed import fill_store
from pds_ray.distributed.embed_account import check_bad_share, check_failed_share
from pds_ray.distributed.embed_workers import EmbedWorker, ShardDatasource, ShardFile
from pds_ray.distributed.in_flight import InFlight
from pds_ray.distributed.session import unwrapped_errors
from pds_ray.errors import UserError
from pds_ray.sources.scenes import ScenesSource
from pds_ray.sources.webdataset import WebDatasetSource
from pds_ray.stages import embed as core
from pds_ray.stages.embed import ShardCounts, embed_shard
from pds_ray.store.embeddings import EmbeddingStore
from pds_ray.store.run_folder import RunFolder
from pds_ray.store.storage import Folder
from tests.support.poisoned import write_shard
from tests.support.stage_run import stage_run

pytestmark = pytest.mark.ray
LONG = pytest.mark.long
CONFIG = RunConfig(embed=EmbedConfig(encoder="demo"), ray=RayConfig(max_bad_share=1.0))


def open_store(path: Path) -> EmbeddingStore:
    store = EmbeddingStore(Folder(str(path)))
    store.folder.create()
    return store


def embed(source, shards, info, config, store: EmbeddingStore) -> dict:
    folder = RunFolder(store.folder / "run")
    return fill_store(stage_run(store, folder, config, source=source, shards=shards, encoder=info))


def same_as_one_process(source, shards, store: EmbeddingStore) -> None:
    info = catalog.describe_encoder(CONFIG.embed)
    encoder = catalog.load_encoder(info, "fp32")
    for shard in shards:
        images, captions, errors = embed_shard(
            source, shard, encoder, info.preprocess, CONFIG.read, CONFIG.embed
        )
        assert store.images(shard.name).equals(images, check_metadata=True)
        assert store.captions(shard.name).equals(captions, check_metadata=True)
        assert store.errors(shard.name).equals(errors)


@pytest.mark.parametrize(
    ("together", "per_cpu"),
    [pytest.param(1, 4, marks=LONG), pytest.param(2_000, 4, marks=LONG), (2_000, 0)],
)
def test_equals_one_process_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int, per_cpu: int
) -> None:
    """Group by group or all at once; a task decodes what it has read, or others do."""
    monkeypatch.setattr(sizes, "SHARDS_TOGETHER", together)
    monkeypatch.setattr(sizes, "SHARDS_PER_CPU", per_cpu)
    source = ScenesSource("scenes:50:0:0:30")
    shards = source.shards()
    store = open_store(tmp_path)
    counts = embed(source, shards, catalog.describe_encoder(CONFIG.embed), CONFIG, store)
    assert (counts["images"], counts["pairs"], counts["bad"]) == (50, 250, 0)
    same_as_one_process(source, shards, store)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    again = embed(source, shards, catalog.describe_encoder(CONFIG.embed), CONFIG, store)
    assert again["images_reused"] == 50
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_shards_larger_than_a_block_are_put_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the pixels of 100 scenes take 1.2 MB: many blocks per shard
    monkeypatch.setattr(sizes, "BLOCK_BYTES", 1 << 18)
    put_together, log = embed_module.commit_parts, tmp_path / "log"
    log.mkdir()

    def logged(shard, firsts, *rest) -> None:
        (log / shard).write_text(str(len(firsts)))
        put_together(shard, firsts, *rest)

    monkeypatch.setattr(embed_module, "commit_parts", logged)
    source = ScenesSource("scenes:200:3:0:100")
    store = open_store(tmp_path / "store")
    embed(source, source.shards(), catalog.describe_encoder(CONFIG.embed), CONFIG, store)
    same_as_one_process(source, source.shards(), store)
    assert {shard.name: int((log / shard.name).read_text()) > 1 for shard in source.shards()} == {
        "scenes-00000": True, "scenes-00001": True,
    }, "the data came in one block: nothing was put together"  # fmt: skip
    assert not (tmp_path / "store" / "parts").exists()


def with_executions(count: int) -> RunConfig:
    ray_config = RayConfig(max_bad_share=1.0, executions=count, embed_workers=count)
    return dataclasses.replace(CONFIG, ray=ray_config)


def _is_first(claim: Path) -> bool:
    """Return whether nobody has come before; of several at once only one is first."""
    try:
        claim.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def watched(folder: Path, killed: bool) -> Callable[..., Iterator[Any]]:
    """Return an execution that leaves a file named by its process; the first may kill itself.

    It does so with rows in its hands that nobody has received.
    """
    execution = embed_executions._execution

    def alike(*args: Any) -> Iterator[Any]:
        embed_executions.REPORT_S = 0.0
        (folder / f"{os.getpid()}-{len(args[0])}").touch()
        for report in execution(*args):
            if killed and _is_first(folder.parent / "first"):
                os.kill(os.getpid(), signal.SIGKILL)
            yield report

    return alike


@pytest.mark.parametrize(
    ("executions", "killed", "per_cpu", "groups"),
    [
        (2, True, 0, 1),
        pytest.param(2, True, 4, 2, marks=LONG),
        pytest.param(2, False, 0, 2, marks=LONG),
        pytest.param(4, False, 4, 1, marks=LONG),
    ],
)
def test_executions_side_by_side_leave_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    executions: int,
    killed: bool,
    per_cpu: int,
    groups: int,
) -> None:
    """Also where one is killed in the middle of its shards: no row is lost or there twice."""
    monkeypatch.setattr(sizes, "BLOCK_BYTES", 1 << 16)  # five blocks per shard
    monkeypatch.setattr(sizes, "SHARDS_PER_CPU", per_cpu)
    shards, log = 2 * executions * groups, tmp_path / "log"
    monkeypatch.setattr(sizes, "FEW_SHARDS", shards // executions // groups)
    monkeypatch.setattr(embed_executions, "_execution", watched(log, killed))
    log.mkdir()
    source = ScenesSource(f"scenes:{30 * shards}:0:0:30")
    store, config = open_store(tmp_path / "store"), with_executions(executions)
    counts = embed(source, source.shards(), catalog.describe_encoder(CONFIG.embed), config, store)
    assert (counts["images"], counts["pairs"], counts["bad"]) == (30 * shards, 150 * shards, 0)
    assert (counts["shards_embedded"], counts["failed"]) == (shards, {})
    same_as_one_process(source, source.shards(), store)
    begun = [path.name.split("-") for path in log.iterdir()]
    assert len({process for process, _ in begun}) >= executions
    assert ("an execution was lost (WorkerCrashedError)" in capsys.readouterr().err) == killed


def test_what_ends_the_run_ends_its_executions(tmp_path: Path) -> None:
    """A little later nothing of them is at work, though most shards are still to be embedded."""
    for number in range(300):
        (tmp_path / f"{number}.tar").write_text("<html>404</html>")
    source, info = WebDatasetSource(str(tmp_path / "*.tar")), catalog.describe_encoder(CONFIG.embed)
    with pytest.raises(ConfigError, match="of 300 shards cannot be read"):
        embed(source, source.shards(), info, with_executions(2), open_store(tmp_path / "store"))
    until = time.monotonic() + 60
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < until, "executions are still at work"
        time.sleep(0.1)


def test_a_store_begun_in_another_precision_is_not_continued(tmp_path: Path) -> None:
    source = ScenesSource("scenes:40:0:0:20")
    info = catalog.describe_encoder(CONFIG.embed)
    store = open_store(tmp_path)
    shard, encoder = source.shards()[0], catalog.load_encoder(info, "fp32")
    tables = embed_shard(source, shard, encoder, info.preprocess, CONFIG.read, CONFIG.embed)
    marker = {**dataclasses.asdict(core.shard_counts(*tables)), "precision": "fp32"}
    store.commit(shard.name, *tables, marker)
    other = dataclasses.replace(CONFIG, embed=dataclasses.replace(CONFIG.embed, precision="bf16"))
    with pytest.raises(ConfigError, match="begun in fp32, here they would go on in bf16"):
        embed(source, source.shards(), info, other, store)


@pytest.mark.long
def test_a_shard_that_cannot_be_opened_is_no_bad_sample(tmp_path: Path, shared_data: Path) -> None:
    import shutil

    for name in ("empty.tar", "bomb.tar"):
        shutil.copy(shared_data / "clipart" / "broken" / name, tmp_path / name)
    source = WebDatasetSource(str(tmp_path / "*.tar"))
    shards = source.shards()
    (tmp_path / "bomb.tar").unlink()
    store = open_store(tmp_path / "store")
    with pytest.raises(UserError, match="bomb was listed but cannot be opened"), unwrapped_errors():
        embed(source, shards, catalog.describe_encoder(CONFIG.embed), CONFIG, store)
    assert "bomb" not in store.committed()
    config = dataclasses.replace(CONFIG, ray=RayConfig(max_bad_share=1.0, max_failed_share=0.5))
    for _ in range(2):  # how often it was tried changes nothing
        counts = embed(source, shards, catalog.describe_encoder(CONFIG.embed), config, store)
        assert (counts["shards"], counts["failed_shards"], list(counts["failed"])) == (
            2,
            1,
            ["bomb"],
        )
        assert "cannot be opened" in counts["failed"]["bomb"]


def test_a_shard_that_loses_every_process_is_set_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def alone(file, *_):
        if file.shard.name.endswith("1"):
            os.kill(os.getpid(), signal.SIGKILL)
        return ShardCounts(images=7), ""

    monkeypatch.setattr(embed_module, "_embed_in_subprocess", alone)
    monkeypatch.setattr(embed_module.tasks, "TASK_RETRIES", 1)
    source = ScenesSource("scenes:2000")
    info = catalog.describe_encoder(CONFIG.embed)
    work = embed_executions.Work(
        source, info, CONFIG.read, CONFIG.embed, CONFIG.ray, open_store(tmp_path)
    )
    files = [ShardFile(shard, changed=False) for shard in source.shards()]
    outcomes = dict(embed_module.retry_lost_shards(files, work, InFlight()))
    assert outcomes["scenes-00000"] == (ShardCounts(images=7), "")
    assert outcomes["scenes-00001"].startswith("whatever embeds it is lost (processes lost: 2,")


def test_broken_shards_lose_only_what_is_broken(tmp_path: Path, shared_data: Path) -> None:
    source = WebDatasetSource(str(shared_data / "clipart" / "broken" / "*.tar"))
    shards = source.shards()
    store = open_store(tmp_path)
    config = dataclasses.replace(CONFIG, ray=RayConfig(max_bad_share=1.0, max_failed_share=0.5))
    counts = embed(source, shards, catalog.describe_encoder(CONFIG.embed), config, store)
    assert counts["failed"].keys() == {"not-a-tar", "truncated"}
    assert (counts["failed_shards"], counts["shards_embedded"]) == (2, len(shards))
    keys = {shard.name: store.images(shard.name).column("key").to_pylist() for shard in shards}
    assert keys["truncated"] == [f"{n:09d}" for n in range(20)]
    assert keys["corrupt-images"][:30] == [f"{n:09d}" for n in range(40, 70)]
    assert {f"90000000{n}" for n in (4, 5, 6, 7, 8)} <= set(keys["corrupt-images"])
    assert keys["bomb"] == ["000000140", "000000141", "000000142"]
    assert keys["empty"] == keys["not-a-tar"] == []
    bad = {
        (shard.name, row["key"]) for shard in shards for row in store.errors(shard.name).to_pylist()
    }
    assert {
        ("bomb", "900000201"),
        ("truncated", "000000020"),
        ("corrupt-images", "900000001"),
        ("not-a-tar", ""),
    } <= bad
    assert counts["bad"] == len(bad) == sum(counts["reasons"].values())


def test_one_read_task_per_shard() -> None:
    source = ScenesSource("scenes:5000")
    files = [ShardFile(shard, changed=False) for shard in source.shards()]
    assert len(ShardDatasource(source, files, InFlight()).get_read_tasks(1)) == 5


def test_too_much_bad_data_stops_the_run() -> None:
    counts = ShardCounts(90, 450, 60, {"undecodable_image": 50, "missing_caption": 10})
    with pytest.raises(
        ConfigError, match=r"60 of 150 samples are bad \(mostly undecodable_image: 50\)"
    ):
        check_bad_share(counts, 0.3, final=False)
    check_bad_share(counts, 0.5, final=True)
    few = ShardCounts(1, 1, 9, {"not_a_tar": 9})
    check_bad_share(few, 0.5, final=False)  # too few to judge, until the end
    with pytest.raises(ConfigError):
        check_bad_share(few, 0.5, final=True)


def test_too_many_unreadable_shards_stop_the_run() -> None:
    failed = {"a": "it is gone", "b": "not_a_tar: an error page"}
    check_failed_share(failed, 20, 0.1)
    with pytest.raises(ConfigError, match=r"2 of 19 shards cannot be read \(a: it is gone\)"):
        check_failed_share(failed, 19, 0.1)


def test_error_pages_in_place_of_shards_stop_the_run(tmp_path: Path) -> None:
    write_shard(tmp_path / "0.tar", {})
    for number in range(1, 4):
        (tmp_path / f"{number}.tar").write_text("<html>404</html>")
    source = WebDatasetSource(str(tmp_path / "*.tar"))
    info = catalog.describe_encoder(CONFIG.embed)
    with pytest.raises(ConfigError, match=r"[1-3] of 4 shards cannot be read \([1-3]: not_a_tar: "):
        embed(source, source.shards(), info, CONFIG, open_store(tmp_path / "store"))


def test_weights_that_cannot_be_loaded_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They passed the checks and are gone by now. The actor that finds it is not started again."""
    source = ScenesSource("scenes:10")
    info = catalog.describe_encoder(CONFIG.embed)
    gone = dataclasses.replace(info, load_args=(("model_name", f"local-dir:{tmp_path / 'gone'}"),))
    # an actor whose constructor raised would end the run in another way
    monkeypatch.setattr(ray.data.DataContext.get_current(), "max_consecutive_actor_init_deaths", 0)
    with pytest.raises(UserError, match="cannot load the weights"), unwrapped_errors():
        embed(source, source.shards(), gone, CONFIG, open_store(tmp_path / "store"))


def test_an_actor_encodes_while_it_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each thread stays in its write until the other is there: both encoded, never at once."""
    source = ScenesSource("scenes:8")
    (shard,) = source.shards()
    (raw,) = core.read_blocks(source, shard, ShardFile(shard, changed=False).note())
    info = catalog.describe_encoder(CONFIG.embed)
    config = dataclasses.replace(CONFIG.embed, precision="fp32")
    worker = EmbedWorker(info, config, open_store(tmp_path), InFlight())
    writing, encoding, most = threading.Barrier(EmbedWorker.THREADS), 0, 0
    embed_block, commit = core.embed_block, EmbeddingStore.commit

    def embed_slowly(*args):
        nonlocal encoding, most
        encoding += 1
        most = max(most, encoding)
        time.sleep(0.1)
        part = embed_block(*args)
        encoding -= 1
        return part

    def commit_together(*args):
        writing.wait(timeout=60)
        commit(*args)

    monkeypatch.setattr(core, "embed_block", embed_slowly)
    monkeypatch.setattr(EmbeddingStore, "commit", commit_together)
    block = core.decode_block(raw, info.preprocess, CONFIG.read)
    other = block.set_column(
        block.schema.get_field_index("shard"), "shard", pa.array(["other"] * block.num_rows)
    )
    with ThreadPoolExecutor(EmbedWorker.THREADS) as threads:
        rows = [row for table in threads.map(worker, [block, other]) for row in table.to_pylist()]
    assert [(row["committed"], row["problem"]) for row in rows] == [(True, None)] * 2
    assert most == 1
    assert all(row["busy_s"] >= 0.1 and row["idle_s"] >= 0 for row in rows)
