"""Exactly-once output of a batch run: finished prompts go to a journal, the journal to the output.

The output file has one JSON object a line, in the order of the input file:

    {"index": 0, "id": "a", "input_tokens": 3, "tokens": [5], "text": "hi", "finish_reason": "stop"}

``index`` is the prompt's position from 0 among the prompts that ran, ``id`` its own,
``input_tokens`` the length of the prompt, ``tokens`` the new token ids and ``text`` the text
decoded from them; ``finish_reason`` is "stop" after an end token and "length" where
``max_new_tokens`` or the context ended it.

While a run goes on, ``<out>.journal`` holds a header that names the run and one such line for each
finished prompt, in the order of finishing. It ends in one of three states, and a kill at any moment
leaves one of them:

1. header and lines (the last may be torn): the same command continues;
2. header, all lines and a receipt (digest and size of the output): the output is about to be put
   in place, or has been;
3. header and receipt: the run is complete, and the same command has nothing to do.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Self

from dovetail.ir.errors import InputError, OutputError
from dovetail.journal_lines import (
    JSON,
    VERSION,
    Receipt,
    Record,
    as_dict,
    read_lines,
    record_from,
    to_line,
)
from dovetail.locked_file import open_locked

_ALONE = "expected one run per output file: wait for the other run to end, or choose another --out"


class _Done(Mapping[int, Record]):
    """The finished prompts by index; records stay on disk and are read one at a time."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.spans: dict[int, tuple[int, int]] = {}

    def __getitem__(self, index: int) -> Record:
        record = record_from(json.loads(self.line(index)))
        assert record is not None, index
        return record

    def __iter__(self) -> Iterator[int]:
        return iter(self.spans)

    def __len__(self) -> int:
        return len(self.spans)

    def __contains__(self, index: object) -> bool:
        return index in self.spans

    def line(self, index: int) -> bytes:
        start, size = self.spans[index]
        return os.pread(self.fd, size, start)


