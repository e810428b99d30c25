"""The command line: parse, validate, call the API, print; nothing else.

Exit codes: 0 done, 1 an internal error, 2 an error that the user can fix, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from pds_ray import catalog
from pds_ray.cli.parser import EXIT_USER, build_parser
from pds_ray.cli.process import (
    any_character,
    flush,
    ignore_interrupts,
    in_main_thread,
    interruptible,
    quiet,
    usable_streams,
)
from pds_ray.cli.publish import export_set, push_set
from pds_ray.config import (
    PAIRS,
    ConfigError,
    EvaluateConfig,
    RunConfig,
    flatten,
    listed,
    parse_bytes,
    replace,
    to_dict,
)
from pds_ray.distributed.lifetime import session_kept
from pds_ray.distributed.places import require_current_folder
from pds_ray.errors import UserError, first_line, without_secrets
from pds_ray.telemetry import log

RUNS = ("distill", "select", "experts", "evaluate", "compare", "retry-failed")
WATCH_S = 5.0
ENDS = ("finished", "interrupted", "failed")
"""The states of a run in which `status --watch` ends; a silent or idle one may go on."""
EXIT_OK, EXIT_BUG, EXIT_INTERRUPTED = 0, 1, 130
_RUN_FIELDS = {field.name for field in fields(RunConfig)}
EVALUATION_FIELDS = {field.name for field in fields(EvaluateConfig)} - _RUN_FIELDS
"""Fields and sections of an evaluation that a run does not have."""


def resolve(args: argparse.Namespace) -> RunConfig:
    """Return the configuration of a run: preset, then YAML file, then flags.

    Raises ConfigError in one line.
    """
    from pds_ray.recipes import recipe

    written = _written(args)
    if args.command == "compare":
        written = {name: value for name, value in written.items() if not _in_evaluation(name)}
    return replace(recipe(args.preset), {**written, **_changes(args)})


def _written(args: argparse.Namespace) -> dict[str, Any]:
    """Return the dotted fields in the file of --config: of a run, an evaluation, or both."""
    from pds_ray.cli.config_file import read_config

    path = vars(args).get("config")
    return flatten(flatten(read_config(path)), EvaluateConfig) if path else {}


def _in_evaluation(name: str) -> bool:
    return name.partition(".")[0] in EVALUATION_FIELDS


def _distill(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_plan, print_summary
    from pds_ray.engine.plan import make_run
    from pds_ray.engine.run import distill

    config = resolve(args)
    if args.command == "select" and config.method not in catalog.SELECTORS:
        raise ConfigError(f"which pairs? give --method, one of {', '.join(catalog.SELECTORS)}")
    if args.dry_run:
        print_plan(make_run(config))
        return
    only = [stage.strip() for stage in args.only.split(",") if stage.strip()]
    manifest = distill(config, redo=args.redo, only=only)
    print_summary(config.out, manifest)
    if manifest["stages"].get("materialize", {}).get("status") == "done":
        _report_at_the_end(config.out, args.verbose)


def _report_at_the_end(path: str, verbose: bool) -> None:
    """Write the report; its failure must not make a finished run look failed."""
    try:
        from pds_ray.report.page import write_report

        print(f"{'report':<13} {write_report(path, quick=True)}")
    except BrokenPipeError:
        raise
    except Exception as error:
        if verbose:
            traceback.print_exc()
        why = f"{type(error).__name__}: {first_line(error)}"
        again = f"pds-ray report {without_secrets(path)}"
        text = f"pds-ray: the run is done, but not its report: {why}; `{again}` makes it"
        log.event("no_report", text, "warning", why=why)


def _report(args: argparse.Namespace) -> None:
    from pds_ray.report.page import write_report

    print(write_report(args.run, args.out))


def resolve_evaluation(args: argparse.Namespace) -> EvaluateConfig:
    """Return the configuration of an evaluation: protocol, then YAML file, then flags.

    Raises ConfigError in one line.
    """
    from pds_ray.recipes import protocol

    config, written = protocol(args.protocol), _written(args)
    if args.command == "compare":
        written = {name: value for name, value in written.items() if _in_evaluation(name)}
    known = flatten(to_dict(config), EvaluateConfig)
    return replace(
        config, {**written, **{name: value for name, value in vars(args).items() if name in known}}
    )


def _evaluate(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_evaluation
    from pds_ray.engine.evaluate import evaluate
    from pds_ray.store.run_folder import RunFolder
    from pds_ray.store.storage import Folder

    result = evaluate(args.set, resolve_evaluation(args), args.out)
    if args.json:
        print(json.dumps(result, indent=2))
        return
    print_evaluation(result)
    if args.out is None and Folder(args.set).exists(RunFolder.MANIFEST):
        _report_at_the_end(args.set, args.verbose)


def _compare(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_comparison
    from pds_ray.engine.compare import ablations, compare

    sizes = _sizes(args)
    methods = [method.strip() for method in args.methods.split(",") if method.strip()]
    args.pairs = PAIRS  # the field of a run; each gets its own
    config, evaluation = resolve(args), resolve_evaluation(args)
    methods += ablations(config, evaluation) if args.ablations else []
    redo, per_row = args.redo, args.set_seeds
    table = compare(config, methods, sizes, evaluation, redo=redo, set_seeds=per_row)
    print_comparison(config.out, table)
    _report_at_the_end(config.out, args.verbose)


def _sizes(args: argparse.Namespace) -> list[int] | list[str]:
    """Return the sizes of a comparison, budgets or numbers of pairs. Raises ConfigError."""
    written, budgets, pairs = _written(args), args.budgets, args.pairs
    if budgets is None and pairs is None:
        budgets, pairs = written.get("budget") or None, written.get("pairs")
        pairs = None if budgets and str(pairs) == "0" else pairs  # 0 is as many as fit
    if budgets is not None:
        if pairs is not None:
            raise ConfigError("--pairs and --budgets are given; give one of them")
        of_bytes = {parse_bytes(each, "--budgets"): each for each in listed(str(budgets))}
        if not of_bytes:
            raise ConfigError("--budgets is empty; give sizes by comma, such as 0.5MB,2MB")
        return list(of_bytes.values())
    pairs = str(PAIRS if pairs is None else pairs)
    sizes = [size.strip() for size in pairs.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ConfigError(
            f"--pairs is {pairs!r}; it must be whole numbers by comma, such as 100,500"
        )
    return [int(size) for size in sizes]


def _experts(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_experts, print_experts_plan
    from pds_ray.engine.experts import experts, forecast

    config = resolve(args)
    if args.dry_run:
        print_experts_plan(*forecast(config))
        return
    print_experts(config.experts.store, experts(config))


def _bench(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_rates
    from pds_ray.planning.bench import bench
    from pds_ray.planning.figures import default_rates
    from pds_ray.store.storage import Folder

    path = os.path.abspath(args.rates or default_rates())
    folder, name = os.path.split(path)
    Folder(folder).create()
    rates = bench(resolve(args))
    Folder(folder).write_json(name, rates)
    print_rates(path, rates)


def _plan(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_forecast
    from pds_ray.planning.figures import default_rates, read_prices, read_rates
    from pds_ray.planning.plan import make_plan, to_json
    from pds_ray.planning.workload import make_cluster, parse_count, survey, web_workload

    config = resolve(args)
    if args.pairs_in is not None:
        if "source" in args:
            raise ConfigError("--pairs-in and --source are given; give one of them")
        config = replace(config, {"source": ""})
        work = web_workload(
            parse_count(args.pairs_in, "--pairs-in"),
            parse_count(args.captions_per_image, "--captions-per-image"),
            parse_count(args.bytes_per_pair, "--bytes-per-pair"),
        )
    elif not config.source:
        raise ConfigError("plan what? give --pairs-in, such as 400M, or --source")
    path = Path(args.rates) if args.rates else default_rates()
    measured = read_rates(path) if args.rates or path.is_file() else None
    cpus = parse_count(args.cpus, "--cpus") if args.cpus else None
    cluster = make_cluster(args.gpus, cpus, measured)
    prices = read_prices(args.prices)
    if args.pairs_in is None:
        work = survey(config.source, config.read)
    forecast = make_plan(config, work, cluster, measured, prices)
    if args.json:
        print(json.dumps(to_json(forecast), indent=2))
    else:
        print_forecast(forecast, measured)


def _show(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_comparison, print_summary
    from pds_ray.store.evaluation_folder import read_table
    from pds_ray.store.manifest import RunManifest

    if not args.sheet and (table := read_table(args.run)):
        if args.json:
            print(json.dumps(table, indent=2))
        else:
            print_comparison(args.run, table)
        return
    manifest = RunManifest.open(args.run).data
    if args.json:
        print(json.dumps(manifest, indent=2))
    else:
        print_summary(args.run, manifest)
    if args.sheet:
        from pds_ray.report.contact_sheet import contact_sheet
        from pds_ray.store.distilled_set import load_distilled

        sheet = contact_sheet(load_distilled(args.run))
        try:
            sheet.save(args.sheet)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"cannot write --sheet {args.sheet}: {first_line(error)}; give a .png in a folder "
                "that is there"
            ) from error
        log.event("sheet", f"contact sheet {args.sheet}", path=args.sheet)


def _changes(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of a run's configuration for which flags were given."""
    known = flatten(to_dict(RunConfig()))
    return {name: value for name, value in vars(args).items() if name in known}


