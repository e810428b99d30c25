"""The command line's grammar: commands, and a flag for every option of the configuration."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from pds_ray import catalog
from pds_ray.config import EvaluateConfig, Option, RunConfig, options, sections
from pds_ray.errors import without_secrets
from pds_ray.recipes import PROTOCOLS, RECIPES
from pds_ray.store.export import FORMATS

EXIT_USER = 2
Commands = Any  # argparse has no public name for what add_subparsers returns


class _Parser(argparse.ArgumentParser):
    def error(self, message: str, advice: str = "") -> NoReturn:
        print(
            f"pds-ray: {without_secrets(message)} (see {self.prog} --help{advice})", file=sys.stderr
        )
        raise SystemExit(EXIT_USER)


class _Command(_Parser):
    """The parser of a command, which itself refuses what it does not know: it knows its flags."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}", self._advice(unknown))
        return parsed, unknown

    def _advice(self, unknown: Sequence[str]) -> str:
        """Return the flags near misspelt ones; what is no flag comes from a pattern, mostly."""
        misspelt = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        if not misspelt:
            return "; patterns of --source need quotes"
        known = {flag.replace("_", "-") for flag in self._option_string_actions}
        near = {flag: difflib.get_close_matches(flag, known, n=3, cutoff=0.75) for flag in misspelt}
        return "".join(
            f"; near {flag}: {', '.join(found)}" for flag, found in near.items() if found
        )


def _add_config_options(
    parser: argparse.ArgumentParser,
    only: Sequence[str] | None = None,
    top: type = RunConfig,
    short: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Add a flag per option of the configuration `top`: --prune.ratio, and its other names.

    `only` names the sections and dotted options that get one; "" is for those outside of sections.
    `short` gives names of flags that dotted options have in this command besides.
    """
    for section, group in {"": top, **sections(top)}.items():
        chosen = [
            known
            for known in options(group).values()
            if only is None or section in only or known.name in only
        ]
        if not chosen:
            continue
        title = section or top.__name__.removesuffix("Config").lower()
        about = (group.__doc__ or "").splitlines()[0] if section else None
        flags = parser.add_argument_group(title, about)
        for known in chosen:
            names = [known.name.replace("_", "-"), known.name, *known.aliases]
            names += [short[known.name]] if known.name in short else []
            flags.add_argument(
                *dict.fromkeys(f"--{name}" for name in names),
                dest=known.name,
                metavar=_metavar(known),
                default=argparse.SUPPRESS,
                help=_help(known).replace("%", "%%"),
            )


def _metavar(known: Option) -> str:
    choices = ("true", "false") if known.kind is bool else known.choices
    return _braces(choices) if choices else known.name.rpartition(".")[2].upper()


def _braces(choices: Iterable[str]) -> str:
    return "{" + ",".join(choices) + "}"


def _help(known: Option) -> str:
    """Return the help line: what the option is, what is allowed, and the default in brackets."""
    bounds = "" if known.choices or not known.allowed else f"; {known.allowed}"
    default = str(known.default).lower() if known.kind is bool else known.default
    return known.doc + bounds + ("" if default in (None, "") else f" [{default}]")


def _add_recipe(parser: argparse.ArgumentParser, preset: str) -> None:
    """Add the flags from which a run's options come before other flags change them."""
    parser.add_argument(
        "--preset",
        default=preset,
        metavar=_braces(RECIPES),
        help="named options; the published ones of an optimisation are METHOD_DATA_PAIRS, such as "
        "lors_flickr30k_100 [%(default)s]",
    )
    _add_config_file(parser)


def _add_config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE.yaml", help="options as YAML, sections nested")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line."""
    parser = _Parser(
        prog="pds-ray", description="Distil image-text data into a few image-caption pairs, on Ray."
    )
    parser.add_argument(
        "--version", action="store_true", help="the version; with -v all that a bug report needs"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="as with each command")
    commands = parser.add_subparsers(dest="command", parser_class=_Command, metavar="COMMAND")
    _add_distill_commands(commands)
    _add_evaluate_commands(commands)
    _add_experts(commands)
    _add_bench(commands)
    _add_plan(commands)
    _add_viewers(commands)
    _add_upkeep(commands)
    _add_publishing(commands)
    _add_cluster(commands)
    commands.add_parser(
        "doctor", help="hardware, versions, weights and paths found, and what is missing"
    )
    for command in commands.choices.values():
        command.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            default=argparse.SUPPRESS,  # else it would undo a -v before the command
            help="show stack traces and library messages",
        )
        command.add_argument(
            "--log", choices=("text", "json"), default="text", help="form of standard error"
        )
    return parser


