"""The command line: parse, validate, call the API, print; nothing else.

Exit codes: 0 done, 1 an error of ours, 2 something the user can mend, 130 interrupted.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn

from pds_ray import __version__
from pds_ray.config import METHODS, ConfigError, EvaluateConfig, RunConfig, flatten, replace, sections, to_dict
from pds_ray.errors import UserError, first_line, without_secrets

EXIT_OK, EXIT_BUG, EXIT_USER, EXIT_INTERRUPTED = 0, 1, 2, 130
QUIET = {  # libraries that print on import or on load
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(
            f"pds-ray: {without_secrets(message)} (see {self.prog} --help; patterns of --source need quotes)",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_USER)


def _add_config_options(
    parser: argparse.ArgumentParser, only: tuple[str, ...] | None = None, top: type = RunConfig
) -> None:
    """A flag for every field of the configuration `top`: --prune.ratio, and the other names it is known by.

    `only` names the sections and dotted fields that get one; "" are the fields outside of sections.
    """
    for section, cls in {"": top, **sections(top)}.items():
        fields = {
            f"{section}.{f.name}" if section else f.name: f for f in dataclasses.fields(cls) if "doc" in f.metadata
        }
        if only is not None and section not in only:
            fields = {dotted: field for dotted, field in fields.items() if dotted in only}
        if not fields:
            continue
        about = (cls.__doc__ or "").splitlines()[0] if section else None
        group = parser.add_argument_group(section or top.__name__.removesuffix("Config").lower(), about)
        for dotted, field in fields.items():
            known_as = (dotted.replace("_", "-"), dotted, *field.metadata["aliases"])
            default = "" if field.default in (None, "") else f" [{field.default}]"
            group.add_argument(
                *dict.fromkeys(f"--{name}" for name in known_as),
                dest=dotted,
                metavar=field.name.upper(),
                default=argparse.SUPPRESS,
                help=(field.metadata["doc"] + default).replace("%", "%%"),
            )


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = _Parser(prog="pds-ray", description="Distil image-text data into a few image-caption pairs, on Ray.")
    parser.add_argument("--version", action="version", version=f"pds-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")

    distill = commands.add_parser(
        "distill",
        help="distil a data set",
        allow_abbrev=False,
        description="Distils a data set into image-caption pairs. Repeating an interrupted command continues it.",
        epilog="Values come from the preset, then the YAML file, then the command line. Every field has a flag.",
    )
    select = commands.add_parser(
        "select",
        help="choose real pairs of a data set",
        allow_abbrev=False,
        description=f"Chooses real pairs of a data set, no picture twice. Methods: {', '.join(METHODS[1:])}.",
        epilog="The result has the form of a distilled set. Repeating an interrupted command continues it.",
    )
    for command in (distill, select):
        command.add_argument("--preset", default="default", help="default, demo, paper or web_scale")
        command.add_argument("--config", metavar="FILE.yaml", help="fields as YAML, sections nested")
        command.add_argument("--dry-run", action="store_true", help="validate, print plan and configuration, stop")
        command.add_argument("--redo", action="store_true", help="redo what depends on a changed configuration")
    _add_config_options(distill)
    _add_config_options(select, only=("", "read", "embed", "select", "decode.image_size", "ray"))

    evaluate = commands.add_parser(
        "evaluate",
        help="train models on a distilled set and measure retrieval",
        allow_abbrev=False,
        description="Trains fresh models on a distilled set, ours or any in its layout, and measures image-text "
        "retrieval on a held-out split. Repeating an interrupted command continues it.",
    )
    evaluate.add_argument("set", metavar="SET", help="run folder or distilled set")
    evaluate.add_argument("--out", metavar="FOLDER", help="where evaluation/ is made [SET]")
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")
    compare = commands.add_parser(
        "compare",
        help="methods side by side: distil, select, train, measure, tabulate",
        allow_abbrev=False,
        description="Makes a set with every method at every size from one source and measures them all alike. "
        "Repeating an interrupted command continues it.",
    )
    compare.add_argument("--preset", default="default", help="default, demo, paper or web_scale")
    compare.add_argument("--config", metavar="FILE.yaml", help="fields of the runs as YAML, sections nested")
    compare.add_argument(
        "--methods",
        default=",".join(METHODS[1:] + METHODS[:1]),
        help="methods by comma, each with changes behind it if wanted: pds+match.filter=false [%(default)s]",
    )
    compare.add_argument("--ablations", action="store_true", help="add the ablations of the paper to the methods")
    compare.add_argument("--pairs", default="100", help="sizes by comma [%(default)s]")
    compare.add_argument("--redo", action="store_true", help="redo what depends on a changed configuration")
    _add_config_options(
        compare,
        only=(
            "source",
            "out",
            "seed",
            "read",
            "embed",
            "select",
            "prune",
            "cluster",
            "match",
            "decode",
            "caption",
            "ray",
        ),
    )
    evaluation_fields = ("test", "val", "backbones", "seeds", "workers", "trials", "max_failures", "protocol")
    _add_config_options(evaluate, only=(*evaluation_fields, "ray"), top=EvaluateConfig)
    _add_config_options(compare, only=evaluation_fields, top=EvaluateConfig)
    for command in (evaluate, compare):
        command.add_argument("--protocol", default="standard", help="standard, or paper (best epoch on test)")

    _add_planning(commands)
    show = commands.add_parser("show", help="what a run is and how far it is")
    show.add_argument("run", metavar="RUN")
    show.add_argument("--json", action="store_true", help="run.json as it is")
    show.add_argument("--sheet", metavar="FILE.png", help="also draw the distilled pairs as one picture")

    report = commands.add_parser(
        "report",
        help="a run, or a comparison, as one HTML page",
        description="Writes a run folder, or the folder of a comparison, as one HTML file that opens offline.",
    )
    report.add_argument("run", metavar="RUN")
    report.add_argument("--out", metavar="FILE.html", help="where to [RUN/report.html]")

    retry = commands.add_parser(
        "retry-failed",
        help="try again what failed in a run",
        allow_abbrev=False,
        description="Tries again the shards that could not be read and the samples that killed their process, then "
        "redoes what depends on them, if anything came of it.",
    )
    retry.add_argument("run", metavar="RUN")
    _add_config_options(retry, only=("source", "ray"))

    verify = commands.add_parser(
        "verify",
        help="check every file and count of a run",
        allow_abbrev=False,
        description="Checks every file of a run against the hashes and counts of its manifests. Exit code 2 if "
        "something is missing or corrupt.",
    )
    verify.add_argument("run", metavar="RUN")
    verify.add_argument("--repair", action="store_true", help="do anew what is missing or corrupt, and nothing else")
    _add_config_options(verify, only=("source", "embed.store", "ray"))

    commands.add_parser("doctor", help="hardware, versions, weights and paths found, and what is missing")
    for command in commands.choices.values():
        command.add_argument("-v", "--verbose", action="store_true", help="show stack traces and library messages")
    return parser


def _add_planning(commands: Any) -> None:
    """The commands bench and plan."""
    bench = commands.add_parser(
        "bench",
        help="measure this machine for pds-ray plan",
        allow_abbrev=False,
        description="Measures with the engine's own code what a plan needs: reading, encoding, clustering, decoding, "
        "and what it takes to start. Takes a minute or two with the built-in models.",
    )
    bench.add_argument("--preset", default="demo", help="default, demo, paper or web_scale [%(default)s]")
    bench.add_argument("--config", metavar="FILE.yaml", help="fields as YAML, sections nested")
    bench.add_argument("--out", dest="rates", metavar="RATES.json", help="where to [the cache folder of the user]")
    _add_config_options(bench, only=("source", "read", "embed", "decode", "ray.num_cpus", "ray.object_store_gib"))
    plan = commands.add_parser(
        "plan",
        help="foretell time, hardware and cost of a run",
        allow_abbrev=False,
        description="Foretells stage by stage what a run takes, each figure with its formula and where its rate comes "
        "from: measured by pds-ray bench, published, or assumed.",
        epilog="Give --pairs-in, or --source to count one. Without --gpus it is the machine that was measured.",
    )
    plan.add_argument("--preset", default="web_scale", help="default, demo, paper or web_scale [%(default)s]")
    plan.add_argument("--config", metavar="FILE.yaml", help="fields as YAML, sections nested")
    plan.add_argument("--pairs-in", metavar="N", help="pairs of the source, such as 400M or 5.85B")
    plan.add_argument("--captions-per-image", metavar="N", default="1", help="of --pairs-in [%(default)s]")
    plan.add_argument("--bytes-per-pair", metavar="N", default="24k", help="of --pairs-in, as stored [%(default)s]")
    plan.add_argument("--gpus", metavar="NxKIND", help="such as 64xH100; 0 for none")
    plan.add_argument("--cpus", metavar="N", help="CPU cores in all [8 a GPU]")
    plan.add_argument("--rates", metavar="RATES.json", help="what pds-ray bench measured [its default place]")
    plan.add_argument(
        "--prices", metavar="FILE.yaml", help="USD: gpu_hour by kind, core_hour, storage_tb_month, egress_tb"
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    _add_config_options(
        plan,
        only=(
            "source",
            "pairs",
            "embed",
            "prune",
            "cluster",
            "match",
            "decode",
            "caption",
            "ray.embed_workers",
            "ray.decode_workers",
        ),
    )


def resolve(args: argparse.Namespace) -> RunConfig:
    """Preset, YAML file and flags -> the configuration. Raises ConfigError in one line."""
    from pds_ray.recipes import recipe

    config = recipe(args.preset)
    if args.config:
        config = replace(config, flatten(_read_yaml(args.config)))
    return replace(config, _changes(args))


def _read_yaml(path: str) -> dict[str, Any]:
    import yaml

    try:
        with open(path, encoding="utf-8") as stream:
            value = yaml.safe_load(stream)
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"--config {path} must hold fields such as 'pairs: 100', not {type(value).__name__}")
    return value


def _distill(args: argparse.Namespace) -> None:
    from pds_ray import pipeline
    from pds_ray.summary import print_plan, print_summary

    config = resolve(args)
    if args.command == "select" and config.method not in METHODS[1:]:
        raise ConfigError(f"which pairs? give --method, one of {', '.join(METHODS[1:])}")
    if args.dry_run:
        print_plan(pipeline.plan(config))
        return
    manifest = pipeline.distill(config, redo=args.redo)
    print_summary(config.out, manifest)
    _report_at_the_end(config.out, args.verbose)


def _report_at_the_end(path: str, verbose: bool) -> None:
    """The report of what has just been done; that it fails must not make a finished run look failed."""
    try:
        from pds_ray.report.page import write_report

        print(f"{'report':<13} {write_report(path, quick=True)}")
    except BrokenPipeError:
        raise
    except Exception as error:
        if verbose:
            traceback.print_exc()
        line = first_line(error)
        print(f"pds-ray: the run is done, but not its report: {type(error).__name__}: {line}", file=sys.stderr)


def _report(args: argparse.Namespace) -> None:
    from pds_ray.report.page import write_report

    print(write_report(args.run, args.out))


def _evaluation(args: argparse.Namespace) -> EvaluateConfig:
    """Protocol and flags -> the configuration of an evaluation. Raises ConfigError in one line."""
    from pds_ray.recipes import protocol

    config = protocol(args.protocol)
    known = flatten(to_dict(config), EvaluateConfig)
    return replace(config, {name: value for name, value in vars(args).items() if name in known})


def _evaluate(args: argparse.Namespace) -> None:
    from pds_ray.artifacts import RunFolder
    from pds_ray.evaluation import evaluate
    from pds_ray.storage import Folder
    from pds_ray.summary import print_evaluation

    result = evaluate(args.set, _evaluation(args), args.out)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print_evaluation(result)
    if args.out is None and Folder(args.set).exists(RunFolder.MANIFEST):
        _report_at_the_end(args.set, args.verbose)


def _compare(args: argparse.Namespace) -> None:
    from pds_ray.comparison import ablations, compare
    from pds_ray.summary import print_comparison

    sizes = [size.strip() for size in args.pairs.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(f"--pairs is {args.pairs!r}; it must be whole numbers by comma, such as 100,500")
    methods = [method.strip() for method in args.methods.split(",") if method.strip()]
    args.pairs = sizes[0]  # the field of a run; each gets its own
    config, judged = resolve(args), _evaluation(args)
    methods += ablations(config, judged) if args.ablations else []
    table = compare(config, methods, [int(size) for size in sizes], judged, redo=args.redo)
    print_comparison(args.out, table)
    _report_at_the_end(args.out, args.verbose)


def _bench(args: argparse.Namespace) -> None:
    from pds_ray.bench import bench
    from pds_ray.planning import default_rates
    from pds_ray.storage import Folder
    from pds_ray.summary import print_rates

    path = os.path.abspath(args.rates or default_rates())
    folder, name = os.path.split(path)
    Folder(folder).create()
    rates = bench(resolve(args))
    Folder(folder).write_json(name, rates)
    print_rates(path, rates)


def _plan(args: argparse.Namespace) -> None:
    from pds_ray import planning
    from pds_ray.summary import print_forecast

    count = planning.parse_count
    config = resolve(args)
    if args.pairs_in is not None:
        if "source" in args:
            raise ConfigError("--pairs-in and --source are given; give one of them")
        config = replace(config, {"source": ""})
        work = planning.web_workload(
            count(args.pairs_in, "--pairs-in"),
            count(args.captions_per_image, "--captions-per-image"),
            count(args.bytes_per_pair, "--bytes-per-pair"),
        )
    elif not config.source:
        raise ConfigError("plan what? give --pairs-in, such as 400M, or --source")
    path = Path(args.rates) if args.rates else planning.default_rates()
    measured = planning.read_rates(path) if args.rates or path.is_file() else None
    cluster = planning.make_cluster(args.gpus, count(args.cpus, "--cpus") if args.cpus else None, measured)
    prices = planning.read_prices(args.prices)
    if args.pairs_in is None:
        from pds_ray.bench import survey

        work = survey(config.source)
    forecast = planning.make_plan(config, work, cluster, measured, prices)
    if args.json:
        print(json.dumps(planning.to_json(forecast), indent=2))
    else:
        print_forecast(forecast, measured)


def _show(args: argparse.Namespace) -> None:
    from pds_ray.artifacts import RunFolder
    from pds_ray.manifest import RunManifest
    from pds_ray.storage import Folder
    from pds_ray.summary import print_summary

    run = RunFolder(Folder(args.run))
    if not run.folder.exists(RunFolder.MANIFEST):
        raise ConfigError(f"{args.run} is no run folder: it has no {RunFolder.MANIFEST}")
    manifest = RunManifest(run).data
    if args.json:
        print(json.dumps(manifest, indent=2))
    else:
        print_summary(args.run, manifest)
    if args.sheet:
        from pds_ray.report.contact_sheet import contact_sheet
        from pds_ray.stages.materialize import load_distilled

        sheet = contact_sheet(load_distilled(args.run))
        try:
            sheet.save(args.sheet)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot write --sheet {args.sheet}: {error}") from error
        print(f"contact sheet {args.sheet}", file=sys.stderr)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a run's configuration that flags were given for."""
    known = flatten(to_dict(RunConfig()))
    return {name: value for name, value in vars(args).items() if name in known}


