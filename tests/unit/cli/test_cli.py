"""The command line up to its work: help, files of --config, watching, the last line."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from pds_ray.cli import main as cli
from pds_ray.cli.process import QUIET, interruptible, usable_streams
from pds_ray.config import (
    ConfigError,
    EvaluateConfig,
    RunConfig,
    flatten,
    options,
    sections,
    to_dict,
)
from pds_ray.distributed.lifetime import session_kept
from pds_ray.recipes import protocol, recipe
from pds_ray.store.evaluation_folder import used_parts
from pds_ray.telemetry import log
from tests.support.synthetic_run import add_comparison, add_evaluation, make_run

BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}


class ReachedError(Exception):
    """The call that a command would have made, with its arguments."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs a command up to its work, and returns the arguments of that."""

    def call(*args: Any, **_: Any) -> None:
        raise ReachedError(*args)

    monkeypatch.setattr("pds_ray.engine.evaluate.evaluate", call)
    monkeypatch.setattr("pds_ray.engine.compare.compare", call)
    monkeypatch.setattr("pds_ray.distributed.submit.submit", call)

    def run(*args: str) -> tuple[Any, ...]:
        with pytest.raises(ReachedError) as work:
            cli.COMMANDS[args[0]](cli.build_parser().parse_args(list(args)))
        return work.value.args

    return run