def _read_by(methods: Iterable[str]) -> tuple[str, ...]:
    """Return the sections and single options that any of the methods reads."""
    return tuple(name for method in methods for name in catalog.method(method).options)


def _add_distill_commands(commands: Commands) -> None:
    distill = commands.add_parser(
        "distill",
        help="distil a data set",
        allow_abbrev=False,
        description="Distils a data set into image-caption pairs. Repeating an interrupted command "
        "continues it.",
        epilog="Values come from the preset, then the YAML file, then the command line. Every "
        "option has a flag.",
    )
    select = commands.add_parser(
        "select",
        help="choose real pairs of a data set",
        allow_abbrev=False,
        description="Chooses real pairs of a data set, no image twice. "
        f"Methods: {', '.join(catalog.SELECTORS)}.",
        epilog="The result has the form of a distilled set. Repeating an interrupted command "
        "continues it.",
    )
    for command in (distill, select):
        _add_recipe(command, "default")
        command.add_argument(
            "--dry-run", action="store_true", help="validate, print plan and configuration, stop"
        )
        command.add_argument(
            "--redo", action="store_true", help="redo what depends on a changed configuration"
        )
        command.add_argument(
            "--only",
            default="",
            metavar="STAGES",
            help="only these stages, by comma; the stages before them must be done",
        )
    _add_config_options(distill)
    _add_config_options(select, ("", *_read_by(catalog.SELECTORS), "ray"))


def _add_compare(commands: Commands) -> argparse.ArgumentParser:
    compare = commands.add_parser(
        "compare",
        help="methods side by side: distil, select, train, measure, tabulate",
        allow_abbrev=False,
        description="Makes a set with every method at every size from one source and measures "
        "all of them in the same way. Repeating an interrupted command continues it.",
        epilog="Values come from preset and protocol, then the YAML file, which holds options of "
        "a run and of an evaluation, then the command line.",
    )
    _add_recipe(compare, "default")
    compare.add_argument(
        "--methods",
        default=",".join((*catalog.SELECTORS, "pds", "coverage")),
        help="methods by comma, each with changes behind it if wanted: pds+match.filter=false "
        "[%(default)s]",
    )
    compare.add_argument(
        "--ablations", action="store_true", help="add the ablations of the paper to the methods"
    )
    compare.add_argument("--pairs", help="sizes by comma [100]")
    compare.add_argument(
        "--set-seeds", type=int, default=1, metavar="N", help="sets per row, seeds from --seed [1]"
    )
    compare.add_argument(
        "--budgets",
        help="sizes in bytes by comma instead, such as 0.5MB,2MB,8MB; random is compared too",
    )
    compare.add_argument(
        "--redo", action="store_true", help="redo what depends on a changed configuration"
    )
    return compare


def _add_evaluate_commands(commands: Commands) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="train models on a distilled set and measure retrieval",
        allow_abbrev=False,
        description="Trains fresh models on a distilled set, ours or any in its layout, and "
        "measures image-text retrieval on a held-out split. Repeating an interrupted command "
        "continues it.",
        epilog="Values come from the protocol, then the YAML file, then the command line. Every "
        "option has a flag.",
    )
    evaluate.add_argument("set", metavar="SET", help="run folder or distilled set")
    _add_config_file(evaluate)
    evaluate.add_argument("--out", metavar="FOLDER", help="where evaluation/ is made [SET]")
    evaluate.add_argument("--json", action="store_true", help="print the result as JSON")
    compare = _add_compare(commands)
    # each run gets its own method and pairs
    _add_config_options(compare, ("source", "out", "seed", *_read_by(catalog.METHODS), "ray"))
    _add_config_options(evaluate, top=EvaluateConfig)
    evaluation_only = ("", *(sections(EvaluateConfig).keys() - sections(RunConfig).keys()))
    _add_config_options(compare, evaluation_only, top=EvaluateConfig)
    for command in (evaluate, compare):
        command.add_argument(
            "--protocol",
            default="standard",
            metavar=_braces(PROTOCOLS),
            help="named protocol; paper takes the best epoch on test [%(default)s]",
        )


