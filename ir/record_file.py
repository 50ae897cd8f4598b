"""Records as files with the digest of their content: written whole, read strictly."""

import json
import os
from pathlib import Path
from typing import Any, Protocol, TypeVar

from dovetail.ir import codec
from dovetail.ir.errors import PlanError


class Digested(Protocol):
    """A record that knows the digest of its content; ``version`` is that of its form."""

    @property
    def version(self) -> int: ...

    def digest(self) -> str: ...


R = TypeVar("R", bound=Digested)


def write_whole(text: str, path: Path) -> None:
    """Write a file; a crash leaves either the old file or the new one. Raises OSError."""
    scratch = path.with_name(path.name + ".tmp")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def fields(record: Digested) -> dict[str, Any]:
    """What the file of a record holds: its digest, then its fields."""
    data = codec.encode(record)
    assert isinstance(data, dict)
    return {"digest": record.digest()} | data


def load_record(path: Path, kind: type[R], version: int, noun: str, made_by: str) -> R:
    """Read a record of this kind and version, called ``noun`` and made by the command ``made_by``.

    Raises PlanError on a file that is missing, malformed, of another version or altered.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"{path}: no such {noun} file; make one with `{made_by}`") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path}: not a readable {noun}: {error}; make it again") from None
    if not isinstance(data, dict) or data.get("kind") != kind.__name__:
        raise PlanError(
            f"{path}: not a dovetail {noun}: expected an object of kind '{kind.__name__}'"
        )
    if (found := data.get("version")) != version:
        raise PlanError(
            f"{path}: {noun} version {found!r}, this dovetail reads {version}; make it again"
        )
    stated = data.pop("digest", None)
    try:
        record = codec.decode(data, kind)
    except PlanError as error:
        raise PlanError(f"{path}: {error}; make the {noun} again") from None
    if stated != record.digest():
        raise PlanError(
            f"{path}: digest {str(stated)[:12]} does not match the content "
            f"({record.digest()[:12]}); the file was altered: make the {noun} again"
        )
    return record
