"""export, push and --version, as a person types them."""

from __future__ import annotations

import getpass
import os
import socket
import sys
from pathlib import Path

import pytest

import pds_ray
from pds_ray.cli import main as cli
from tests.support.synthetic_run import make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_run(tmp_path_factory.mktemp("runs") / "run", 3).path)


def type_in(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command."""
    with pytest.raises(SystemExit) as ended:
        cli.main(list(args))
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def test_export(capsys: pytest.CaptureFixture[str], run: str, tmp_path: Path) -> None:
    code, out, _ = type_in(capsys, "export", run, "--format", "parquet", "--to", str(tmp_path))
    size = sum(
        file.stat().st_size for file in tmp_path.rglob("*.*") if file.name != "manifest.json"
    )
    assert (code, out.splitlines()) == (
        0, [f"pairs      3 as parquet, {size:,} bytes", f"result     {tmp_path}"]
    )  # fmt: skip


def test_a_dry_push_lists_files_and_bytes(capsys: pytest.CaptureFixture[str], run: str) -> None:
    code, out, _ = type_in(
        capsys, "push", run, "hf:me/pairs", "--format", "imagefolder", "--dry-run"
    )
    *files, total, url = out.splitlines()
    sizes = {name: int(size.replace(",", "")) for size, name in map(str.split, files)}
    images = [f"imagefolder/{pair:06d}.png" for pair in range(3)]
    assert sizes.keys() == {
        *images, "imagefolder/metadata.jsonl", "README.md", "manifest.json",
        "prototypes.safetensors",
    }  # fmt: skip
    for name in images:
        assert sizes[name] == Path(run, "distilled", name).stat().st_size
    assert total.split() == [f"{sum(sizes.values()):,}", "bytes", "together"]
    assert (code, url) == (0, "would be   https://huggingface.co/datasets/me/pairs")


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["export", "{run}", "--to", "x"], "arguments are required: --format"),
        (["export", "{run}", "--to", "x", "--format", "csv"], "invalid choice: 'csv' (choose from"),
        (["export", "{run}", "--format", "parquet"], "arguments are required: --to"),
        (["export", "/no/run", "--format", "parquet", "--to", "x"], "/no/run is no distilled set"),
        (["push", "{run}", "me/pairs"], "give hf:ORG/NAME"),
        (["push", "{run}", "hf:me/pairs"], "HF_HUB_OFFLINE is set; unset it, or give --dry-run"),
        (["push", "/no/run", "hf:me/pairs", "--dry-run"], "/no/run is no distilled set"),
        ([], "arguments are required: COMMAND"),
    ],
)
def test_one_line_says_what_to_do(
    capsys: pytest.CaptureFixture[str],
    run: str,
    monkeypatch: pytest.MonkeyPatch,
    args: list[str],
    line: str,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    code, _, err = type_in(capsys, *(arg.replace("{run}", run) for arg in args))
    assert code == 2
    (said,) = err.splitlines()
    assert line in said
    assert "hf_secret" not in said


@pytest.mark.parametrize("args", [["--version"], ["--version", "-v"], ["--verbose", "--version"]])
def test_version(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    code, out, _ = type_in(capsys, *args)
    first, *others = out.splitlines()
    assert (code, first, bool(others)) == (0, f"pds-ray {pds_ray.__version__}", len(args) > 1)


def test_a_bug_report_names_versions_and_no_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "pds/Secret")
    _, out, _ = type_in(capsys, "--version", "--verbose")
    rows = dict(line.split(None, 1) for line in out.splitlines())
    assert rows["python"].endswith(".".join(map(str, sys.version_info[:3])))
    for package in ("ray", "torch", "faiss-cpu", "pyarrow", "huggingface_hub"):
        assert f"{package} " in rows["packages"]
    assert "CPUs and" in rows["limits"]
    assert {"HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} <= set(rows["variables"].split(", "))
    private = ("hf_secret", "pds/Secret", os.getcwd(), os.path.expanduser("~"), sys.prefix)
    for secret in (*private, socket.gethostname() + "\n", f"/{getpass.getuser()}"):
        assert secret not in out


def test_a_torch_that_does_not_load_is_a_finding(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, _ = type_in(capsys, "--version", "-v")
    assert code == 0
    assert "torch does not load (ModuleNotFoundError)" in out


def test_the_folders_of_an_export_are_checked_before_a_job(
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = ["submit", "--", "export", "/runs/x", "--format", "parquet", "--to", "out"]
    code, _, err = type_in(capsys, *job)
    assert code == 2
    assert "out is 'out'; a job needs a path that all nodes have" in err
