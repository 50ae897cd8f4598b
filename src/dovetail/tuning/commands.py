"""The parsers of `dovetail tune` and `dovetail db`; heavy imports wait until a command runs."""

import argparse
from pathlib import Path

from dovetail.ir.moves import FORMATS


def tune_parser(parser: argparse.ArgumentParser) -> None:
    """`dovetail tune`."""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a model folder")
    parser.add_argument(
        "--workload",
        required=True,
        metavar="IN.jsonl|WORKLOAD",
        help="prompts to tune for, or PROMPTSxLENGTH+NEW, a published workload or a JSON file",
    )
    parser.add_argument("--budget", help="such as ram=4GiB; half of this machine's by default")
    parser.add_argument("--time", default="10m", metavar="DURATION", help="seconds of measuring")
    parser.add_argument("--db", type=Path, metavar="FILE.db", help="the cache's by default")
    parser.add_argument("-o", "--out", type=Path, default=Path("plan.json"))
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="64 for a file of prompts")
    parser.add_argument("--policy", default="auto", metavar="NAME", help="of the untuned plan")
    parser.add_argument("--machine", default="", metavar="NAME|FILE", help="plan by its curves")
    parser.add_argument(
        "--sampler", default="coordinate", choices=("coordinate", "tpe", "nsga2", "random")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--skip-bad", action="store_true", help="leave bad prompt lines out")
    parser.add_argument(
        "--target", default="", metavar="MACHINE", help="tune for this machine by simulation only"
    )
    parser.add_argument(
        "--replay", type=Path, metavar="FILE.db", help="decide from these rows, time nothing"
    )
    parser.add_argument("--ray", type=int, metavar="N", help="N tuners on a Ray cluster")
    allow_argument(parser)
    parser.add_argument("--json", action="store_true", help="print what was found as JSON")
    # For the tuners that `--ray` starts: the time that the sample is cut for, and a search of one's
    # own over the same workload.
    parser.add_argument("--sample-for", help=argparse.SUPPRESS)
    parser.add_argument("--search-seed", type=int, help=argparse.SUPPRESS)
    parser.set_defaults(command=_tune)


def allow_argument(parser: argparse.ArgumentParser) -> None:
    """The permission to compute in fewer bits."""
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=FORMATS,
        help="experts may be in this format, which changes results; needs `dovetail convert`",
    )


def _tune(options: argparse.Namespace) -> int:
    from dovetail.tuning.tune import tune

    return tune(options)


def db_parser(parser: argparse.ArgumentParser) -> None:
    """`dovetail db status|merge|prune|export`."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    status = actions.add_parser("status", help="what a database holds, and whether it is sound")
    _file(status)
    status.add_argument("--json", action="store_true", help="print it as JSON")
    status.set_defaults(command=_status)
    merge = actions.add_parser("merge", help="add what other databases hold")
    merge.add_argument("into", type=Path, metavar="INTO.db")
    merge.add_argument("sources", type=Path, nargs="+", metavar="FROM.db")
    merge.set_defaults(command=_merge)
    prune = actions.add_parser("prune", help="delete what no query needs any more")
    _file(prune)
    prune.add_argument("--older-than", metavar="AGE", help="trials and runs too, such as 90d")
    prune.add_argument("--foreign", action="store_true", help="what other kinds of machines left")
    prune.set_defaults(command=_prune)
    export = actions.add_parser("export", help="write every row as a line of JSON")
    _file(export)
    export.add_argument("-o", "--out", type=Path, metavar="FILE.jsonl")
    export.set_defaults(command=_export)


def _file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "db", type=Path, nargs="?", metavar="FILE.db", help="the cache's if left out"
    )


def _status(options: argparse.Namespace) -> int:
    from dovetail.tuning.db_commands import status

    return status(options.db, as_json=options.json)


def _merge(options: argparse.Namespace) -> int:
    from dovetail.tuning.db_commands import merge_files

    return merge_files(options.into, options.sources)


def _prune(options: argparse.Namespace) -> int:
    from dovetail.tuning.db_commands import prune_file

    return prune_file(options.db, options.older_than, foreign=options.foreign)


def _export(options: argparse.Namespace) -> int:
    from dovetail.tuning.db_commands import export_file

    return export_file(options.db, options.out)
