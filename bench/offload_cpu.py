"""dovetail against accelerate's disk offload and plain transformers, side by side on this machine.

    python bench/offload_cpu.py CHECKPOINT --size OLMoE-1B-7B --budget ram=3.75GB \\
        --out bench/results/NAME.json

Prints Markdown tables and writes all figures as JSON. bench/README.md says what each section does
and how both sides are kept equal.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import host
from accuracy_section import accuracy
from dovetail_run import Task, calibrated, machine_with
from harness import LONG, SHORT, Bench
from offload_section import duel, equal_in_float32
from peers import EXPERTS, PeerDiedError
from resident_section import resident, resident_budget
from tables import accuracy_table, duel_tables, equality_text, machine_table, resident_tables
from workloads import random_prompts

from dovetail.checkpoint import ModelFolder
from dovetail.demo import SIZES, TRAINED, write_demo
from dovetail.ir.errors import DovetailError, InputError
from dovetail.ir.machine import Machine
from dovetail.ir.units import parse_budget

PROMPTS = {"offload": 512, "long": 32, "resident": 256, "accuracy": 128}
NEW_TOKENS = {"offload": 8, "long": 4, "resident": 32, "accuracy": 12}

REPEATS = {"offload": 1, "long": 1, "resident": 5}


def main() -> int:
    """Run the sections that were asked for; the exit code is 1 if one failed."""
    options = _parser().parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    small = options.small or options.checkpoint
    try:
        _checkpoint(options.checkpoint, options.size)
        _checkpoint(small, options.small_size)
        scratch = options.scratch or options.checkpoint.parent
        with tempfile.TemporaryDirectory(prefix="dovetail-bench-", dir=scratch) as folder:
            _run(options, small, Path(folder))
    except (DovetailError, PeerDiedError, subprocess.CalledProcessError) as error:
        print(f"offload_cpu: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a model folder")
    parser.add_argument("--budget", required=True, help="such as ram=3.75GB, for offload and long")
    parser.add_argument("--out", type=Path, required=True, metavar="RESULT.json")
    parser.add_argument("--sections", type=_sections, default=list(PROMPTS), metavar="A,B")
    random_sizes = [size for size in SIZES if size != TRAINED]
    parser.add_argument("--size", choices=random_sizes, help="write CHECKPOINT if it is missing")
    parser.add_argument(
        "--small", type=Path, help="checkpoint for resident and accuracy; CHECKPOINT by default"
    )
    parser.add_argument("--small-size", choices=random_sizes, help="write it if it is missing")
    parser.add_argument("--prompts", type=_counts(PROMPTS), default=PROMPTS, metavar="SECTION=N,..")
    parser.add_argument(
        "--new-tokens", type=_counts(NEW_TOKENS), default=NEW_TOKENS, metavar="SECTION=N,.."
    )
    parser.add_argument("--batches", type=_numbers, default=[16, 64, 256, 1024], metavar="N,..")
    parser.add_argument(
        "--threads", type=_numbers, help="such as 2,1, the main number first; all cores by default"
    )
    parser.add_argument("--experts", type=_experts, default=list(EXPERTS), metavar="A,B")
    parser.add_argument("--repeats", type=_counts(REPEATS), default=REPEATS, metavar="SECTION=N,..")
    parser.add_argument(
        "--calibrate", action="store_true", help="calibrate anew, for this run only"
    )
    parser.add_argument("--scratch", type=Path, help="on CHECKPOINT's disk; beside it by default")
    return parser


def _sections(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in PROMPTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(PROMPTS)}")
    return names


def _experts(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in EXPERTS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(EXPERTS)}")
    return names


def _numbers(text: str) -> list[int]:
    numbers = [int(part) for part in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
    return numbers


def _counts(defaults: dict[str, int]) -> Callable[[str], dict[str, int]]:
    """A parser of ``offload=1024,long=64``; sections left out keep their defaults."""

    def parse(text: str) -> dict[str, int]:
        found = dict(defaults)
        for part in text.split(","):
            name, _, value = part.partition("=")
            if name not in defaults or not value.isdecimal() or int(value) < 1:
                names = ", ".join(defaults)
                raise argparse.ArgumentTypeError(f"{part!r}: expected SECTION=N, one of {names}")
            found[name] = int(value)
        return found

    return parse


def _checkpoint(folder: Path, size: str | None) -> None:
    if (folder / "config.json").exists():
        return
    if size is None:
        raise InputError(f"{folder} is no checkpoint: pass --size (or --small-size) to write one")
    _say(f"writing {size} to {folder}")
    write_demo(folder, size)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _run(options: argparse.Namespace, small: Path, scratch: Path) -> None:
    if options.calibrate:
        os.environ["DOVETAIL_CACHE_DIR"] = str(scratch / "cache")
    bench = _bench(options, small, scratch)
    if "resident" in options.sections:
        resident_budget(small)
    machine = _machine(bench, options.checkpoint)
    facts = host.describe_machine()
    results: dict[str, Any] = {
        "machine": facts,
        "calibration": _calibration(machine),
        "settings": _settings(bench),
        "sections": {},
    }
    print(machine_table(facts), flush=True)
    threads = options.threads or [machine.workers]
    for number in threads:
        own = number == machine.workers
        path = scratch / f"machine-{number}.json"
        bench.machines[number] = "" if own else machine_with(machine, number, path)
    for name in options.sections:
        started = time.monotonic()
        data, text = SECTIONS[name](bench)
        results["sections"][name] = data | {"seconds": time.monotonic() - started}
        print(f"\n{text}", flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def _bench(options: argparse.Namespace, small: Path, scratch: Path) -> Bench:
    budget = parse_budget(options.budget)
    if "ram" not in budget:
        raise InputError(f"budget {options.budget!r} names no ram: pass ram=SIZE")
    return Bench(
        checkpoint=options.checkpoint,
        small=small,
        budget=budget["ram"],
        scratch=scratch,
        machines={},
        prompts=options.prompts,
        new_tokens=options.new_tokens,
        batches=options.batches,
        experts=options.experts,
        repeats=options.repeats,
        say=_say,
    )


def _settings(bench: Bench) -> dict[str, Any]:
    """What was asked for, without the places of this machine."""
    return {
        "checkpoint": bench.checkpoint.name,
        "small": bench.small.name,
        "budget": bench.budget,
        "prompts": dict(bench.prompts),
        "new_tokens": dict(bench.new_tokens),
        "repeats": dict(bench.repeats),
        "batches": list(bench.batches),
        "experts": list(bench.experts),
    }


def _machine(bench: Bench, checkpoint: Path) -> Machine:
    """Calibrates before anything else is measured, and refuses a budget that is too small."""
    vocab = ModelFolder.open(checkpoint).vocab
    prompts = random_prompts(bench.prompts["offload"], *SHORT, vocab)
    new = bench.new_tokens["offload"]
    return calibrated(Task(checkpoint, prompts, new, bench.budget, bench.place()))


def _calibration(machine: Machine) -> dict[str, Any]:
    """What the planner believes of this machine, in short."""
    return {
        "workers": machine.workers,
        "gemm_peak": {dtype: curve.peak for dtype, curve in machine.gemm.items()},
        "disk_peak": machine.disk.peak,
        "memory_bandwidth": machine.memory_bandwidth,
        "op_seconds": machine.op_seconds,
        "slowdown": dict(machine.slowdown),
    }


def _offload(bench: Bench) -> tuple[dict[str, Any], str]:
    result = duel(bench, "offload", SHORT)
    equality = equal_in_float32(bench)
    data = result.as_dict() | {"float32": asdict(equality)}
    return data, f"{duel_tables(result)}\n\n{equality_text(equality)}"


def _long(bench: Bench) -> tuple[dict[str, Any], str]:
    result = duel(bench, "long", LONG)
    return result.as_dict(), duel_tables(result)


def _resident(bench: Bench) -> tuple[dict[str, Any], str]:
    result = resident(bench)
    return result.as_dict(), resident_tables(result)


def _accuracy(bench: Bench) -> tuple[dict[str, Any], str]:
    result = accuracy(bench)
    return result.as_dict(), accuracy_table(result)


SECTIONS: dict[str, Callable[[Bench], tuple[dict[str, Any], str]]] = {
    "offload": _offload,
    "long": _long,
    "resident": _resident,
    "accuracy": _accuracy,
}


if __name__ == "__main__":
    sys.exit(main())