def written(folder: Path, **fields: Any) -> str:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    return str(path)


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("out: 1.10", "out", "1.10"),  # YAML 1.1: 1.1
        ("out: 0123", "out", "0123"),  # 83
        ("seed: 010", "seed", 10),  # 8
        ("out: no", "out", "no"),  # False
        ("out: 2024-01-01", "out", "2024-01-01"),  # a date
        ("cluster: {tolerance: 1e-3}", "cluster.tolerance", 1e-3),  # text
        ("cluster: {normalize: yes}", "cluster.normalize", True),
        ("prune: {<<: {ratio: 0.3}}", "prune.ratio", 0.3),
        ("embed: {store: ~}", "embed.store", None),
        ("pairs: 1_000", "pairs", 1000),
    ],
)
def test_a_file_means_what_the_command_line_means(
    tmp_path: Path, text: str, option: str, value: Any
) -> None:
    (tmp_path / "run.yaml").write_text(text)
    args = cli.build_parser().parse_args(["distill", "--config", str(tmp_path / "run.yaml")])
    assert flatten(to_dict(cli.resolve(args)))[option] == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("pairs: 10\nout: a\npairs: 20", "'pairs' is given twice .*line 3"),
        ("prune: {ratio: 0.1}\npairs: 1\nprune: {ratio: 0.3}", "'prune' is given twice .*line 3"),
        ("prune.ratio: 0.1\nprune: {ratio: 0.3}", "prune.ratio is given twice"),
        ("pairs: 1:30", "pairs is '1:30'; it must be a whole number"),  # YAML 1.1: 90
        ("out: ~", "out has no value"),
        ("source: [a.tar, b.tar]", "source is .* it must be text"),
        ("out: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("? [a]\n: 1", "is not YAML"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    args = cli.build_parser().parse_args(["distill", "--config", str(tmp_path / "run.yaml")])
    with pytest.raises(ConfigError, match=said):
        cli.resolve(args)


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("distill --pair 10", "pds-ray distill --help; near --pair: --pairs"),
        ("distill --num_pair=10", "pds-ray distill --help; near --num_pair: --num-pairs"),
        ("distill --batch-size 9", "near --batch-size: --embed.batch-size, --decode.batch-size"),
        ("distill --qqq 1", "pds-ray distill --help)"),
        (
            "distill --source a.tar b.tar",
            "pds-ray distill --help; patterns of --source need quotes",
        ),
        ("evaluate runs/x --sead 1", "pds-ray evaluate --help; near --sead: --seed"),
    ],
)
def test_words_that_a_command_does_not_know(
    capsys: pytest.CaptureFixture[str], words: str, advice: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        cli.build_parser().parse_args(words.split())
    error = capsys.readouterr().err
    assert refused.value.code == 2
    assert error.startswith("pds-ray: unrecognized arguments: ")
    assert advice in error
    assert error.count("\n") == 1


EVALUATION = {
    "test": "scenes:50:7",
    "backbones": "small_conv",
    "seeds": 2,
    "protocol": {"epochs": 7, "train": "heads"},
    "ray": {"num_cpus": 3},
}


def test_an_evaluation_by_file(called: Any, tmp_path: Path) -> None:
    """Protocol, then file, then flags."""
    config: EvaluateConfig
    path, config, out = called(
        "evaluate",
        "runs/x",
        "--protocol",
        "paper",
        "--config",
        written(tmp_path, **EVALUATION),
        "--seeds",
        "1",
    )
    assert (path, out) == ("runs/x", None)
    assert (config.test, config.backbones, config.seeds) == ("scenes:50:7", "small_conv", 1)
    assert (config.protocol.epochs, config.protocol.train, config.ray.num_cpus) == (7, "heads", 3)
    assert config.protocol.learning_rate == protocol("paper").protocol.learning_rate


def test_a_comparison_by_file(called: Any, tmp_path: Path) -> None:
    """One file holds the fields of runs and of their evaluation."""
    run, judged, sizes = comparison(
        called,
        tmp_path,
        source="scenes:90",
        out="/x",
        pairs="5,10",
        prune={"ratio": 0.1},
        **EVALUATION,
    )
    assert (run.source, run.out, run.prune.ratio, run.ray.num_cpus) == ("scenes:90", "/x", 0.1, 3)
    assert run.embed == recipe("demo").embed
    assert sizes == [5, 10]
    assert (judged.test, judged.seeds, judged.protocol.epochs) == ("scenes:50:7", 2, 7)


@pytest.mark.parametrize(
    ("pairs", "flags", "sizes"),
    [
        ({}, (), [100]),
        ({"pairs": 20}, (), [20]),
        ({"pairs": 20}, ("--pairs", "3,4"), [3, 4]),
        ({"pairs": 20}, ("--budgets", "1kB"), ["1kB"]),
        ({"pairs": 0, "budget": "2kB"}, (), ["2kB"]),
        ({"budget": "2kB"}, ("--pairs", "3"), [3]),
    ],
)
def test_the_sizes_of_a_comparison(
    called: Any, tmp_path: Path, pairs: dict[str, Any], flags: tuple[str, ...], sizes: list[Any]
) -> None:
    assert comparison(called, tmp_path, *flags, **pairs)[2] == sizes


def comparison(
    called: Any, folder: Path, *flags: str, **fields: Any
) -> tuple[RunConfig, EvaluateConfig, list[int]]:
    run, _, sizes, judged = called(
        "compare", "--preset", "demo", "--config", written(folder, **fields), *flags
    )
    return run, judged, sizes


def test_a_comparison_of_budgets(called: Any) -> None:
    run, _, sizes, _ = called(
        "compare", "--preset", "demo", "--budgets", "0.5MB, 2MB,500kB", "--out", "/x"
    )
    assert sizes == ["500kB", "2MB"], "one of two that are the same"
    assert run.budget == ""


def test_show_prints_the_frontiers_of_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {("pds", 6): "a", ("random", 7): "b", ("pds", 20): "c", ("herding", 5): "d"}
    add_comparison(tmp_path, sets, pair_bytes=130, budgets=True)
    cli.COMMANDS["show"](cli.build_parser().parse_args(["show", str(tmp_path)]))
    shown = capsys.readouterr().out
    lines = [line.split() for line in shown.splitlines()]
    rows = [line for line in lines if line[:1] in (["5"], ["6"], ["7"], ["20"])]
    assert [line[:3] for line in rows] == [
        ["6", "780", "pds"],
        ["7", "910", "random"],
        ["5", "650", "herding"],
        ["20", "2,600", "pds"],
    ]
    assert "650 bytes,       5 pairs" in shown
    assert "910 bytes" not in shown, "fewer bytes have a higher recall"
    assert "20,480 pixels per epoch,       5 pairs" in shown
    cli.COMMANDS["show"](cli.build_parser().parse_args(["show", str(tmp_path), "--json"]))
    assert json.loads(capsys.readouterr().out)["cells"][0]["budget"] == 1000


def test_show_says_which_learned_parts_were_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "run").path
    manifest = json.loads((path / "run.json").read_text())
    size = {"pairs": 6, "bytes": 70, "image_bytes": 60, "caption_bytes": 10, "pixels": 5}
    counts = {"pairs": 6, "size": {**size, "learned_bytes": 1234}}
    manifest["stages"] = {"materialize": {"status": "done", "counts": counts}}
    (path / "run.json").write_text(json.dumps(manifest))
    add_evaluation(path, backbones=("a", "b", "c"))
    (file,) = (path / "evaluation").glob("*.json")
    value = json.loads(file.read_text())
    value["backbones"][0]["used"], value["backbones"][1]["used"] = ["images", "text"], []
    file.write_text(json.dumps(value))
    (path / "evaluation" / "other.json").write_text("[]")
    cli.COMMANDS["show"](cli.build_parser().parse_args(["show", str(path)]))
    shown = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("learned       1,234 bytes") for line in shown)
    used = [line for line in shown if line.startswith("used ")]
    assert used == ["used in standard with a: images, text", "used in standard with b: none"]
    cells = [{"method": "lors", "backbone": "a", "used": ["steps"]}, {"method": "random"}]
    assert used_parts(cells) == ["lors with a: steps"]


