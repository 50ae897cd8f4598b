"""`dovetail calibrate`: measure this machine, remember what was found, and show it."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TextIO

from dovetail.ir.machine import Curve, Machine
from dovetail.ir.units import format_bytes, format_duration
from dovetail.machine_files import save_machine
from dovetail.tuning_db.database import Database, default_path

SECONDS = 30.0
"""How long a calibration takes unless it is told otherwise."""
SLOWDOWNS = {
    "cpu|cpu": "compute, with all workers busy",
    "cpu|disk": "compute, while the disk is read",
    "disk|cpu": "disk, with all workers busy",
    "cpu|cpu+disk": "compute, with all workers busy and the disk read",
    "op|op": "small operators, with all workers busy",
}


def calibrate_now(checkpoint: Path | None, seconds: float, out: Path | None) -> int:
    """Calibrate on the disk of ``checkpoint``, or of the cache; print the curves, and write a
    machine file to ``out``. Raises DovetailError."""
    from dovetail.checkpoint import ModelFolder

    index = ModelFolder.open(checkpoint).index if checkpoint else None
    files = [shard.file for shard in index.shards] if index else []
    machine = calibrate_and_store(files, seconds, progress_on(sys.stderr))
    print(machine_text(machine))
    if out:
        save_machine(machine, out)
        print(f"\nmachine file: {out}")
    return 0


def calibrate_and_store(
    files: Sequence[Path],
    seconds: float = SECONDS,
    progress: Callable[[str, float], None] | None = None,
) -> Machine:
    """Measure this machine and the disk that holds ``files`` (without any, that of the cache or of
    torch), and add the result to the tuning database. Raises InputError."""
    from dovetail.runtime import calibrate_host as host
    from dovetail.runtime.calibrate import PROTOCOL, calibrate

    # Opened first: a place that cannot be written is known before half a minute is spent.
    with Database.open() as database:
        machine = calibrate(files, default_path().parent, seconds=seconds, progress=progress)
        device = host.disk_device(files[0]) if files else machine.silicon["disk"]
        database.add_calibration(machine, host.silicon(), host.software(), device, PROTOCOL)
    return machine


def progress_on(stream: TextIO) -> Callable[[str, float], None]:
    """A line on ``stream`` that says what is measured; elsewhere than on a terminal a line per
    quarter of the time."""
    quarters = 0

    def show(what: str, share: float) -> None:
        nonlocal quarters
        if stream.isatty():
            end = "\n" if what == "done" else ""
            print(f"\r\x1b[Kcalibrating {share:4.0%}  {what}", end=end, file=stream, flush=True)
        elif int(share * 4) >= quarters:
            quarters = int(share * 4) + 1
            print(f"calibrating {share:.0%}, {what}", file=stream, flush=True)

    return show


def machine_text(machine: Machine) -> str:
    """The machine and its curves as tables."""
    tiers = ", ".join(f"{name} {format_bytes(size)}" for name, size in machine.tiers.items())
    about = machine.silicon.get("processor", "")
    sections = [
        [f"{machine.name}: {machine.workers} compute workers; {tiers}", about],
        _curves("GEMM, GFLOP/s of one worker by rows", machine.gemm, _number),
        _curves("attention, GFLOP/s of one worker by prompt length", machine.attention, _number),
        _curves(
            "KV reads, GB/s of one worker by bytes of one sequence and layer",
            machine.kv_bandwidth,
            _size,
        ),
        _curves("disk reads, GB/s by block", {"disk": machine.disk}, _size),
        _table("other", _others(machine)),
        _table("share of its rate that an engine keeps", _kept(machine)),
    ]
    return "\n\n".join("\n".join(line for line in lines if line) for lines in sections)


def _curves(title: str, curves: Mapping[str, Curve], size: Callable[[float], str]) -> list[str]:
    """A line of sizes and a line of rates for every curve; equal sizes are given once."""
    width = max(len(name) for name in curves)
    lines, shown = [title], None
    for name, curve in curves.items():
        sizes = [size(x) for x in curve.x]
        rates = [f"{y / 1e9:.3g}" for y in curve.y]
        columns = [max(5, *map(len, pair)) for pair in zip(sizes, rates, strict=True)]
        if curve.x != shown:
            lines.append(_row("", width, sizes, columns))
            shown = curve.x
        lines.append(_row(name, width, rates, columns))
    return lines


def _row(name: str, width: int, cells: Sequence[str], columns: Sequence[int]) -> str:
    padded = (f"{cell:>{column}}" for cell, column in zip(cells, columns, strict=True))
    return f"  {name:<{width}}  " + "  ".join(padded)


def _table(title: str, rows: Iterator[tuple[str, str]]) -> list[str]:
    found = list(rows)
    width = max((len(name) for name, _ in found), default=0)
    return [title, *(f"  {name:<{width}}  {value}" for name, value in found)]


def _others(machine: Machine) -> Iterator[tuple[str, str]]:
    yield "copying memory, one worker", f"{machine.memory_bandwidth / 1e9:.3g} GB/s"
    if machine.fresh_bandwidth:
        yield "first use of memory, one worker", f"{machine.fresh_bandwidth / 1e9:.3g} GB/s"
    yield "one framework operator", format_duration(machine.op_seconds)


def _kept(machine: Machine) -> Iterator[tuple[str, str]]:
    for pair, share in machine.slowdown.items():
        yield SLOWDOWNS.get(pair, pair), f"{share:.0%}"


def _number(x: float) -> str:
    return f"{x:.0f}"


def _size(x: float) -> str:
    return format_bytes(int(x)).replace(".00 ", " ")