SHORT = {
    "experts.store": "store",
    "experts.count": "experts",
    "experts.epochs": "epochs",
    "experts.seed": "seed",
    "experts.backbone": "backbone",
    "experts.text_encoder": "text-encoder",
}
"""Options that `pds-ray experts` also has without their section."""


def _add_experts(commands: Commands) -> None:
    experts = commands.add_parser(
        "experts",
        help="train the experts whose trajectories some methods match",
        allow_abbrev=False,
        description="Trains models on all of a source, side by side, and keeps their weights after "
        "every epoch. Several runs may share the folder. Repeating an interrupted command "
        "continues it; more experts or epochs extend it.",
        epilog="Values come from the preset, then the YAML file, then the command line.",
    )
    _add_recipe(experts, "default")
    experts.add_argument(
        "--dry-run", action="store_true", help="validate, print what would be trained, stop"
    )
    of_run = ("source", "read", "embed.encoder", "experts", "ray")
    _add_config_options(experts, of_run, short=SHORT)


def _add_bench(commands: Commands) -> None:
    bench = commands.add_parser(
        "bench",
        help="measure this machine for pds-ray plan",
        allow_abbrev=False,
        description="Measures with the engine's own code what a plan needs: reading, encoding, "
        "clustering, decoding, and the time to start. Takes some minutes with the built-in models.",
    )
    _add_recipe(bench, "demo")
    bench.add_argument(
        "--out", dest="rates", metavar="RATES.json", help="where to [the cache folder of the user]"
    )
    _add_config_options(
        bench, ("source", "read", "embed", "decode", "ray.num_cpus", "ray.object_store_gib")
    )


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser(
        "plan",
        help="estimate time, hardware and cost of a run",
        allow_abbrev=False,
        description="Estimates stage by stage the time and hardware of a run, each figure with its "
        "formula and the origin of its rate: measured by pds-ray bench, published, or assumed.",
        epilog="Give --pairs-in, or --source to count one. Without --gpus the machine is the one "
        "that was measured.",
    )
    _add_recipe(plan, "web_scale")
    plan.add_argument("--pairs-in", metavar="N", help="pairs of the source, such as 400M or 5.85B")
    plan.add_argument(
        "--captions-per-image", metavar="N", default="1", help="of --pairs-in [%(default)s]"
    )
    plan.add_argument(
        "--bytes-per-pair",
        metavar="N",
        default="24k",
        help="of --pairs-in, as stored [%(default)s]",
    )
    plan.add_argument("--gpus", metavar="NxKIND", help="such as 64xH100; 0 for none")
    plan.add_argument("--cpus", metavar="N", help="CPU cores in all [8 per GPU]")
    plan.add_argument(
        "--rates", metavar="RATES.json", help="rates that pds-ray bench measured [its output]"
    )
    plan.add_argument(
        "--prices",
        metavar="FILE.yaml",
        help="USD: gpu_hour by kind, core_hour, storage_tb_month, egress_tb",
    )
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    workers = ("ray.embed_workers", "ray.decode_workers")
    planned = _read_by(catalog.METHODS)
    _add_config_options(plan, ("source", "method", "pairs", "budget", *planned, *workers))


