"""The lines of a journal: a header that names the run, finished prompts, and a receipt."""

import json
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from dovetail.ir.errors import InputError

JSON = None | bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"]

VERSION = 1
_HEADER_START = b'{"dovetail_journal":'
# Half surrogates are not UTF-8, and some readers take the others for line ends.
_NEEDS_ESCAPE = re.compile("[\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """The result of one prompt; the module's docstring gives the meaning of the fields."""

    index: int
    id: str | int
    input_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a complete output file holds: ``prompts`` lines, ``tokens`` new tokens in all."""

    prompts: int
    tokens: int
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Contents:
    """A journal as read: ``records_end`` is the offset behind the header and the whole records.

    ``spans`` gives the offset and size of the line of each finished prompt.
    """

    run: Mapping[str, JSON]
    overwrite: bool
    spans: dict[int, tuple[int, int]]
    receipt: Receipt | None
    records_end: int


def read_lines(fd: int, path: Path) -> Contents | None:
    """Read a journal from its start; None if not even its header was written whole.

    Raises InputError for a file that is no journal, of another version, or corrupt.
    """
    with open(fd, "rb", closefd=False) as file:
        first = file.readline()
        if not first.endswith(b"\n"):
            # A header torn by a kill, unless it is another kind of file.
            if not first.startswith(_HEADER_START[: len(first)]):
                raise _not_a_journal(path)
            return None
        run, overwrite = _header_from(first, path)
        spans: dict[int, tuple[int, int]] = {}
        records_end = len(first)
        for number, line in enumerate(file, start=2):
            if not line.endswith(b"\n"):
                break
            entry = _entry_from(line, path, number)
            if isinstance(entry, Receipt):
                return Contents(run, overwrite, spans, entry, records_end)
            if entry.index in spans:
                raise _corrupt(path, number, f"prompt {entry.index} a second time")
            spans[entry.index] = (records_end, len(line))
            records_end += len(line)
    return Contents(run, overwrite, spans, None, records_end)


def _header_from(line: bytes, path: Path) -> tuple[Mapping[str, JSON], bool]:
    match _loads(line):
        case {"dovetail_journal": 1, "run": dict(run), "overwrite": bool(overwrite)}:
            return run, overwrite
        case {"dovetail_journal": version}:
            raise InputError(
                f"{path}: found a journal of version {version}; expected version {VERSION}: "
                "continue it with the dovetail that wrote it, choose another --out, or pass "
                "--restart to run every prompt again"
            )
    raise _not_a_journal(path)


def _entry_from(line: bytes, path: Path, number: int) -> Record | Receipt:
    value = _loads(line)
    match value:
        case {
            "receipt": {
                "prompts": int(prompts),
                "tokens": int(tokens),
                "bytes": int(size),
                "sha256": str(sha256),
            }
        }:
            return Receipt(prompts, tokens, size, sha256)
    record = record_from(value)
    if record is None:
        raise _corrupt(path, number, reprlib.repr(line.decode(errors="replace").rstrip()))
    return record


def record_from(value: object) -> Record | None:
    """The record that a line's JSON value says, None if it says none."""
    match value:
        case {
            "index": int(index),
            "id": (str() | int()) as prompt_id,
            "input_tokens": int(input_tokens),
            "tokens": list(tokens),
            "text": str(text),
            "finish_reason": ("stop" | "length") as reason,
        } if set(map(type, tokens)) <= {int}:
            return Record(index, prompt_id, input_tokens, tuple(tokens), text, reason)
    return None


def _loads(line: bytes) -> object:
    """Return a line's JSON value, or None where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def as_dict(record: Record) -> dict[str, JSON]:
    """A record as its line says it."""
    # Not asdict, which copies the tokens one by one.
    return {field.name: getattr(record, field.name) for field in fields(record)}


def to_line(value: Mapping[str, JSON]) -> bytes:
    """A JSON line that every reader takes for one line of UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    if _NEEDS_ESCAPE.search(text):
        text = json.dumps(value)
    return text.encode() + b"\n"


def _not_a_journal(path: Path) -> InputError:
    return InputError(
        f"{path}: found a file that is not a journal of dovetail; expected none or a journal: "
        "choose another --out, move the file away, or pass --restart to replace it"
    )


def _corrupt(path: Path, number: int, found: str) -> InputError:
    return InputError(
        f"{path}, line {number}: found {found}; expected a finished prompt: delete this line and "
        "run the same command again (its prompt runs again), or pass --restart to run every prompt "
        "again"
    )
