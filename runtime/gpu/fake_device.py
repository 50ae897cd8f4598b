"""A device without hardware that checks every hazard of what it is asked to do.

It knows streams, events and bytes, and nothing of programs. Each engine has a vector clock: of
every engine how many launches are known to have ended. Two accesses to the same bytes, one of them
a write, must be ordered by it; otherwise some speeds of the engines let them overlap.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from dovetail.ir.errors import VerifyError
from dovetail.runtime.gpu.device import Buffer, Event, Launch

Access = tuple[str, int, str]
"""Engine, number of the launch on it, and what it was."""


@dataclass(slots=True)
class _Bytes:
    """The last write to a buffer and the reads since."""

    written: Access
    reads: list[Access] = field(default_factory=list)


class FakeDevice:
    """Records and checks; ``capacity`` has the bytes of each tier. Raises VerifyError at the first
    hazard: bytes that are read before they are written or while they may still be written, written
    while they may still be read, out of their allocation, or a wait for an event that was not
    recorded."""

    def __init__(self, capacity: Mapping[str, int]) -> None:
        self.capacity = dict(capacity)
        self.allocated: dict[str, int] = dict.fromkeys(capacity, 0)
        self.launches: list[Launch] = []
        self._sizes: dict[str, int] = {}
        self._lock = threading.Lock()
        self._clocks: dict[str, dict[str, int]] = {}
        self._bytes: dict[Buffer, _Bytes] = {}
        self._starts: dict[str, int] = {}

    def allocate(self, tier: str, nbytes: int, owner: str) -> None:
        """Count the bytes. Raises VerifyError above the tier's capacity."""
        used = self.allocated.get(tier, 0) + nbytes
        if used > self.capacity.get(tier, 0):
            raise VerifyError(
                f"{owner} takes {tier} to {used} bytes, expected at most "
                f"{self.capacity.get(tier, 0)}"
            )
        self.allocated[tier], self._sizes[owner] = used, nbytes

    def launch(self, engine: str, launch: Launch) -> None:
        """Check what an operation reads and writes against everything before it."""
        at = f"{engine} at {launch.op}[{launch.layer}]"
        with self._lock:
            clock = self._clocks.setdefault(engine, {})
            mine = engine, clock.get(engine, 0) + 1, f"{launch.op}[{launch.layer}]"
            for buffer, source in zip(launch.reads, launch.sources, strict=True):
                self._read(at, clock, buffer, source, mine)
            self._write(at, clock, launch.writes, mine)
            clock[engine] = mine[1]
            self.launches.append(launch)

    def record(self, engine: str, event: Event) -> None:
        """Remember what the engine knows to have ended by then."""
        with self._lock:
            event.mark = dict(self._clocks.get(engine, {}))

    def wait(self, engine: str, event: Event) -> None:
        """Learn what was known at the event. Raises VerifyError if it was never recorded."""
        if event.mark is None:
            raise VerifyError(
                f"{engine} waits for the event of {event.name}, which was never recorded: a device "
                "would not wait at all"
            )
        with self._lock:
            clock = self._clocks.setdefault(engine, {})
            for name, count in event.mark.items():
                clock[name] = max(clock.get(name, 0), count)

    def finish(self) -> None:
        """Everything has ended: all engines know all."""
        with self._lock:
            last = {name: clock.get(name, 0) for name, clock in self._clocks.items()}
            self._clocks = {name: dict(last) for name in self._clocks}

    def _read(
        self, at: str, clock: Mapping[str, int], buffer: Buffer, source: str, mine: Access
    ) -> None:
        self._check_inside(at, buffer)
        there = self._bytes.get(buffer)
        if there is None:
            raise VerifyError(f"{at}: reads {_text(buffer)}, which nothing has written")
        _check_ended(at, clock, there.written, f"reads {_text(buffer)}, which is written by")
        if there.written[2] != source:
            raise VerifyError(
                f"{at}: reads {source} from {_text(buffer)}, which holds {there.written[2]}: the "
                "buffer was reused before its reader, or read before its copy"
            )
        there.reads.append(mine)

    def _write(self, at: str, clock: Mapping[str, int], buffer: Buffer, mine: Access) -> None:
        self._check_inside(at, buffer)
        there = self._bytes.get(buffer)
        if there is not None:
            written = f"writes {_text(buffer)}, which is written by"
            _check_ended(at, clock, there.written, written)
            for read in there.reads:
                if read != mine:
                    _check_ended(at, clock, read, f"writes {_text(buffer)}, which is read by")
        self._bytes[buffer] = _Bytes(mine)

    def _check_inside(self, at: str, buffer: Buffer) -> None:
        size = self._sizes.get(buffer.owner)
        if size is not None and buffer.start + buffer.nbytes > size:
            raise VerifyError(
                f"{at}: {_text(buffer)} ends at byte {buffer.start + buffer.nbytes}, the "
                f"allocation has {size}"
            )
        # Buffers of one allocation are of one size, so different ones never overlap.
        known = self._starts.setdefault(buffer.owner, buffer.nbytes)
        if size is not None and (known != buffer.nbytes or buffer.start % known):
            raise VerifyError(f"{at}: {_text(buffer)} is no whole buffer of {known} bytes")


def _check_ended(at: str, clock: Mapping[str, int], access: Access, what: str) -> None:
    engine, number, name = access
    if clock.get(engine, 0) < number:
        raise VerifyError(
            f"{at}: {what} {name} on {engine}; that may not have ended, expected a wait for it"
        )


def _text(buffer: Buffer) -> str:
    return f"bytes {buffer.start}+{buffer.nbytes} of {buffer.owner}"
