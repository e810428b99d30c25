"""Source and run folder on an S3 server, through a network that fails, with credentials in the URIs."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from pds_ray import load_distilled
from pds_ray.cli import main as cli
from pds_ray.sources.base import Sample
from pds_ray.sources.scenes import ScenesSource
from pds_ray.store.storage import LOCK
from tests.support.command_line import Run, command, content
from tests.support.object_store import BUCKET, KEY, SECRET, Faults, client, objects, proxy, uri

pytestmark = pytest.mark.ray
SMALL = ["distill", "--preset", "demo", "--pairs", "5", "--decode.decoder", "nearest"]
LOGIN = f"{KEY}:{quote(SECRET, safe='')}@"
TELLTALES = (KEY, SECRET.partition("+")[2])  # what stands in the secret in any spelling


@pytest.fixture(scope="module")
def network(s3_port: int) -> Iterator[tuple[int, Faults]]:
    """A proxy that does no harm yet, before a bucket with 90 pairs in three tars."""
    source = ScenesSource("scenes:90")
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
def reference(network: tuple[int, Faults], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in a local folder, its source read while the network is good."""
    out = tmp_path_factory.mktemp("reference") / "run"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }
    arguments = [*SMALL, "--source", uri(network[0], "scenes/*.tar"), "--out", str(out)]
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def ray_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where Ray keeps its sessions in this test; short, for sockets' paths are."""
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    monkeypatch.setenv("RAY_TMPDIR", str(folder))
    yield folder
    shutil.rmtree(folder)


def told(name: str, text: str | bytes) -> list[str]:
    assert all(word in uri(0, "x", LOGIN) for word in TELLTALES)  # or nothing could be found
    data = text.encode() if isinstance(text, str) else text
    return [
        f"{name}: {data[max(0, at - 200) : at + 60]!r}"
        for word in TELLTALES
        if (at := data.find(word.encode())) >= 0
    ]


def _check_repair(
    port: int, run: list[str], source: str, call: Callable[..., tuple[int, str]], pds_ray: Run
) -> None:
    """What is missing or wrong on the store is named, and done anew to the same bytes."""
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
    done = pds_ray("verify", *run, "--repair", "--source", source)
    assert done.returncode == 0, done.stderr
    after = objects(port, "run"), objects(port, "store")
    for made, expected in zip(after, before, strict=True):
        told = {"run.json", "report.html"}
        assert made.keys() == expected.keys()
        assert [name for name in made.keys() - told if made[name] != expected[name]] == []


def test_a_run_on_an_object_store(
    network: tuple[int, Faults], reference: Path, s3_port: int, ray_folder: Path, pds_ray: Run, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It has the bytes of the local one, whatever the network does, and tells no secret anywhere."""
    port, faults = network
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    out, store = uri(port, "run", LOGIN), uri(port, "store", LOGIN)
    arguments = [
        *SMALL,
        "--source",
        uri(port, "scenes/*.tar", LOGIN),
        "--out",
        out,
        "--embed.store",
        store,
        "-v",
    ]
    faults.errors = faults.cut_downloads = faults.cut_uploads = faults.delayed = 0.05
    faults.hidden, faults.late = 1, 0.1
    done = pds_ray(*arguments)
    assert done.returncode == 0, done.stderr
    assert faults.struck > 10
    faults.errors = faults.cut_downloads = faults.cut_uploads = faults.delayed = 0
    faults.hidden = 0

    made = objects(s3_port, "run") | {
        f"embeddings/{name}": data for name, data in objects(s3_port, "store").items()
    }
    manifest = json.loads(made.pop("run.json"))
    assert "report.html" in made
    page = made.pop("report.html")
    assert made == {
        name: data for name, data in content(reference).items() if not name.endswith(LOCK)
    }
    assert {entry["status"] for entry in manifest["stages"].values()} == {"done"}

    said = [*done.stdout.splitlines(), *done.stderr.splitlines()]

    def call(*args: str) -> tuple[int, str]:
        """A command that starts no Ray, in this process: its exit code, and all that it says."""
        try:
            cli.main(list(args))
        except SystemExit as ended:
            code, trace = ended.code, ""
        except Exception:
            code, trace = 1, traceback.format_exc()
        printed = capsys.readouterr()
        said.append(printed.out + printed.err + trace)
        return int(code or 0), said[-1]

    assert call(*arguments)[0] == 0  # once more: all is there
    assert call(*arguments, "--dry-run")[0] == 0
    code, shown = call("show", out, "--sheet", str(tmp_path / "sheet.png"))
    assert code == 0
    assert uri(port, "run/distilled") in shown
    assert call("report", out, "--out", str(tmp_path / "report.html"))[0] == 0
    assert len(load_distilled(out)) == 5
    assert (
        load_distilled(out).image(4).tobytes() == load_distilled(str(reference)).image(4).tobytes()
    )

    source, raw = uri(port, "scenes/*.tar", LOGIN), uri(port, "scenes/*.tar", f"{KEY}:{SECRET}@")
    for failing in (
        [*SMALL, "--source", uri(port, "none/*.tar", LOGIN), "--out", out],
        [*SMALL, "--source", source + "&colour=red", "--out", out, "-v"],
        [*SMALL, "--source", raw, "--out", out],  # the slash in the secret is not encoded
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
    _check_repair(s3_port, [out, "--embed.store", store], source, call, pds_ray)

    leaks = [leak for text in said for leak in told("output", text)]
    for name, data in {**made, "run.json": json.dumps(manifest), "report.html": page}.items():
        leaks += told(name, data)
    logs = [path for path in ray_folder.rglob("*") if path.is_file()]
    assert logs
    for path in logs:
        leaks += told(str(path), path.read_bytes())
    assert leaks == []
