"""Machine files: machines that are not here, described or measured elsewhere, as JSON."""

import json
import math
import os
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from dovetail.ir import codec
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.machine import Machine


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
    scratch = path.with_name(f"{path.name}.tmp")
    try:
        with scratch.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    except OSError as error:
        raise InputError(
            f"the machine file {path} cannot be written: {error.strerror}; name another place"
        ) from error


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
        value = getattr(machine, field)
        if not (math.isfinite(value) and value > 0):
            raise PlanError(f"$.{field}: found {value}, expected a positive number")
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
