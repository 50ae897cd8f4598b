"""Machine files: machines that are not here, described or measured elsewhere, as JSON."""

import json
import math
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from dovetail.ir import codec
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.machine import Accelerator, Machine
from dovetail.ir.record_file import write_whole
from dovetail.ir.units import format_bytes, parse_budget


def shipped_machines() -> list[str]:
    """The names of the machines that come with dovetail, sorted."""
    return sorted(
        entry.name.removesuffix(".json")
        for entry in _folder().iterdir()
        if entry.name.endswith(".json")
    )


def load_machine(name_or_path: str) -> Machine:
    """The machine in the file at a path, or the shipped one of that name.

    A text with a folder in it or ending in ``.json`` is a path. Raises InputError where there is
    no such machine or the file does not hold one.
    """
    path = Path(name_or_path)
    if name_or_path in shipped_machines():
        return _parse(_folder().joinpath(f"{name_or_path}.json").read_bytes(), name_or_path)
    if path.name != name_or_path or path.suffix == ".json":
        return _parse(_read(path), name_or_path)
    raise InputError(
        f"found no machine {name_or_path!r}, expected the path of a machine file (.json) or one "
        f"of the shipped machines: {', '.join(shipped_machines())}"
    )


def save_machine(machine: Machine, path: Path) -> None:
    """Writes a file that ``load_machine`` reads; a crash leaves the old file or the new one.

    Raises InputError where the file cannot be written.
    """
    text = json.dumps(codec.encode(machine), indent=1, ensure_ascii=False, allow_nan=False)
    try:
        write_whole(text + "\n", path)
    except OSError as error:
        raise InputError(
            f"the machine file {path} cannot be written: {error.strerror}; name another place"
        ) from error


def machine_budget(text: str | None, machine: Machine) -> dict[str, int]:
    """The bytes of each tier that ``text`` allows on ``machine``; half of its ram by default.

    A GPU's memory is allowed whole unless ``text`` names hbm; ``hbm=0`` leaves the GPU out. Raises
    InputError for a tier that the machine has not, or not that much of, and for a missing ram.
    """
    budget = parse_budget(text) if text else {"ram": machine.tiers["ram"] // 2}
    if "ram" not in budget:
        raise InputError(
            f"budget {text!r} names no ram, which every plan needs: add ram=SIZE, up to "
            f"{format_bytes(machine.tiers['ram'])} on {machine.name}"
        )
    for tier, size in budget.items():
        if tier not in machine.tiers:
            raise InputError(
                f"budget {text!r}: found the tier {tier}, which the machine {machine.name} has "
                f"not; expected one of {', '.join(machine.tiers)}: leave {tier} out or name "
                "another machine"
            )
        if size > machine.tiers[tier]:
            raise InputError(
                f"budget {text!r}: found {tier}={format_bytes(size, up=True)}, but the machine "
                f"{machine.name} has {format_bytes(machine.tiers[tier])}: give at most that"
            )
    if machine.accelerator is not None:
        budget.setdefault("hbm", machine.tiers["hbm"])
    return {tier: size for tier, size in budget.items() if tier != "hbm" or size}


def _folder() -> Traversable:
    return resources.files("dovetail").joinpath("machines")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the machine file {path} cannot be read: {error.strerror}; give the path of a machine "
            f"file or one of the shipped machines: {', '.join(shipped_machines())}"
        ) from error


def _parse(content: bytes, name: str) -> Machine:
    try:
        machine = codec.decode(json.loads(content.decode("utf-8")), Machine)
        _check(machine)
    except (ValueError, RecursionError) as error:
        # ValueError covers text that is not UTF-8, not JSON, and JSON that is no machine.
        raise InputError(
            f"the machine file {name} does not describe a machine: {error}; write one with "
            f"`dovetail calibrate`, or begin with a shipped one: {', '.join(shipped_machines())}"
        ) from error
    return machine


def _check(machine: Machine) -> None:
    """Refuses figures that no machine has; curves check themselves."""
    if machine.workers < 1:
        raise PlanError(f"$.workers: found {machine.workers}, expected at least 1")
    for field in ("memory_bandwidth", "op_seconds"):
        _positive(f"$.{field}", getattr(machine, field))
    for field in ("fresh_bandwidth", "process_bytes"):
        _not_negative(f"$.{field}", getattr(machine, field))
    for tier, size in machine.tiers.items():
        if size < 1:
            raise PlanError(f"$.tiers.{tier}: found {size}, expected bytes above 0")
    for tier in ("ram", "disk"):
        if tier not in machine.tiers:
            raise PlanError(f"$.tiers: the tier {tier!r} is missing, expected its bytes")
    for pair, share in machine.slowdown.items():
        if not 0 < share <= 1:
            raise PlanError(f"$.slowdown.{pair}: found {share}, expected above 0 and at most 1")
    for field in ("gemm", "attention", "kv_bandwidth"):
        if not getattr(machine, field):
            raise PlanError(f"$.{field}: found no dtype, expected a curve for one at least")
    if machine.accelerator is None and "hbm" in machine.tiers:
        raise PlanError("$.tiers.hbm: found a tier of a GPU, expected an accelerator beside it")
    if machine.accelerator is not None:
        _check_accelerator(machine.accelerator)
        if "hbm" not in machine.tiers:
            raise PlanError("$.tiers: the tier 'hbm' is missing, expected the accelerator's bytes")


def _check_accelerator(gpu: Accelerator) -> None:
    if gpu.count < 1:
        raise PlanError(f"$.accelerator.count: found {gpu.count}, expected at least 1")
    for field in ("hbm_bandwidth", "op_seconds"):
        _positive(f"$.accelerator.{field}", getattr(gpu, field))
    _not_negative("$.accelerator.peer_bandwidth", gpu.peer_bandwidth)
    for field in ("gemm", "attention"):
        if not getattr(gpu, field):
            raise PlanError(f"$.accelerator.{field}: found no dtype, expected one curve at least")


def _positive(where: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise PlanError(f"{where}: found {value}, expected a positive number")


def _not_negative(where: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise PlanError(f"{where}: found {value}, expected a number of at least 0")
