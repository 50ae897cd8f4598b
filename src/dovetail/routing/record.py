"""Recording a routing trace while a batch runs, so that a kill neither loses nor doubles a row.

Beside FILE.npz, FILE.npz.partial takes every choice as it is made: a header line in JSON, then
records. A record is a JSON line that says which tokens it is about or which layer, and after a
layer's line the experts as int16:

    {"dovetail_routing": 1, "run": "digest", "geometry": {"num_experts": …, "top_k": …, …}}
    {"continued": false}
    {"step": 1, "groups": [[false, [[prompt, first position, tokens], …]], …]}
    {"layer": 0, "tokens": 37}<37 * top_k int16>

What finished prompts chose is on disk before the journal says that they are finished. A prompt
that a kill cut off runs again and its rows replace those of before. When all prompts are there,
the trace is put together and the record is removed.
"""

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, Self

from torch import Tensor, int16

from dovetail.ir import codec
from dovetail.ir.batching import Group
from dovetail.ir.errors import InputError, OutputError, PlanError
from dovetail.ir.routing_trace import RoutingTrace
from dovetail.ir.task_graph import TaskGraph
from dovetail.locked_file import open_locked
from dovetail.routing.rows import Geometry, Lengths, Rows
from dovetail.routing.trace import save_trace

VERSION = 1
_HEADER_START = b'{"dovetail_routing":'
_ALONE = (
    "expected one run per routing trace: wait for the other run to end, or choose another "
    "--record-routing"
)


