"""Source and run folder on an S3 server, with credentials in the URIs; the network may fail."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from pds_ray import load_distilled
from pds_ray.sources.base import Sample
from pds_ray.sources.scenes import ScenesSource
from pds_ray.store.storage import LOCK
from tests.support.command_line import SOURCE, Run, content, process
from tests.support.object_store import BUCKET, KEY, SECRET, Faults, client, objects, proxy, uri

pytestmark = pytest.mark.ray
SMALL = ["distill", "--preset", "demo", "--pairs", "5", "--decode.decoder", "nearest"]
LOGIN = f"{KEY}:{quote(SECRET, safe='')}@"
TELLTALES = (KEY, SECRET.partition("+")[2])  # what stands in the secret in any spelling


@pytest.fixture(scope="module")
def network(s3_port: int) -> Iterator[tuple[int, Faults]]:
    """Yield a proxy, harmless so far, before a bucket with 90 pairs in three tars."""
    source = ScenesSource(SOURCE)
    samples = [
        item for shard in source.shards() for item in source.read(shard) if isinstance(item, Sample)
    ]
    for number in range(3):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w") as tar:
            for place, sample in enumerate(samples[number::3]):
                for suffix, data in (("png", sample.image), ("txt", sample.captions[0].encode())):
                    member = tarfile.TarInfo(f"{place:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        client(s3_port).put_object(
            Bucket=BUCKET, Key=f"scenes/{number:05d}.tar", Body=stream.getvalue()
        )
    faults = Faults()
    with proxy(s3_port, faults) as port:
        yield port, faults


@pytest.fixture(scope="module")
def reference(
    network: tuple[int, Faults], tmp_path_factory: pytest.TempPathFactory, pds_ray: Run
) -> Path:
    """Make the run in a local folder, its source read while the network is good."""
    out = tmp_path_factory.mktemp("reference") / "run"
    source = uri(network[0], "scenes/*.tar", LOGIN)
    done = pds_ray(*SMALL, "--source", source, "--out", str(out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield the folder of Ray's sessions in this test; short, for paths of sockets are."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def leaks(name: str, text: str | bytes) -> list[str]:
    """Return the places of a text where parts of the credentials stand."""
    assert all(word in uri(0, "x", LOGIN) for word in TELLTALES)  # or nothing could be found
    data = text.encode() if isinstance(text, str) else text
    return [
        f"{name}: {data[max(0, at - 200) : at + 60]!r}"
        for word in TELLTALES
        if (at := data.find(word.encode())) >= 0
    ]


def stored(port: int) -> dict[str, bytes]:
    """Return the files of the run and of its embedding store, named as those of a local run."""
    embeddings = objects(port, "store").items()
    return objects(port, "run") | {f"embeddings/{name}": data for name, data in embeddings}


def check_same(made: dict[str, bytes], reference: Path) -> None:
    diary = ("run.json", "hashes/run.json", "report.html")
    expected = {name: data for name, data in content(reference).items() if not name.endswith(LOCK)}
    assert {name: data for name, data in made.items() if name not in diary} == expected
    assert made.keys() >= set(diary)
    manifest = json.loads(made["run.json"])
    assert {entry["status"] for entry in manifest["stages"].values()} == {"done"}


def arguments(port: int) -> list[str]:
    """Return the command of a run whose source, folder and store are on the server."""
    source, out, store = (uri(port, name, LOGIN) for name in ("scenes/*.tar", "run", "store"))
    return [*SMALL, "--source", source, "--out", out, "--embed.store", store, "-v"]


@pytest.mark.long
def test_a_run_on_a_good_network(
    network: tuple[int, Faults], reference: Path, s3_port: int, pds_ray: Run
) -> None:
    """It has the bytes of the local one, is verified, and says no secret."""
    port, _ = network
    done = pds_ray(*arguments(port))
    assert done.returncode == 0, done.stderr
    made = stored(s3_port)
    check_same(made, reference)
    out, store = uri(port, "run", LOGIN), uri(port, "store", LOGIN)
    verified = pds_ray("verify", out, "--embed.store", store)
    assert "all as written" in verified.stdout, verified.stderr
    said = done.stdout + done.stderr + verified.stdout + verified.stderr
    assert [leak for name, text in made.items() for leak in leaks(name, text)] == []
    assert leaks("output", said) == []
    empty(s3_port)


def empty(port: int) -> None:
    """Remove the run and its store."""
    s3 = client(port)
    for prefix in ("run", "store"):
        for name in objects(port, prefix):
            s3.delete_object(Bucket=BUCKET, Key=f"{prefix}/{name}")


def _check_repair(
    port: int, run: list[str], source: str, call: Callable[..., tuple[int, str]]
) -> None:
    """Damage the store: `verify` names what is missing or wrong, and repairs it to its bytes."""
    s3 = client(port)
    before = objects(port, "run"), objects(port, "store")
    code, said = call("verify", *run)
    assert (code, "all as written" in said) == (0, True), said
    marker = next(name for name in before[1] if name.endswith(".json"))
    wrong = {**json.loads(before[1][marker]), "pairs": 1}
    s3.put_object(Bucket=BUCKET, Key=f"store/{marker}", Body=json.dumps(wrong).encode())
    s3.delete_object(Bucket=BUCKET, Key="run/images/000003.png")
    code, said = call("verify", *run)
    assert code == 2
    assert marker in said
    assert "images/000003.png: missing" in said
    code, said = call("verify", *run, "--repair", "--source", source)
    assert code == 0, said
    after = objects(port, "run"), objects(port, "store")
    for made, expected in zip(after, before, strict=True):
        diary = {"run.json", "hashes/run.json", "report.html"}
        assert made.keys() == expected.keys()
        assert [name for name in made.keys() - diary if made[name] != expected[name]] == []


@pytest.mark.long
def test_a_run_on_a_failing_network(
    network: tuple[int, Faults], reference: Path, s3_port: int, ray_folder: Path, pds_ray: Run,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """It has the bytes of the local one, and no command, file or log of Ray tells a secret."""
    port, faults = network
    empty(s3_port)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    faults.errors = faults.cut_downloads = faults.cut_uploads = faults.delayed = 0.05
    done = process(*arguments(port))
    assert done.returncode == 0, done.stderr
    assert faults.struck > 10
    faults.errors = faults.cut_downloads = faults.cut_uploads = faults.delayed = 0
    made = stored(s3_port)
    check_same(made, reference)
    said = [done.stdout, done.stderr]

    def call(*args: str) -> tuple[int, str]:
        """Run a command in this process; return its exit code and all that it says."""
        done = pds_ray(*args)
        said.append(done.stdout + done.stderr)
        return done.returncode, said[-1]

    out, store = uri(port, "run", LOGIN), uri(port, "store", LOGIN)
    assert call(*arguments(port))[0] == 0  # once more: all is there
    assert call(*arguments(port), "--dry-run")[0] == 0
    code, shown = call("show", out, "--sheet", str(tmp_path / "sheet.png"))
    assert code == 0
    assert uri(port, "run/distilled") in shown
    assert call("report", out, "--out", str(tmp_path / "report.html"))[0] == 0
    mine, local = load_distilled(out), load_distilled(str(reference))
    assert len(mine) == 5
    assert mine.image(4).tobytes() == local.image(4).tobytes()

    source = uri(port, "scenes/*.tar", LOGIN)
    raw = uri(port, "scenes/*.tar", f"{KEY}:{SECRET}@")  # the slash in the secret is not encoded
    for failing in (
        [*SMALL, "--source", uri(port, "none/*.tar", LOGIN), "--out", out],
        [*SMALL, "--source", source + "&colour=red", "--out", out, "-v"],
        [*SMALL, "--source", raw, "--out", out],
        [*SMALL, "--source", raw, "--out", out, "-v"],
        [*SMALL, "--source", source, "--out", raw, "-v"],
        [*SMALL, source, "--out", out],
        [*SMALL, "--source", source, "--out", out, "--seed", "1", "-v"],
        ["show", uri(port, "nowhere", LOGIN)],
        ["report", uri(port, "nowhere", LOGIN), "-v"],
        ["evaluate", uri(port, "nowhere", LOGIN), "--test", uri(port, "none/*.tar", LOGIN)],
        ["evaluate", out, "--test", source],
    ):
        code, text = call(*failing)
        assert code in (1, 2), text
        assert BUCKET in text or "unrecognized" in text or "Cannot parse" in text, text
    _check_repair(s3_port, [out, "--embed.store", store], source, call)

    found = [leak for text in said for leak in leaks("output", text)]
    for name, data in made.items():
        found += leaks(name, data)
    logs = [path for path in ray_folder.rglob("*") if path.is_file()]
    assert logs
    for path in logs:
        found += leaks(str(path), path.read_bytes())
    assert found == []
