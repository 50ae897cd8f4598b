"""Workloads without prompts: by shorthand, by the name of a published one, and from JSON files.

A plan needs no more of its prompts than their lengths. A workload file holds one object:
``{"lengths": [[512, 1000], [200, 24]], "new_tokens": 256}`` is 1000 prompts of 512 tokens and 24 of
200, each continued by 256; ``name`` and ``sources`` may say more.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path

from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.ir.workload import Workload

MOST_PROMPTS = 1_000_000
"""More are refused: a plan for a part of them is as good, and planning lists every one."""

_SHORTHAND = re.compile(r"([0-9]{1,9})x([0-9]{1,9})\+([0-9]{1,9})")
_NAMED = re.compile(r"([^+]+?)(?:\+([0-9]{1,9}))?")
_FORMS = "PROMPTSxLENGTH+NEW such as 1024x512+256, the path of a workload file (.json)"


@dataclass(frozen=True, slots=True)
class WorkloadFile:
    """What a workload file holds; ``lengths`` are (tokens, how many prompts) in any order."""

    lengths: tuple[tuple[int, int], ...]
    new_tokens: int
    name: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)

    def workload(self) -> Workload:
        """The workload, equal lengths added up. Raises ValueError where there can be none."""
        counts: dict[int, int] = {}
        for length, count in self.lengths:
            if count < 1:
                raise ValueError(f"found {count} prompts of {length} tokens, expected at least 1")
            counts[length] = counts.get(length, 0) + count
        total = sum(counts.values())
        if total > MOST_PROMPTS:
            raise ValueError(f"found {total} prompts, expected at most {MOST_PROMPTS}")
        return Workload(tuple(sorted(counts.items(), reverse=True)), self.new_tokens)


def shipped_workloads() -> list[str]:
    """The names of the workloads that come with dovetail, sorted."""
    return sorted(
        entry.name.removesuffix(".json")
        for entry in _folder().iterdir()
        if entry.name.endswith(".json")
    )


def load_workload(text: str) -> Workload:
    """The workload that ``text`` describes, names or is the path of.

    It is ``1024x512+256`` (1024 prompts of 512 tokens, 256 new ones each), the name of a shipped
    workload, such a name with other new tokens as in ``mtbench+64``, or the path of a file, which
    has a folder in it or ends in ``.json``. Raises InputError for anything else.
    """
    if match := _SHORTHAND.fullmatch(text):
        prompts, length, new = map(int, match.groups())
        return _made(WorkloadFile(((length, prompts),), new), f"workload {text!r}")
    match = _NAMED.fullmatch(text)
    if match and match[1] in shipped_workloads():
        file = load_workload_file(match[1])
        if match[2]:
            file = replace(file, new_tokens=int(match[2]))
        return _made(file, f"workload {text!r}")
    if Path(text).name != text or text.endswith(".json"):
        return _made(load_workload_file(text), f"the workload file {text}")
    raise InputError(
        f"workload {text!r}: expected {_FORMS}, or one of the published workloads "
        f"{', '.join(shipped_workloads())}, with +NEW for other new tokens"
    )


def load_workload_file(name_or_path: str) -> WorkloadFile:
    """What the file at a path, or the shipped one of that name, holds. Raises InputError."""
    if name_or_path in shipped_workloads():
        content = _folder().joinpath(f"{name_or_path}.json").read_bytes()
    else:
        content = _read(Path(name_or_path))
    try:
        return codec.decode(json.loads(content.decode("utf-8")), WorkloadFile)
    except (ValueError, RecursionError) as error:
        # ValueError covers text that is not UTF-8, not JSON, and JSON that is no workload.
        raise InputError(
            f"the workload file {name_or_path} does not describe a workload: {error}; expected "
            '{"lengths": [[tokens, prompts], ...], "new_tokens": number}'
        ) from error


def check_context(workload: Workload, context: int) -> None:
    """Raise InputError unless every prompt and its new tokens fit in a context of ``context``."""
    needed = workload.longest + workload.new_tokens
    if needed > context:
        raise InputError(
            f"the longest prompt of the workload has {workload.longest} tokens and "
            f"{workload.new_tokens} new ones, {needed} together; the model's context is {context}: "
            "shorten one of the two"
        )


def _made(file: WorkloadFile, what: str) -> Workload:
    try:
        return file.workload()
    except ValueError as error:
        raise InputError(f"{what}: {error}; correct it") from error


def _folder() -> Traversable:
    return resources.files("dovetail").joinpath("workloads")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the workload file {path} cannot be read: {error.strerror}; give the path of a "
            f"workload file or one of the shipped workloads: {', '.join(shipped_workloads())}"
        ) from error