@pytest.mark.parametrize(
    ("flags", "pairs"),
    [
        (("--preset", "web_scale"), 10_000),
        (("--preset", "web_scale", "--budget", "2MB"), 0),
        (("--preset", "web_scale", "--budget", "2MB", "--pairs", "7"), 7),
    ],
)
def test_a_budget_frees_the_pairs_of_a_preset(flags: tuple[str, ...], pairs: int) -> None:
    config = cli.resolve(cli.build_parser().parse_args(["distill", *flags]))
    assert config.pairs == pairs


def test_a_comparison_is_shown_where_the_file_puts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[str] = []
    monkeypatch.setattr("pds_ray.engine.compare.compare", lambda *_, **__: {})
    monkeypatch.setattr("pds_ray.cli.output.print_comparison", lambda out, _: shown.append(out))
    monkeypatch.setattr(cli, "_report_at_the_end", lambda out, _: shown.append(out))
    cli.COMMANDS["compare"](
        cli.build_parser().parse_args(["compare", "--config", written(tmp_path, out="/x")])
    )
    assert shown == ["/x", "/x"]


@pytest.mark.parametrize(
    ("command", "fields", "line"),
    [
        (
            ["evaluate", "runs/x"],
            {"source": "scenes:9"},
            "unknown option source; known: test, val, backbones",
        ),
        (
            ["evaluate", "runs/x"],
            {"prune": {"ratio": 0}},
            "unknown section 'prune'; known: read, protocol, ray",
        ),
        (
            ["evaluate", "runs/x"],
            {"protocol": {"epoch": 1}},
            "unknown option protocol.epoch; known: protocol.train",
        ),
        (
            ["evaluate", "runs/x"],
            {"protocol": "paper"},
            "protocol is 'paper'; it must be a section",
        ),
        (
            ["compare"],
            {"protocol": {"epoch": 1}},
            "unknown option protocol.epoch; known: protocol.train",
        ),
        (["compare"], {"backbone": "small_conv"}, "unknown option backbone; known: source"),
        (["compare"], {"pairs": "5,x"}, "--pairs is '5,x'"),
        (["compare", "--budgets", "1MB,x"], {}, "--budgets is 'x'; it must be a size such as"),
        (["compare", "--budgets", ","], {}, "--budgets is empty"),
        (["compare", "--budgets", "1MB", "--pairs", "5"], {}, "--pairs and --budgets are given"),
        (["distill"], {"seeds": 2}, "unknown option seeds; known: source"),
    ],
)
def test_unknown_names_are_refused(
    tmp_path: Path, command: list[str], fields: dict[str, Any], line: str
) -> None:
    args = cli.build_parser().parse_args([*command, "--config", written(tmp_path, **fields)])
    with pytest.raises(ConfigError) as refused:
        cli.COMMANDS[args.command](args)
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("command", "fields", "paths"),
    [
        (["evaluate", "/runs/x"], EVALUATION, {"set": "/runs/x", "test": "scenes:50:7"}),
        (["compare"], {**EVALUATION, "out": "/x"}, {"out": "/x", "test": "scenes:50:7"}),
        (["distill"], {"out": "/x", "embed": {"store": "/s"}}, {"out": "/x", "embed.store": "/s"}),
        (["distill", "--out", "/y"], {"out": "/x"}, {"out": "/y"}),
    ],
)
def test_a_file_travels_with_its_job(
    called: Any, tmp_path: Path, command: list[str], fields: dict[str, Any], paths: dict[str, str]
) -> None:
    path = written(tmp_path, **fields)
    job, _ = called("submit", "-v", "--", *command, "--config", path)
    assert (job.paths, job.config, job.command) == (paths, path, [*command, "--config", path])


