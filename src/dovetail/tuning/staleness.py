"""Staleness: how far is here and now from where a plan or a record was made, and what follows.

A relation with five grades, not a flag. Every field of an environment has the grade that a change
of it leads to; the worst one counts. What changes compiled code or the disk asks for new timings,
what changes only its surroundings is replayed, and what was measured on other silicon is no more
than a place to begin a search.
"""

import ast
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib import resources
from pathlib import Path

from dovetail.ir.plan import Plan

TOP = 5
"""So many of the best records are timed again where the compiler or the disk differs."""


class Grade(StrEnum):
    """How far a record is from here, nearest first."""

    SAME = "same"
    NEAR = "near"
    RECOMPILED = "recompiled"
    COUSIN = "cousin"
    FOREIGN = "foreign"

    @property
    def distance(self) -> int:
        """0 for ``same`` up to 4 for ``foreign``."""
        return list(Grade).index(self)


ACTIONS = {
    Grade.SAME: "used as it is",
    Grade.NEAR: "used; `dovetail tune` times its winner against the default once more",
    Grade.RECOMPILED: f"tune again, which times its best {TOP} against the default first",
    Grade.COUSIN: "tune again, for which it is no more than a place to begin",
    Grade.FOREIGN: "tune again; what was measured there says nothing here",
}
"""What is done with a record of each grade."""

_WHAT = {
    Grade.SAME: "was made for this machine and software",
    Grade.NEAR: "was made for nearly this software",
    Grade.RECOMPILED: "was made for other software or another disk",
    Grade.COUSIN: "was made for another machine of this kind",
    Grade.FOREIGN: "was made for a different machine",
}

FIELDS = {
    "kernel": Grade.NEAR,
    "python": Grade.NEAR,
    "driver": Grade.NEAR,
    "memory": Grade.NEAR,
    "torch_cpu": Grade.RECOMPILED,
    "triton": Grade.RECOMPILED,
    "ptxas": Grade.RECOMPILED,
    "cuda": Grade.RECOMPILED,
    "dovetail": Grade.RECOMPILED,
    "disk": Grade.RECOMPILED,
    "family": Grade.COUSIN,
    "cores": Grade.COUSIN,
    "l3_bytes": Grade.COUSIN,
    "sm_count": Grade.COUSIN,
    "l2_bytes": Grade.COUSIN,
    "hbm_bytes": Grade.COUSIN,
    "mem_clock_khz": Grade.COUSIN,
    "link": Grade.COUSIN,
    "flags": Grade.FOREIGN,
    "cc": Grade.FOREIGN,
}
"""The grade of a change of each field. ``torch`` is RECOMPILED but for its patch number, which is
NEAR. A field that is not listed is COUSIN."""

NAMES = frozenset({"processor", "device_name"})
"""Product names: two of them may be one silicon, so they are shown and not compared."""

KINDS = ("flags", "cc")
"""Without one of these nothing says what instructions a record was made for."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A field that is not what it was; "-" where one of the two does not have it."""

    field: str
    then: str
    now: str
    grade: Grade

    def __str__(self) -> str:
        return f"{self.field} {_short(self.then)} -> {_short(self.now)}"


@dataclass(frozen=True, slots=True)
class Staleness:
    """A grade and the fields that led to it, the gravest first."""

    grade: Grade
    differences: tuple[Difference, ...]

    @property
    def action(self) -> str:
        """What is done with a record of this grade."""
        return ACTIONS[self.grade]

    def message(self, name: str) -> str:
        """One line about the record called ``name``: what differs and what follows."""
        fields = "; ".join(str(each) for each in self.differences)
        return f"{name} {_WHAT[self.grade]}{f' ({fields})' if fields else ''}: {self.action}"


def compare(then: Mapping[str, str], now: Mapping[str, str]) -> Staleness:
    """How far the environment ``now`` is from ``then``, both fields by name.

    A field that ``then`` does not have was not known to matter and is left out, but a record that
    does not say what kind of silicon it was made on is foreign.
    """
    if not any(kind in then for kind in KINDS):
        told = ", ".join(f"{name} {value}" for name, value in then.items() if name in NAMES)
        unknown = Difference("silicon", told or "not recorded", _kind(now), Grade.FOREIGN)
        return Staleness(Grade.FOREIGN, (unknown,))
    found = [
        Difference(field, value, now.get(field, "-"), _grade(field, value, now.get(field, "-")))
        for field, value in then.items()
        if field not in NAMES and value != now.get(field, "-")
    ]
    found.sort(key=lambda each: (-each.grade.distance, each.field))
    return Staleness(found[0].grade if found else Grade.SAME, tuple(found))


def environment_here(files: Sequence[Path] = ()) -> dict[str, str]:
    """This machine, the disk that holds ``files`` (without any it is left out), its software and
    the code that turns plans into runs."""
    from dovetail.runtime import calibrate_host as host

    disk = {"disk": host.disk_device(files[0])} if files else {}
    return host.silicon() | host.software() | disk | {"dovetail": code_digest()}


def environment_of(plan: Plan) -> dict[str, str]:
    """The environment that the plan says it was timed in, or else its machine calibrated in."""
    return dict(plan.machine.silicon if plan.tuning is None else plan.tuning.environment)


def plan_staleness(plan: Plan, now: Mapping[str, str] | None = None) -> Staleness:
    """How far ``now``, by default this machine without its disk, is from the plan's."""
    then = environment_of(plan)
    if now is None:
        now = environment_here()
        then.pop("disk", None)
    return compare(then, now)


@cache
def code_digest() -> str:
    """Digest of the code that decides what a schedule's executor says and does, comments aside."""
    return _digest_of(_CODE)


@cache
def kernel_code_digest() -> str:
    """Digest of the code that turns a kernel's spec into text and launches, comments aside."""
    return _digest_of(_KERNEL_CODE)


def _digest_of(code: Mapping[str, tuple[str, ...]]) -> str:
    total = hashlib.sha256()
    for room, names in code.items():
        folder = resources.files(f"dovetail.{room}")
        found = sorted(p.name for p in folder.iterdir() if p.name.endswith(".py"))
        for name in names or found:
            tree = ast.parse(folder.joinpath(name).read_text("utf-8"))
            total.update(f"{room}/{name}\n{ast.dump(tree)}\n".encode())
    return total.hexdigest()[:16]


_CODE: dict[str, tuple[str, ...]] = {
    "codegen": (),
    "runtime": (),
    "passes": ("apply_moves.py", "expert_precision.py", "lower.py"),
}
"""Rooms, all their files or those named."""
_KERNEL_CODE: dict[str, tuple[str, ...]] = {
    "codegen.kernels": (),
    "ir": ("kernel_layer.py", "kernel_parts.py", "kernel_spec.py"),
    "kernels": ("rung_bench.py", "timing.py"),
}


def _grade(field: str, then: str, now: str) -> Grade:
    if field == "torch":
        return Grade.NEAR if _minor(then) == _minor(now) else Grade.RECOMPILED
    return FIELDS.get(field, Grade.COUSIN)


def _minor(version: str) -> list[str]:
    """Major and minor number, and the build: a CPU build and a CUDA build differ."""
    number, _, build = version.partition("+")
    return [*number.split(".")[:2], build]


def _kind(now: Mapping[str, str]) -> str:
    return next((now[name] for name in (*NAMES, *KINDS) if name in now), "-")


def _short(text: str) -> str:
    text = " ".join(text.split()) or "-"
    return text if len(text) <= 48 else f"{text[:45]}..."
