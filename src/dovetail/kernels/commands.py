"""`dovetail kernels make|check|tune`: a model's fused MoE kernels as files that one can read."""

import argparse
import json
from pathlib import Path
from typing import Any


def kernels_parser(parser: argparse.ArgumentParser) -> None:
    """`dovetail kernels`."""
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")
    make = actions.add_parser("make", help="choose and write a model's kernels for one GPU")
    make.add_argument(
        "config", type=Path, metavar="CHECKPOINT|config.json", help="of a mixture-of-experts model"
    )
    make.add_argument(
        "--arch", default="sm_90", help="sm_80, sm_90 (the default), sm_100 or gfx942"
    )
    make.add_argument("-o", "--out", type=Path, default=Path("kernels"), metavar="DIR")
    make.add_argument(
        "--gate",
        action="store_true",
        help="compile ahead of time and refuse kernels that spill or miss their instruction",
    )
    make.add_argument(
        "--binaries",
        action="store_true",
        help="compile each kernel into a file too, which runs without Triton where it fits",
    )
    make.set_defaults(command=_make)
    check = actions.add_parser("check", help="compare sources with their manifest")
    check.add_argument("folder", type=Path, metavar="DIR")
    check.set_defaults(command=_check)
    tune = actions.add_parser("tune", help="measure kernels for a GPU plan, and put winners in it")
    tune.add_argument("plan", type=Path, metavar="PLAN", help="for the GPU of this machine")
    tune.add_argument("-o", "--out", type=Path, default=Path("plan.json"), help="the plan to write")
    tune.add_argument("--db", type=Path, metavar="FILE.db", help="the cache's by default")
    tune.add_argument("--time", default="5m", metavar="DURATION", help="of all token counts")
    tune.add_argument(
        "--sampler", default="coordinate", choices=("coordinate", "tpe", "nsga2", "random")
    )
    tune.add_argument("--seed", type=int, default=0)
    tune.add_argument(
        "--target", default="cuda", choices=("cuda", "host"),
        help="host tries the search in Triton's interpreter and leaves the plan as it is",
    )  # fmt: skip
    tune.add_argument(
        "--replay", type=Path, metavar="FILE.db", help="decide from these rows, time nothing"
    )
    tune.add_argument("--json", action="store_true", help="print what was found as JSON")
    tune.set_defaults(command=_tune)


def _tune(options: argparse.Namespace) -> int:
    from dovetail.tuning.kernels.tune import tune

    return tune(options)


def _make(options: argparse.Namespace) -> int:
    from dovetail.codegen.kernels.arch import ARCHS
    from dovetail.ir.errors import InputError
    from dovetail.kernels.files import write_kernels
    from dovetail.kernels.layers import layer_of_config

    if options.arch not in ARCHS:
        raise InputError(f"--arch {options.arch}: kernels are emitted for {', '.join(ARCHS)}")
    layer = layer_of_config(_config(options.config))
    made = write_kernels(
        layer, ARCHS[options.arch], options.out, gate=options.gate, binaries=options.binaries
    )
    for kernels in made.ladder:
        up, down = kernels.up.tile, kernels.down.tile
        print(
            f"to {kernels.bucket[1]:>6} tokens  up {up.m}×{up.n}×{up.k}  "
            f"down {down.m}×{down.n}×{down.k}"
        )
    gated = ", passed the gate" if options.gate else ""
    print(f"{len(made.kernels)} kernels in {options.out}{gated}")
    if options.binaries:
        files = sum(len(reference.binaries) for reference in made.kernels)
        without = sum(not reference.binaries for reference in made.kernels)
        print(f"{files} binaries, {without} kernels by TMA are compiled where they run")
    return 0


def _check(options: argparse.Namespace) -> int:
    from dovetail.kernels.files import check_kernels

    found = check_kernels(options.folder)
    print(f"{len(found.kernels)} kernels for {found.arch}, as their specs say")
    return 0


def _config(path: Path) -> dict[str, Any]:
    """The config.json at ``path`` or in the folder there. Raises InputError."""
    from dovetail.ir.errors import InputError

    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: not a readable config.json: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object, found a {type(data).__name__}")
    text = data.get("text_config")
    return text if isinstance(text, dict) else data