def _add_viewers(commands: Commands) -> None:
    show = commands.add_parser("show", help="summary of a run, or of a comparison")
    show.add_argument("run", metavar="RUN")
    show.add_argument("--json", action="store_true", help="run.json, or comparison.json, as it is")
    show.add_argument(
        "--sheet", metavar="FILE.png", help="also draw the distilled pairs as one image"
    )

    status = commands.add_parser(
        "status",
        help="progress of a run, from any machine that sees its folder",
        description="Reports which stage of a run is under way, its progress and its rate. Exit "
        "code 2 if the run is neither finished nor under way.",
    )
    status.add_argument("run", metavar="RUN")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.add_argument(
        "--watch",
        action="store_true",
        help="repeat until the run is finished, interrupted or failed",
    )

    report = commands.add_parser(
        "report",
        help="a run, or a comparison, as one HTML page",
        description="Writes a run folder, or the folder of a comparison, as one HTML file that "
        "opens offline.",
    )
    report.add_argument("run", metavar="RUN")
    report.add_argument("--out", metavar="FILE.html", help="where to [RUN/report.html]")


def _add_upkeep(commands: Commands) -> None:
    retry = commands.add_parser(
        "retry-failed",
        help="retry the failed shards and samples of a run",
        allow_abbrev=False,
        description="Retries the shards that could not be read and the samples that killed their "
        "process; redoes what depends on them if any of them can now be read.",
    )
    retry.add_argument("run", metavar="RUN")
    _add_config_options(retry, only=("source", "ray"))

    verify = commands.add_parser(
        "verify",
        help="check every file and count of a run",
        allow_abbrev=False,
        description="Checks every file of a run against the hashes and counts of its manifests. "
        "Exit code 2 if something is missing or corrupt.",
    )
    verify.add_argument("run", metavar="RUN")
    verify.add_argument(
        "--repair", action="store_true", help="redo what is missing or corrupt, and nothing else"
    )
    _add_config_options(verify, only=("source", "embed.store", "ray"))


def _add_publishing(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="a distilled set in one format, for other programs",
        description="Writes a distilled set as Parquet with its images in the rows, as tars for "
        "WebDataset, or as a folder of images, with a card that lets Hugging Face's `datasets` "
        "load the folder. Its hashes are checked first.",
    )
    push = commands.add_parser(
        "push",
        help="publish a distilled set on the Hugging Face hub",
        description="Exports a distilled set and uploads it in one commit, with the card. The "
        "token is that of `hf auth login` or HF_TOKEN. The card is RUN/distilled/README.md as it "
        "is, and names the source as it was given: read it before, and write the licence into it.",
    )
    for command in (export, push):
        command.add_argument("set", metavar="RUN", help="run folder or distilled set")
    push.add_argument("to", metavar="hf:ORG/NAME", help="data set, made if need be")
    export.add_argument("--format", choices=FORMATS, required=True, help="of the files")
    push.add_argument(
        "--format", choices=FORMATS, default="parquet", help="of the files [%(default)s]"
    )
    export.add_argument(
        "--to",
        dest="out",
        required=True,
        metavar="FOLDER",
        help="local or on an object store; an export that is there is replaced",
    )
    push.add_argument("--private", action="store_true", help="a new data set is private")
    push.add_argument("--revision", metavar="BRANCH", help="made if need be [main]")
    push.add_argument(
        "--dry-run", action="store_true", help="list what would be uploaded; needs no network"
    )


def _add_cluster(commands: Commands) -> None:
    submit = commands.add_parser(
        "submit",
        help="run a command as a job of a Ray cluster",
        description="Submits a command of pds-ray to the Jobs API of a Ray cluster and follows its "
        "log. Paths are those of the cluster, but the file of --config is sent along. Submitted "
        "again, an interrupted run continues.",
        epilog="Exit code: that of the job, 130 if it was stopped. Ctrl-C leaves the job running.",
    )
    submit.add_argument("--address", help="http://HEAD:8265 [RAY_API_SERVER_ADDRESS]")
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="for the job; no secrets"
    )
    submit.add_argument(
        "--driver-cpus",
        type=float,
        default=0,
        help="CPUs of the driver; with 0 it runs on the head",
    )
    submit.add_argument(
        "--installed",
        action="store_true",
        help="use the pds_ray of the cluster, do not send this one",
    )
    submit.add_argument("--no-wait", action="store_true", help="do not follow the log")
    submit.add_argument(
        "job",
        nargs=argparse.REMAINDER,
        metavar="-- COMMAND ...",
        help="distill, select, evaluate, ...",
    )