class RoutingRecord:
    """The record of one batch run, held under a lock until it is closed; a RoutingSink.

    Use as a context manager: ``begin`` before the run, ``sync`` before prompts are said to be
    finished, ``finish`` when all are, ``remove`` when that is on record.
    """

    def __init__(self, path: Path, file: BinaryIO, run: str) -> None:
        """Wrap an open record; use RoutingRecord.open."""
        self.path, self._file, self._run = path, file, run
        self.geometry: Geometry | None = None
        self._place: tuple[int, list[object]] | None = None
        self._columns: dict[int, int] = {}

    @classmethod
    def open(cls, path: Path, run: Mapping[str, Any], done: Lengths, *, restart: bool) -> Self:
        """Start or continue the record of the trace ``path``; ``run`` names the run.

        ``done`` are the prompts that are finished. Raises InputError if their rows are not there
        or the file belongs to another run, OutputError if it cannot be written.
        """
        place = record_path(path)
        if path.exists() and not place.exists() and not restart:
            raise InputError(
                f"{path}: found a file, expected none to write the routing trace to: choose "
                "another --record-routing, move the file away, or pass --restart to replace it"
            )
        with ExitStack() as on_error:
            file = _locked(place)
            on_error.callback(file.close)
            record = cls(path, file, codec.digest(dict(run)))
            record._resume(done, restart)
            on_error.pop_all()
        return record

    def _resume(self, done: Lengths, restart: bool) -> None:
        header = None if restart else _header(self._file, record_path(self.path))
        if header is None or header.get("run") != self._run:
            if done:
                raise _unrecorded(self.path, len(done))
            self._cut(0)
            return
        try:
            self.geometry = codec.decode(header["geometry"], Geometry)
        except (KeyError, PlanError) as error:
            raise self._damaged(error) from error
        self._cut(self._rows(done)[1])

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._file.seek(end)

    def begin(self, graph: TaskGraph) -> None:
        """Get ready to take the choices of ``graph``'s layers. Raises InputError if it is not the
        model of the record."""
        geometry = Geometry.of(graph)
        if self.geometry not in (None, geometry):
            raise InputError(
                f"{record_path(self.path)}: found rows of {self.geometry}, expected {geometry}: "
                "pass --restart"
            )
        if self.geometry is None:
            head = {"dovetail_routing": VERSION, "run": self._run}
            self._write(_line(head | {"geometry": codec.encode(geometry)}))
        self._write(_line({"continued": self.geometry is not None}))
        self.geometry = geometry
        self._columns = {layer: column for column, layer in enumerate(geometry.layers)}

    def routed(self, step: int, layer: int, groups: Sequence[Group], experts: Tensor) -> None:
        """Write what the tokens of ``groups`` chose. Raises OutputError if the disk is full."""
        listed: list[object] = [
            [
                not g.prefill,
                [[m.index, m.held, n] for m, n in zip(g.members, g.lengths, strict=True)],
            ]
            for g in groups
        ]
        if self._place != (step, listed):
            self._place = (step, listed)
            self._write(_line({"step": step, "groups": listed}))
        self._write(_line({"layer": self._columns[layer], "tokens": experts.shape[0]}))
        self._write(experts.to(int16).contiguous().numpy().data)

    def sync(self) -> None:
        """Put on disk what was written: after this it survives a loss of power."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._not_written(error) from error

    def finish(self, done: Lengths) -> RoutingTrace:
        """Put the trace of the finished prompts together and write it."""
        self.sync()
        assert self.geometry is not None
        trace = self._rows(done)[0].trace(self.geometry)
        save_trace(trace, self.path)
        return trace

    def _rows(self, done: Lengths) -> tuple[Rows, int]:
        """The rows of the finished prompts, all of them there, and the end of the record."""
        assert self.geometry is not None
        rows = Rows.empty(self.geometry, done)
        try:
            end = rows.read(self._file, self.geometry)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise self._damaged(error) from error
        if rows.experts.size and rows.experts.min() < 0:
            raise _unrecorded(self.path, len(done))
        return rows, end

    def _damaged(self, error: Exception) -> InputError:
        return InputError(
            f"{record_path(self.path)}: found a damaged routing record ({error}); pass --restart "
            "to run every prompt again, or leave --record-routing out"
        )

    def remove(self) -> None:
        """Remove the record: the trace is in place."""
        record_path(self.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock; closing twice is harmless."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise self._not_written(error) from error

    def _not_written(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write the routing record {record_path(self.path)}: {error.strerror}; free "
            "some space and run the same command again"
        )


def check_recorded(path: Path | None) -> None:
    """Raise InputError if ``path`` asks for the trace of a complete run that has none there."""
    if path is None:
        return
    if not path.exists():
        raise InputError(
            f"{path}: the run is complete and this trace of it is not there; what tokens chose is "
            "known only while they run: pass --restart to run every prompt again"
        )
    # A kill between the run's end and the removal leaves it.
    record_path(path).unlink(missing_ok=True)


def record_path(trace: Path) -> Path:
    """Where the choices go until the trace is put together."""
    return trace.with_name(trace.name + ".partial")


def _header(file: BinaryIO, path: Path) -> dict[str, Any] | None:
    """The header, or None if not even that was written whole. Raises InputError if the file is of
    another kind or version."""
    file.seek(0)
    line = file.readline()
    if not line.endswith(b"\n") and _HEADER_START.startswith(line[: len(_HEADER_START)]):
        return None
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict) or header.get("dovetail_routing") != VERSION:
        raise InputError(
            f"{path}: found a file that is not a routing record of version {VERSION}, expected "
            "none or one: choose another --record-routing, or pass --restart to replace it"
        )
    return header


def _locked(path: Path) -> BinaryIO:
    """Open or create the record and lock it for this process."""
    try:
        fd = open_locked(path, 0, _ALONE)
    except OSError as error:
        raise OutputError(
            f"cannot keep the routing record {path}: {error.strerror}; expected a folder that "
            "can be written to: choose another --record-routing"
        ) from error
    return os.fdopen(fd, "r+b", buffering=1 << 16)


def _line(value: Mapping[str, object]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"


def _unrecorded(path: Path, prompts: int) -> InputError:
    return InputError(
        f"{path}: an earlier run finished {prompts} prompts without recording all that they "
        "chose; a trace holds every prompt: pass --restart to run all of them again, or leave "
        "--record-routing out"
    )