class Journal:
    """The journal of one output file, held under a lock until it is closed.

    ``done`` maps the index of each finished prompt to its record. Once the output is complete,
    ``receipt`` is set and ``done`` is empty.
    """

    def __init__(self, out: Path, fd: int, run: Mapping[str, JSON]) -> None:
        """Wrap a locked journal; use Journal.open."""
        self.out = out
        self.path = _journal_path(out)
        self.receipt: Receipt | None = None
        # Through JSON, so that a tuple equals the list that comes back from the file.
        self._run: Mapping[str, JSON] = json.loads(json.dumps(run))
        self._fd = fd
        self._end = 0
        self._overwrite = False
        self._done = _Done(fd)

    @classmethod
    def open(cls, out: Path, run: Mapping[str, JSON], *, restart: bool = False) -> Self:
        """Start or continue the run that writes ``out``; ``run`` names all that results depend on.

        With ``restart`` an earlier journal is dropped, and an existing output is replaced once the
        new one is complete. Raises InputError if the journal or the output belongs to another run,
        is corrupt, or is being written by another process; OutputError if it cannot be written.
        """
        out = out.resolve()
        _check_target(out)
        path = _journal_path(out)
        if out.exists() and not path.exists() and not restart:
            raise _foreign(out)
        with ExitStack() as on_error:
            try:
                fd = open_locked(path, os.O_APPEND, _ALONE)
                on_error.callback(os.close, fd)
                journal = cls(out, fd, run)
                if restart:
                    journal._start(overwrite=out.exists())
                else:
                    journal._resume()
            except OSError as error:
                raise OutputError(
                    f"cannot keep the journal {path}: {error.strerror}; expected a folder that can "
                    "be written to: make room there, or choose another --out"
                ) from error
            on_error.pop_all()
        return journal

    @property
    def done(self) -> Mapping[int, Record]:
        """The finished prompts by index; records are read from disk on access."""
        return self._done

    @property
    def complete(self) -> bool:
        """Whether the output file is in place with every prompt in it."""
        return self.receipt is not None

    def append(self, records: Sequence[Record]) -> None:
        """Add finished prompts; once this returns, they survive a kill and a loss of power.

        Raises OutputError if they cannot be written; the journal then holds, whole, what it held
        before and as many of them as fitted, and ``done`` says which.
        """
        assert not self.complete, "append to a complete journal"
        lines = {record.index: to_line(as_dict(record)) for record in records}
        assert len(lines) == len(records), "an index twice in one append"
        assert self._done.spans.keys().isdisjoint(lines), "an index that is already finished"
        start = self._end
        try:
            try:
                self._write(b"".join(lines.values()))
            finally:
                # Also after Ctrl-C: what is in the file is never written a second time.
                self._note_written(start, lines)
        except OSError as error:
            raise self._not_written(error) from error

    def finish(self, order: Sequence[int]) -> None:
        """Put the output in place, its lines in this order of indices, and mark the run complete.

        Raises OutputError if it cannot be written, and InputError if another file has taken its
        name; the journal then keeps every prompt, and is to be closed and opened again.
        """
        assert not self.complete, "finish of a complete journal"
        assert len(set(order)) == len(order) == len(self._done), "order differs from done"
        partial = _partial_path(self.path)
        try:
            receipt = self._write_output(partial, order)
            if self.out.exists() and not self._overwrite:
                raise _foreign(self.out)
            # Before the replacement, so that a kill after it leaves an output known as ours.
            self._write(to_line({"receipt": asdict(receipt)}))
            os.replace(partial, self.out)
            _sync_folder(self.out.parent)
        except OSError as error:
            raise self._not_written(error) from error
        finally:
            with suppress(OSError):
                partial.unlink()
        self.receipt = receipt
        self._shrink()

    def close(self) -> None:
        """Release the lock; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _start(self, *, overwrite: bool) -> None:
        self._overwrite = overwrite
        self._cut(0)
        self._write(self._header())
        _sync_folder(self.path.parent)

    def _header(self) -> bytes:
        return to_line(
            {"dovetail_journal": VERSION, "run": self._run, "overwrite": self._overwrite}
        )

    def _resume(self) -> None:
        contents = read_lines(self._fd, self.path)
        exists = self.out.exists()
        if not exists and (contents is None or not contents.spans):
            # Nothing finished is lost by starting anew, whatever run the header names.
            self._start(overwrite=False)
            return
        if contents is None:
            raise _foreign(self.out)
        _check_same_run(self.path, contents.run, self._run)
        self._done.spans = contents.spans
        if contents.receipt and exists and _matches(self.out, contents.receipt):
            self.receipt = contents.receipt
            if contents.spans:
                self._shrink()
            return
        if exists and not contents.overwrite:
            raise _changed(self.out) if contents.receipt else _foreign(self.out)
        self._overwrite = contents.overwrite
        # Drops a torn line, and the receipt of an output that never got into place.
        self._cut(contents.records_end)

    def _write(self, data: bytes) -> None:
        """Append whole lines durably; after an error only whole lines of them are kept."""
        written = kept = 0
        try:
            while written < len(data):
                written += os.write(self._fd, data[written:])
                kept = data.rfind(b"\n", 0, written) + 1
            # After a failed fsync nothing says which lines reached the disk.
            kept = 0
            os.fsync(self._fd)
            kept = len(data)
        finally:
            self._end += kept
            if kept < len(data):
                # Where this fails as well, the next open drops the torn line.
                with suppress(OSError):
                    self._cut(self._end)

    def _cut(self, end: int) -> None:
        os.ftruncate(self._fd, end)
        os.fsync(self._fd)
        self._end = end

    def _note_written(self, start: int, lines: Mapping[int, bytes]) -> None:
        for index, line in lines.items():
            if start + len(line) <= self._end:
                self._done.spans[index] = (start, len(line))
            start += len(line)

    def _not_written(self, error: OSError) -> OutputError:
        count = len(self._done)
        return OutputError(
            f"cannot write the results of {self.out}: {error.strerror}; {count} "
            f"{'prompt is' if count == 1 else 'prompts are'} finished and kept in {self.path}: "
            "free some space and run the same command again"
        )

    def _write_output(self, partial: Path, order: Sequence[int]) -> Receipt:
        digest = hashlib.sha256()
        size = tokens = 0
        with partial.open("wb") as file:
            for index in order:
                line = self._done.line(index)
                tokens += len(self._done[index].tokens)
                size += len(line)
                digest.update(line)
                file.write(line)
            file.flush()
            os.fsync(file.fileno())
        return Receipt(len(order), tokens, size, digest.hexdigest())

    def _shrink(self) -> None:
        """Cut the journal down to its receipt, so that the results are not on disk twice."""
        assert self.receipt is not None
        self._done.spans = {}
        self._overwrite = False
        partial = _partial_path(self.path)
        # The output is in place already: where this fails, the long journal says the same.
        with suppress(OSError):
            with partial.open("wb") as file:
                file.write(self._header() + to_line({"receipt": asdict(self.receipt)}))
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)
            _sync_folder(self.path.parent)


def _journal_path(out: Path) -> Path:
    return out.with_name(out.name + ".journal")


def _partial_path(journal: Path) -> Path:
    return journal.with_name(journal.name + ".partial")


def _check_target(out: Path) -> None:
    if not out.parent.is_dir():
        raise InputError(
            f"{out}: found no folder {out.parent}; expected the output's folder to exist: make it, "
            "or choose another --out"
        )
    if out.exists() and not out.is_file():
        raise InputError(
            f"{out}: found something that is not a plain file; expected no file there: choose "
            "another --out"
        )


def _matches(out: Path, receipt: Receipt) -> bool:
    if out.stat().st_size != receipt.bytes:
        return False
    with out.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == receipt.sha256


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_same_run(path: Path, before: Mapping[str, JSON], now: Mapping[str, JSON]) -> None:
    names = [*before, *(name for name in now if name not in before)]
    missing = object()
    differing = [
        f"{name} was {_value(before, name)} and is now {_value(now, name)}"
        for name in names
        if before.get(name, missing) != now.get(name, missing)
    ]
    if differing:
        raise InputError(
            f"{path}: found the journal of another run: {'; '.join(differing)}; expected the same "
            "run: choose another --out, run with the earlier values to continue, or pass --restart "
            "to drop its results and run every prompt again"
        )


def _value(run: Mapping[str, JSON], name: str) -> str:
    return json.dumps(run[name]) if name in run else "not given"


def _foreign(out: Path) -> InputError:
    return InputError(
        f"{out}: found a file that this run did not write; expected no file there: choose another "
        "--out, move the file away, or pass --restart to replace it"
    )


def _changed(out: Path) -> InputError:
    return InputError(
        f"{out}: found other contents than this run wrote; expected the complete output as it was: "
        "choose another --out, move the file away to run every prompt again, or pass --restart to "
        "replace it"
    )
