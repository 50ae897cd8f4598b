"""Settle a GPU step: `step, pools -> when everything begins, and whose buffer each takes over`.

Engines take their queues in order; an operation begins once what it reads has ended and its pool
has a buffer that nobody will read any more. The order in which buffers come free here becomes the
program's: it is one in which no engine waits for ever. Bodies of different kinds were ordered each
by itself: where they meet, and no engine could go on, one takes first what can begin.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dovetail.ir.errors import VerifyError
from dovetail.ir.gpu_program import GpuOp, Instance, Ref, instance_text
from dovetail.passes.gpu.step import GpuStep


@dataclass(slots=True)
class Settled:
    """The operations in the order in which they begin, with their times; for those that take a
    buffer, whose it was (None: a new one) and its number; what each one needs, and its readers.
    ``queues`` are the step's, with what was ``moved`` forward in its engine's."""

    ops: Mapping[Instance, GpuOp]
    needs: Mapping[Instance, tuple[Instance, ...]]
    readers: Mapping[Instance, tuple[Instance, ...]]
    sequence: list[Instance] = field(default_factory=list)
    start: dict[Instance, float] = field(default_factory=dict)
    end: dict[Instance, float] = field(default_factory=dict)
    taken: dict[Instance, Instance | None] = field(default_factory=dict)
    slots: dict[Instance, int] = field(default_factory=dict)
    queues: dict[str, list[tuple[int, Instance]]] = field(default_factory=dict)
    moved: list[Instance] = field(default_factory=list)


def settle(step: GpuStep, pools: Mapping[str, int]) -> Settled:
    """Simulate the step with so many buffers in each pool. Raises VerifyError if engines wait for
    each other in a cycle."""
    ops = {(op.name, n - 1): op for n, layer in enumerate(step.layers) for op in layer}
    needs = {key: _present(key, (*op.reads, *op.after), ops) for key, op in ops.items()}
    readers: dict[Instance, list[Instance]] = {key: [] for key in ops}
    for key, op in ops.items():
        for read in _present(key, op.reads, ops):
            readers[read].append(key)
    found = Settled(ops, needs, {key: tuple(some) for key, some in readers.items()})
    _Simulation(step, pools, found).finish()
    return found


def _present(
    key: Instance, refs: Iterable[Ref], ops: Mapping[Instance, GpuOp]
) -> tuple[Instance, ...]:
    return tuple((name, key[1] - d) for name, d in refs if (name, key[1] - d) in ops)


class _Simulation:
    """The state of one simulation, in seconds; operations are begun in the order of their times."""

    def __init__(self, step: GpuStep, pools: Mapping[str, int], found: Settled) -> None:
        self._seconds, self._found = step.seconds, found
        found.queues = {name: list(items) for name, items in step.queues.items()}
        self._queues = found.queues
        self._at = dict.fromkeys(self._queues, 0)
        self._free = dict.fromkeys(self._queues, 0.0)
        self._place: dict[Instance, int] = {}
        # Of every pool, who had each buffer last.
        self._last: dict[str, list[Instance | None]] = {n: [None] * k for n, k in pools.items()}

    def finish(self) -> None:
        """Begin everything."""
        while True:
            heads = {
                engine: ready
                for engine, queue in self._queues.items()
                if self._at[engine] < len(queue)
                and (ready := self._ready(engine, queue[self._at[engine]][1])) is not None
            }
            if not heads:
                if self._reorder():
                    continue
                break
            engine = min(heads, key=lambda name: heads[name][0])
            self._begin(engine, *heads[engine])
        stuck = [e for e, queue in self._queues.items() if self._at[e] < len(queue)]
        if stuck:
            where = "; ".join(
                f"{e} at {instance_text(*self._queues[e][self._at[e]][1])}" for e in stuck
            )
            raise VerifyError(
                f"engines wait for each other in a cycle: {where}. Expected the order of every "
                "engine to follow what its operations wait for"
            )

    def _reorder(self) -> bool:
        """Let one engine take next what can begin, of the same turn; whether there is such."""
        for engine, queue in self._queues.items():
            at = self._at[engine]
            for place in range(at + 1, len(queue)):
                turn, key = queue[place]
                if turn != queue[at][0]:
                    break
                if self._ready(engine, key) is not None:
                    queue.insert(at, queue.pop(place))
                    self._found.moved.append(key)
                    return True
        return False

    def _ready(self, engine: str, key: Instance) -> tuple[float, int] | None:
        """When an operation can begin and in which buffer, or None while that is not known."""
        ends, start = self._found.end, self._free[engine]
        for other in self._found.needs[key]:
            if other not in ends:
                return None
            start = max(start, ends[other])
        pool = self._found.ops[key].takes
        if not pool:
            return start, -1
        free = [
            # Buffers that come free together are taken in the order in which they were before.
            (until, self._place[old] if old else -1, slot)
            for slot, old in enumerate(self._last[pool])
            if (until := self._until(old)) is not None
        ]
        if not free:
            return None
        until, _, slot = min(free)
        return max(start, until), slot

    def _until(self, holder: Instance | None) -> float | None:
        """When a buffer's last reader ends, or None while that is not known."""
        if holder is None:
            return -1.0
        until = 0.0
        for user in (holder, *self._found.readers[holder]):
            if user not in self._found.end:
                return None
            until = max(until, self._found.end[user])
        return until

    def _begin(self, engine: str, start: float, slot: int) -> None:
        (_, key), found = self._queues[engine][self._at[engine]], self._found
        if slot >= 0:
            holders = self._last[found.ops[key].takes]
            found.taken[key], found.slots[key] = holders[slot], slot
            holders[slot] = key
        self._place[key] = len(found.sequence)
        found.sequence.append(key)
        found.start[key] = start
        found.end[key] = self._free[engine] = start + self._seconds[key]
        self._at[engine] += 1