def _retry_failed(args: argparse.Namespace) -> None:
    from pds_ray.summary import print_summary
    from pds_ray.upkeep import retry_failed

    print_summary(args.run, retry_failed(args.run, _changes(args)))
    _report_at_the_end(args.run, args.verbose)


def _verify(args: argparse.Namespace) -> None:
    from pds_ray.summary import print_problems, print_summary
    from pds_ray.upkeep import repair, verify

    files, problems = verify(args.run, _changes(args))
    print_problems(files, problems)
    if problems and not args.repair:
        raise SystemExit(EXIT_USER)
    if problems:
        print_summary(args.run, repair(args.run, problems, _changes(args)))
        files, problems = verify(args.run, _changes(args))
        print_problems(files, problems)
        if problems:
            raise SystemExit(EXIT_BUG)


def _doctor(_: argparse.Namespace) -> None:
    from pds_ray.doctor import examine

    if not examine():
        raise SystemExit(EXIT_USER)


COMMANDS = {
    "distill": _distill,
    "select": _distill,
    "evaluate": _evaluate,
    "compare": _compare,
    "bench": _bench,
    "plan": _plan,
    "show": _show,
    "report": _report,
    "retry-failed": _retry_failed,
    "verify": _verify,
    "doctor": _doctor,
}


def main(argv: list[str] | None = None) -> None:
    """Entry point of `pds-ray`."""
    args = build_parser().parse_args(argv)
    if not args.verbose:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        warnings.filterwarnings("ignore")
    for number in (signal.SIGINT, signal.SIGTERM):  # a stopped job ends like an interrupted one, in the background too
        signal.signal(number, signal.default_int_handler)
    try:
        COMMANDS[args.command](args)
        code = EXIT_OK
    except KeyboardInterrupt:
        print("\npds-ray: interrupted; the same command continues", file=sys.stderr, flush=True)
        # not through Ray's own shutdown: interrupted while it starts, it crashes; its processes die with this one
        os._exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # whoever read our output had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_OK
    except Exception as error:
        if args.verbose:
            raise
        line = first_line(error)
        if isinstance(error, UserError):
            print(f"pds-ray: {line}", file=sys.stderr)
            code = EXIT_USER
        else:
            print(f"pds-ray: {type(error).__name__}: {line} (-v shows where)", file=sys.stderr)
            code = EXIT_BUG
    if "ray" in sys.modules:
        from pds_ray.distributed import runtime

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done: an interrupt now would only spoil the exit code
        runtime.stop()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