@pytest.mark.parametrize(
    ("states", "shown", "code"),
    [
        (["running", "running", "finished"], ["running", "running", "finished"], 0),
        (["silent", "silent", "running", "failed"], ["silent", "running", "failed"], 2),
        (
            ["idle", "idle", "silent", "running", "interrupted"],
            ["idle", "silent", "running", "interrupted"],
            2,
        ),
    ],
)
def test_a_run_is_watched_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    states: list[str],
    shown: list[str],
    code: int,
) -> None:
    """A state that may still change is shown once, and watched further."""
    monkeypatch.setattr(cli, "WATCH_S", 0.0)
    found = iter(states)
    monkeypatch.setattr("pds_ray.engine.status.status", lambda _: {"state": next(found)})
    try:
        cli.COMMANDS["status"](
            cli.build_parser().parse_args(["status", "runs/x", "--watch", "--json"])
        )
        ended: Any = 0
    except SystemExit as error:
        ended = error.code
    assert ended == code
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == shown
    assert next(found, None) is None


@pytest.mark.parametrize(
    ("end", "last", "code"),
    [
        ("", "pds-ray: distill done", 0),
        ("raise ConfigError('no such thing')", "pds-ray: no such thing", 2),
        ("raise KeyboardInterrupt", "pds-ray: interrupted; the same command continues", 130),
    ],
)
def test_the_outcome_is_the_last_line(tmp_path: Path, end: str, last: str, code: int) -> None:
    """Also if both streams go to one file, as in a job's log: standard output writes late."""
    script = (
        "from pds_ray.cli import main as cli\nfrom pds_ray.config import ConfigError\n"
        f"def command(args):\n    print('the summary')\n    {end or 'pass'}\n"
        "cli.COMMANDS['distill'] = command\ncli.main(['distill'])\n"
    )
    with (tmp_path / "log").open("w+") as both:
        done = subprocess.run(
            [sys.executable, "-c", script], stdout=both, stderr=both, check=False, env=BUFFERED
        )
        both.seek(0)
        lines = [line for line in both.read().splitlines() if line]
    assert (done.returncode, lines) == (code, ["the summary", last])


@pytest.mark.parametrize(("length", "last"), [(10, ["pds-ray: distill done"]), (100_000, [])])
def test_nobody_has_to_read_to_the_end(length: int, last: list[str]) -> None:
    """Neither what is still held back nor what is written in the middle."""
    script = (
        "from pds_ray.cli import main as cli\n"
        f"cli.COMMANDS['distill'] = lambda args: print('x' * {length})\ncli.main(['distill'])\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=pipe, stderr=pipe, env=BUFFERED
    ) as process:
        process.stdout.close()
        said = process.stderr.read().decode()
    assert (process.returncode, said.splitlines()) == (0, last)