def _retry_failed(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_summary
    from pds_ray.engine.upkeep import retry_failed

    print_summary(args.run, retry_failed(args.run, _changes(args)))
    _report_at_the_end(args.run, args.verbose)


def _verify(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_problems, print_summary
    from pds_ray.engine.upkeep import repair, verify

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


def _status(args: argparse.Namespace) -> None:
    from pds_ray.cli.output import print_status
    from pds_ray.engine.status import status

    state = None
    while True:
        found = status(args.run)
        if found["state"] == "running" or found["state"] != state:  # the others do not change
            if args.json:
                print(json.dumps(found))
            else:
                print_status(found)
            sys.stdout.flush()
        state = found["state"]
        if not args.watch or state in ENDS:
            break
        time.sleep(WATCH_S)
    if state not in ("running", "finished"):
        raise SystemExit(EXIT_USER)


def _environment(pairs: list[str]) -> dict[str, str]:
    named = dict(pair.partition("=")[::2] for pair in pairs if "=" in pair[1:])
    if len(named) < len(pairs):
        raise ConfigError("--env takes NAME=VALUE, and each name once")
    return named


def _submit(args: argparse.Namespace) -> None:
    """Submit a command as a job and follow it; the exit code is that of the job."""
    command = args.job[1:] if args.job[:1] == ["--"] else args.job
    if not command or command[0] in ("submit", "doctor") or command[0].startswith("-"):
        raise ConfigError(
            "which command? "
            "pds-ray submit --address http://HEAD:8265 -- distill --source ... --out ..."
        )
    asked = build_parser().parse_args(command)  # errors are refused here, not on the cluster
    given = {**_written(asked), **vars(asked)}
    if not args.verbose:
        logging.disable(logging.INFO)  # Ray reports its uploads and connections
    from pds_ray.distributed import submit as jobs

    paths = {name: str(given[name]) for name in jobs.PATHS if given.get(name)}
    environment = _environment(args.env)
    job = jobs.Job(
        command, paths, given.get("config"), environment, args.driver_cpus, args.installed
    )
    submitted = jobs.submit(job, args.address)
    log.event("submitted", f"pds-ray: submitted job {submitted}", job=submitted)
    if args.no_wait:
        return
    try:
        outcome, code = jobs.follow(submitted, args.address)
    except KeyboardInterrupt:
        stop = jobs.stop_command(submitted, args.address)
        log.event("left", f"\npds-ray: job {submitted} goes on; `{stop}` ends it", job=submitted)
        os._exit(EXIT_INTERRUPTED)
    log.event(
        "job_ended", f"pds-ray: job {submitted} {outcome.lower()}", job=submitted, outcome=outcome
    )
    if code:
        raise SystemExit(EXIT_INTERRUPTED if outcome == "STOPPED" else code)


def _doctor(_: argparse.Namespace) -> None:
    from pds_ray.cli.doctor import examine

    if not examine():
        raise SystemExit(EXIT_USER)


COMMANDS = {
    "distill": _distill,
    "select": _distill,
    "evaluate": _evaluate,
    "compare": _compare,
    "experts": _experts,
    "bench": _bench,
    "plan": _plan,
    "show": _show,
    "status": _status,
    "submit": _submit,
    "report": _report,
    "export": export_set,
    "push": push_set,
    "retry-failed": _retry_failed,
    "verify": _verify,
    "doctor": _doctor,
}


def main(argv: list[str] | None = None) -> None:
    """Run one command and raise SystemExit with its exit code: the entry point of `pds-ray`.

    It may be called several times in one process: signal handlers, warnings, logging and the form
    of events are afterwards as they were, and a Ray that runs already goes on. The environment
    variables of QUIET stay set, since libraries read them on import, and what `usable_streams`
    did stays. Ctrl-C, SIGTERM and SIGHUP end the whole process.
    """
    usable_streams()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.version:
        from pds_ray.cli.version import print_version

        print_version(args.verbose)
        raise SystemExit(EXIT_OK)
    if args.command is None:
        parser.error("the following arguments are required: COMMAND")
    with (
        quiet(args.verbose),
        log.as_json(args.log == "json"),
        any_character(),
        interruptible(),
        ExitStack() as session,
    ):
        code = _run(args, session)
        if in_main_thread():
            ignore_interrupts()
    raise SystemExit(code)


def _run(args: argparse.Namespace, session: ExitStack) -> int:
    """Run the command and report its outcome, in a last line; return the exit code.

    A session that it starts ends with `session`.
    """
    try:
        require_current_folder()
        if args.command in RUNS:
            session.enter_context(session_kept())
        COMMANDS[args.command](args)
        flush()
        # the last line of a log tells the outcome; on a terminal the result does
        if args.command in RUNS:
            quiet = sys.stderr.isatty() or getattr(args, "dry_run", False)
            log.event("done", "" if quiet else f"pds-ray: {args.command} done", exit_code=EXIT_OK)
        return EXIT_OK
    except KeyboardInterrupt:
        text = "\npds-ray: interrupted; the same command continues"
        flush()
        with suppress(OSError):  # the terminal may be gone
            log.event("interrupted", text, "error", exit_code=EXIT_INTERRUPTED)
        # not through Ray's own shutdown: interrupted while it starts, it crashes; its processes
        # die with this one
        os._exit(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of our output is gone
        flush()
        return EXIT_OK
    except Exception as error:
        if args.verbose:
            raise
        line = first_line(error)
        if isinstance(error, UserError):
            code, text = EXIT_USER, f"pds-ray: {line}"
        else:
            advice = "-v shows where; a bug report needs pds-ray --version -v"
            code, text = EXIT_BUG, f"pds-ray: {type(error).__name__}: {line} ({advice})"
        flush()
        log.event("failed", text, "error", exit_code=code)
        return code
