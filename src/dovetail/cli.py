"""The command line. Every command prints results on standard output and all else on standard error;
exit code 0 is done, 1 failed, 2 wrong use."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dovetail import __version__
from dovetail.ir.errors import DovetailError
from dovetail.kernels.commands import kernels_parser
from dovetail.precision.command import convert_parser
from dovetail.system_errors import as_output_error
from dovetail.tuning.commands import allow_argument, db_parser, tune_parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = make_parser()
    options = parser.parse_args(_with_action(sys.argv[1:] if arguments is None else arguments))
    logging.basicConfig(format="dovetail: %(message)s", level=logging.WARNING)
    try:
        return int(options.command(options))
    except DovetailError as error:
        print(f"dovetail: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dovetail: interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"dovetail: {as_output_error(error)}", file=sys.stderr)
        return 1


PLACE_ACTIONS = ("make", "run", "explain", "-h", "--help")


def _with_action(arguments: Sequence[str]) -> list[str]:
    """`dovetail place TRACE …` is `dovetail place make TRACE …`."""
    given = list(arguments)
    if given[:1] == ["place"] and given[1:] and given[1] not in PLACE_ACTIONS:
        return ["place", "make", *given[1:]]
    return given


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="dovetail",
        description="Run Mixture-of-Experts models that are larger than memory.",
    )
    parser.add_argument("--version", action="version", version=f"dovetail {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _demo_parser(commands.add_parser("demo", help="write a small real checkpoint and prompts"))
    _run_parser(commands.add_parser("run", help="finish a file of prompts under a budget"))
    _calibrate_parser(commands.add_parser("calibrate", help="measure this machine"))
    convert_parser(commands.add_parser("convert", help="write the experts in fewer bits, beside"))
    place = commands.add_parser("place", help="which device holds which expert, from traces")
    place_actions = place.add_subparsers(title="actions", required=True, metavar="ACTION")
    _place_make_parser(place_actions.add_parser("make", help="place; the action if none is named"))
    _place_run_parser(place_actions.add_parser("run", help="generate under it, a process a device"))
    _place_explain_parser(place_actions.add_parser("explain", help="what a placement does, drawn"))
    plan = commands.add_parser("plan", help="make, show and compare plans")
    actions = plan.add_subparsers(title="actions", required=True, metavar="ACTION")
    _make_parser(actions.add_parser("make", help="plan without running"))
    _show_parser(actions.add_parser("show", help="print a plan, its task graph and program"))
    _check_parser(actions.add_parser("check", help="verify a plan without a solver"))
    _diff_parser(actions.add_parser("diff", help="the moves in which two plans differ"))
    _explain_parser(actions.add_parser("explain", help="why this plan, and what more would give"))
    _timeline_parser(actions.add_parser("timeline", help="write and draw the timeline"))
    _report_parser(actions.add_parser("report", help="write all of it as one page with charts"))
    tune_parser(commands.add_parser("tune", help="measure schedules and export the best plan"))
    kernels_parser(commands.add_parser("kernels", help="a model's fused MoE kernels, as files"))
    db_parser(commands.add_parser("db", help="the tuning database: status, merge, prune, export"))
    return parser


def _demo_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--size", default="demo", help="demo, 400MB, 1GB or OLMoE-1B-7B")
    parser.add_argument("--dtype", help="float32 (demo) or bfloat16 (random weights) by default")
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(command=_demo)


def _demo(options: argparse.Namespace) -> int:
    from dovetail.demo import write_demo

    dtype = options.dtype or ("float32" if options.size == "demo" else "bfloat16")
    write_demo(options.directory, options.size, dtype, options.seed)
    print(f"checkpoint and prompts.jsonl are in {options.directory}")
    return 0


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a model folder")
    parser.add_argument("--budget", help="such as ram=4GiB; half of this machine's by default")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--policy", default="auto", metavar="NAME")
    parser.add_argument("--machine", default="", metavar="NAME|FILE", help="plan for this machine")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad prompt lines out")
    allow_argument(parser)


def _run_parser(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    parser.add_argument("--prompts", type=Path, required=True, metavar="IN.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl")
    parser.add_argument("--plan", type=Path, metavar="PLAN.json", help="use this plan's schedule")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true", help="always generate N tokens")
    parser.add_argument("--restart", action="store_true", help="discard what an earlier run did")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument(
        "--record-routing", type=Path, metavar="FILE.npz", help="write the experts of every token"
    )
    parser.add_argument("--ray", type=int, metavar="N", help="N shards on a Ray cluster")
    parser.add_argument(
        "--target",
        choices=("cpu", "cuda", "host"),
        default="cpu",
        help="this machine's processor, its GPU, or a GPU's programs on the processor, as a check",
    )
    parser.add_argument(
        "--graphs", action="store_true", help="with --target cuda: capture decode in CUDA graphs"
    )
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    if options.ray is not None:
        from dovetail.run_ray import run_on_cluster

        return run_on_cluster(options)
    from dovetail.run import run

    return run(options)


def _calibrate_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, help="measure the disk that holds this model")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("-o", "--out", type=Path, help="write a machine file too")
    parser.set_defaults(command=_calibrate)


def _calibrate(options: argparse.Namespace) -> int:
    from dovetail.calibration import calibrate_now

    return calibrate_now(options.checkpoint, options.seconds, options.out)


def _make_parser(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument("--prompts", type=Path, metavar="IN.jsonl", help="plan for these prompts")
    work.add_argument(
        "--workload",
        metavar="WORKLOAD",
        help="plan for PROMPTSxLENGTH+NEW, a published workload such as mtbench+64, or a JSON "
        "file; a config.json is then enough of a CHECKPOINT",
    )
    parser.add_argument(
        "--routing",
        type=Path,
        nargs="+",
        default=[],
        metavar="TRACE.npz",
        help="experts that tokens chose in such prompts: a plan for a GPU places them by it",
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("plan.json"))
    # Without a value, so that the option beside a workload is seen and refused.
    parser.set_defaults(command=_plan_make, max_new_tokens=None)


def _plan_make(options: argparse.Namespace) -> int:
    from dovetail.plans.commands import make

    return make(options)


def _show_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path)
    parser.add_argument("--graph", action="store_true", help="print the task graph too")
    parser.add_argument("--program", action="store_true", help="print the program too")
    parser.set_defaults(command=_plan_show)


def _plan_show(options: argparse.Namespace) -> int:
    from dovetail.plans.commands import show

    return show(options.plan, graph=options.graph, program=options.program)


def _check_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path)
    parser.add_argument("--here", action="store_true", help="and how far this machine is from it")
    parser.set_defaults(command=_plan_check)


def _plan_check(options: argparse.Namespace) -> int:
    from dovetail.plans.commands import check

    return check(options.plan, here=options.here)


def _diff_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.set_defaults(command=_plan_diff)


def _plan_diff(options: argparse.Namespace) -> int:
    from dovetail.plans.commands import diff

    return diff(options.before, options.after)


def _explain_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="a plan, beside the graph.json it was made with")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(command=_plan_explain)


def _plan_explain(options: argparse.Namespace) -> int:
    from dovetail.plans.commands import explain

    return explain(options.plan, as_json=options.json)


def _report_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="a plan, beside the graph.json it was made with")
    parser.add_argument("-o", "--out", type=Path, default=Path("report.html"))
    parser.add_argument("--fast", action="store_true", help="leave out what takes solving again")
    parser.set_defaults(command=_plan_report)


def _plan_report(options: argparse.Namespace) -> int:
    from dovetail.plans.commands import report

    return report(options.plan, options.out, fast=options.fast)


def _timeline_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("plan", type=Path, help="a plan, beside the graph.json it was made with")
    parser.add_argument("-o", "--out", type=Path, default=Path("timeline.json"))
    parser.add_argument("--picture", type=Path, help="PNG or SVG of one layer's steady state")
    parser.set_defaults(command=_plan_timeline)


def _plan_timeline(options: argparse.Namespace) -> int:
    from dovetail.plans.commands import timeline

    return timeline(options.plan, options.out, options.picture)


def _place_make_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "traces", type=Path, nargs="+", metavar="TRACE", help="routing traces or expert loads"
    )
    parser.add_argument("--devices", type=int, required=True, metavar="N")
    parser.add_argument("--slots", type=int, metavar="N", help="of a layer, over all devices")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="of as many devices each")
    parser.add_argument("--policy", default="auto", metavar="NAME")
    parser.add_argument("--knob", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--current", type=Path, metavar="FILE", help="where experts are now")
    parser.add_argument(
        "--max-moves", type=int, metavar="N", help="most experts to copy from there"
    )
    parser.add_argument("--affinity", action="store_true", help="keep tokens on their device")
    parser.add_argument("--link-cost", type=float, default=1.0, help="of a token to another node")
    parser.add_argument(
        "--node-cost", type=float, default=1.0, help="to another device of its node"
    )
    parser.add_argument(
        "--expert-groups", type=int, default=1, metavar="N", help="kept on one node"
    )
    parser.add_argument("--expert-bytes", metavar="SIZE", help="one expert's weights")
    parser.add_argument("--memory", metavar="SIZE", help="of each device, for experts")
    parser.add_argument("--batch-tokens", type=int, metavar="N", help="minimise this step's time")
    parser.add_argument("--read-seconds", type=float, metavar="S", help="to read one expert")
    parser.add_argument("--token-seconds", type=float, metavar="S", help="of a token in an expert")
    parser.add_argument("--top-k", type=int, metavar="K", help="experts of a token, for loads")
    parser.add_argument("--split", default="files", help="scenarios: files, phase or parts")
    parser.add_argument("--format", default="dovetail", help="or sglang, vllm, vllm-ascend")
    parser.add_argument("-o", "--out", type=Path, default=Path("placement.json"))
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(command=_place_make)


def _place_make(options: argparse.Namespace) -> int:
    from dovetail.place.commands import make

    return make(options)


def _place_run_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a model folder")
    parser.add_argument("--placement", type=Path, required=True, metavar="PLACEMENT.json")
    parser.add_argument("--prompts", type=Path, required=True, metavar="IN.jsonl")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--way", default="two", help="two or one all-to-alls a layer")
    parser.add_argument("--ignore-eos", action="store_true", help="always generate N tokens")
    parser.add_argument("--skip-bad", action="store_true", help="leave bad prompt lines out")
    parser.add_argument("-o", "--out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--json", action="store_true", help="print the account as JSON")
    parser.set_defaults(command=_place_run)


def _place_run(options: argparse.Namespace) -> int:
    from dovetail.place.run import run

    return run(options)


def _place_explain_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("placement", type=Path)
    parser.add_argument(
        "traces", type=Path, nargs="*", metavar="TRACE", help="routing traces or expert loads"
    )
    parser.add_argument("--current", type=Path, metavar="FILE", help="where experts were")
    parser.add_argument("--split", default="files", help="scenarios: files, phase or parts")
    parser.add_argument("-o", "--out", type=Path, metavar="PICTURE", help="PNG or SVG")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(command=_place_explain)


def _place_explain(options: argparse.Namespace) -> int:
    from dovetail.place.commands import explain

    return explain(options)


if __name__ == "__main__":
    sys.exit(main())