def test_a_report_that_fails_is_an_event(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with log.as_json():
        cli._report_at_the_end(str(tmp_path), verbose=False)  # a folder without a run
    said = json.loads(capsys.readouterr().err)
    assert (said["event"], said["level"]) == ("no_report", "warning")
    assert said["why"] in said["message"]


def test_a_command_leaves_the_process_as_it_was(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several run in one process: handlers of signals, warnings, logging and the form of events."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def state() -> list[Any]:
        handlers = [signal.getsignal(number) for number in signals]
        return [handlers, list(warnings.filters), logging.root.manager.disable, log.is_json()]

    def command(args: argparse.Namespace) -> None:
        assert {signal.getsignal(number) for number in signals} == {signal.default_int_handler}
        logging.disable(logging.INFO)
        log.event("working", "at work")
        warnings.warn("of a library", stacklevel=1)
        if args.only:
            raise ConfigError("no such thing")

    monkeypatch.setitem(cli.COMMANDS, "distill", command)
    for name in QUIET:
        monkeypatch.setenv(name, "")
    hang_up = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
    before = state()
    for flags, code, lines in (
        (["--log", "json"], 0, ["working", "done"]),
        (["--only", "x"], 2, ["at work", "pds-ray: no such thing"]),
        (["--log", "json", "--only", "x"], 2, ["working", "failed"]),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["distill", *flags])
        said = capsys.readouterr().err.splitlines()
        shown = [json.loads(line)["event"] for line in said] if "json" in flags else said
        assert (ended.value.code, shown, state()) == (code, lines, before)
    with pytest.warns(UserWarning, match="of a library"), pytest.raises(ConfigError):
        cli.main(["distill", "-v", "--only", "x"])
    assert state() == before
    signal.signal(signal.SIGHUP, hang_up)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"/tmp/J\xfcrgen \udcff"),
        ("latin-1", b"/tmp/J\xfcrgen \\udcff"),
        ("utf-8", "/tmp/Jürgen \\udcff".encode()),
    ],
)
def test_what_standard_output_cannot_encode_ends_no_command(
    monkeypatch: pytest.MonkeyPatch, encoding: str, shown: bytes
) -> None:
    output = io.TextIOWrapper(buffer := io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setitem(cli.COMMANDS, "show", lambda _: print("/tmp/Jürgen \udcff", end=""))
    with pytest.raises(SystemExit) as ended:
        cli.main(["show", "run"])
    assert (ended.value.code, buffer.getvalue()) == (0, shown)
    assert output.errors == "strict"


def test_a_command_in_a_deleted_folder_says_so(tmp_path: Path) -> None:
    script = (
        "import os\nfrom pds_ray.cli import main as cli\n"
        f"os.chdir({str(tmp_path)!r})\nos.rmdir({str(tmp_path)!r})\ncli.main(['doctor'])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    message = b"pds-ray: the current folder was deleted; change to one that exists, as by `cd`\n"
    assert (done.returncode, done.stderr) == (2, message)


def test_nohup_keeps_a_command_alive() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_closed_streams_are_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """As services and schedulers close them."""
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    usable_streams()
    print("nowhere")
    print("nowhere", file=sys.stderr)
    assert sys.stdin.read() == ""
    assert not sys.stderr.isatty()
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.close()


@pytest.mark.parametrize(("command", "top"), [("distill", RunConfig), ("evaluate", EvaluateConfig)])
def test_help_shows_what_is_allowed_and_the_default(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    top: type,
) -> None:
    monkeypatch.setenv("COLUMNS", "9999")  # nothing is wrapped
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args([command, "--help"])
    shown = capsys.readouterr().out
    for group in (top, *sections(top).values()):
        for option in options(group).values():
            flag = re.escape(option.name.replace("_", "-"))
            (about,) = re.findall(rf"^  --{flag} .*(?:\n {{20,}}.*)?", shown, flags=re.MULTILINE)
            choices = ("true", "false") if option.kind is bool else option.choices
            assert ("{" + ",".join(choices) + "}" if choices else option.allowed) in about
            assert option.doc in about
            if option.default in (None, ""):
                assert "default" in option.doc or option.name in ("source", "out", "test")
            else:
                assert about.lower().endswith(f" [{option.default}]".lower())


def test_a_command_beside_a_run_of_another_thread(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is refused in one line; commands that run nothing go on."""
    monkeypatch.setitem(cli.COMMANDS, "distill", lambda _: None)
    monkeypatch.setitem(cli.COMMANDS, "status", lambda _: None)
    codes = []

    def command(*argv: str) -> None:
        with pytest.raises(SystemExit) as ended:
            cli.main([*argv])
        codes.append(ended.value.code)

    with session_kept():
        for argv in (["distill", "--out", "run"], ["status", "run"]):
            thread = threading.Thread(target=command, args=argv)
            thread.start()
            thread.join()
    assert codes == [2, 0]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pds-ray: another thread of this process is at work on a run")
