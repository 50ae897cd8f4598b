"""Legal GPU programs: what each operation reads has been written and is still there, whatever the
engines' speeds.

Every engine's list is executed abstractly with vector clocks: an engine knows of another's
operations those whose events it has waited for, and what was known there. Anything else may happen
later, so an operation that relies on it is a hazard: a read before its copy, a buffer taken over
while it may still be read, an event that is never recorded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dovetail.ir.errors import VerifyError
from dovetail.ir.gpu_program import (
    Do,
    GpuFlat,
    GpuProgram,
    Instance,
    Record,
    Ref,
    Take,
    Wait,
    instance_text,
    text_of,
)

Place = tuple[str, str, int]
"""A buffer: ``pool`` or ``output``, the pool's or the operation's name, and its number."""


def verify_gpu_program(program: GpuProgram) -> None:
    """Raise VerifyError unless the program does every operation once, in order, within capacity."""
    check_bytes(program)
    flat = program.flat()
    _check_complete(program, flat)
    Hazards(program).run(flat)


def check_bytes(program: GpuProgram) -> None:
    """Raise VerifyError where a pool is too small for what it is to hold, or a tier for its
    pools."""
    pools = {pool.name: pool for pool in program.pools}
    for op in {op.name: op for body in program.bodies for op in body}.values():
        if op.takes and op.takes not in pools:
            raise VerifyError(f"{op.name} takes a buffer of pool {op.takes}, which does not exist")
    for body in program.bodies:
        for op in body:
            if op.takes and op.nbytes > pools[op.takes].slot_bytes:
                raise VerifyError(
                    f"{op.name} brings {op.nbytes} bytes, expected at most the "
                    f"{pools[op.takes].slot_bytes} of one buffer of pool {op.takes}"
                )
    for tier, capacity in program.capacity.items():
        parts = dict(program.reserved.get(tier, {}))
        parts |= {f"pool {p.name}": p.nbytes for p in program.pools if p.tier == tier}
        if sum(parts.values()) > capacity:
            listed = ", ".join(f"{name} {size}" for name, size in parts.items() if size)
            raise VerifyError(
                f"{tier} holds {sum(parts.values())} bytes ({listed}), expected at most the "
                f"{capacity} of the budget: smaller buffers, or fewer weights there"
            )


def _check_complete(program: GpuProgram, flat: Mapping[str, Sequence[GpuFlat]]) -> None:
    """Every operation is begun once, on its engine."""
    left = program.ops()
    for engine, items in flat.items():
        for item in items:
            if not isinstance(item, Do):
                continue
            op = left.pop((item.op, item.layer), None)
            if op is None or op.engine != engine:
                where = f"on engine {op.engine}" if op else "once, and only what a layer's body has"
                raise VerifyError(f"{engine}: {text_of(item)}, expected it {where}")
    if left:
        raise VerifyError(f"{instance_text(*next(iter(left)))} is never begun, expected it once")


@dataclass(slots=True)
class _Engine:
    """An engine's place in its list, the operation that it began last, how many it has begun, and
    how many of every engine it knows to have ended."""

    name: str
    items: Sequence[GpuFlat]
    known: dict[str, int]
    at: int = 0
    done: int = 0
    last: Instance | None = None


class Hazards:
    """Executes the flat lists of a program; ``run`` raises VerifyError at the first hazard."""

    def __init__(self, program: GpuProgram) -> None:
        self.program = program
        self._ops = program.ops()
        self._reads = {key: self._present(key, op.reads) for key, op in self._ops.items()}
        self._readers: dict[Instance, list[Instance]] = {}
        for key, reads in self._reads.items():
            for read in reads:
                self._readers.setdefault(read, []).append(key)
        self._number: dict[Instance, int] = {}
        self._events: dict[Instance, dict[str, int]] = {}
        self._slot: dict[Instance, int] = {}
        self._holder: dict[Place, Instance] = {}

    def run(self, flat: Mapping[str, Sequence[GpuFlat]]) -> None:
        """Execute everything; raises VerifyError at the first thing that is not legal."""
        recorded = {
            (i.op, i.layer) for items in flat.values() for i in items if isinstance(i, Record)
        }
        for name, items in flat.items():
            for item in items:
                if isinstance(item, Wait) and (item.op, item.layer) not in recorded:
                    raise VerifyError(
                        f"{name} at {text_of(item)}: its event is never recorded, expected a "
                        "record behind the operation"
                    )
        engines = [_Engine(name, items, dict.fromkeys(flat, 0)) for name, items in flat.items()]
        moved = True
        while moved:
            moved = False
            for engine in engines:
                while engine.at < len(engine.items) and self._passes(engine.items[engine.at]):
                    self._execute(engine, engine.items[engine.at])
                    engine.at += 1
                    moved = True
        stuck = [e for e in engines if e.at < len(e.items)]
        if stuck:
            where = "; ".join(f"{e.name} at {text_of(e.items[e.at])}" for e in stuck)
            raise VerifyError(
                f"engines wait for each other in a cycle: {where}. Expected every wait to be for "
                "what does not depend on it"
            )

    def _passes(self, item: GpuFlat) -> bool:
        return not isinstance(item, Wait) or (item.op, item.layer) in self._events

    def _execute(self, engine: _Engine, item: GpuFlat) -> None:
        match item:
            case Wait(op, layer):
                for name, count in self._events[op, layer].items():
                    engine.known[name] = max(engine.known[name], count)
            case Take():
                self._take(engine, item)
            case Record(op, layer):
                if engine.last != (op, layer):
                    raise _error(engine, f"the last operation begun is {engine.last}, expected it")
                self._events[op, layer] = dict(engine.known)
            case Do(op, layer):
                self._do(engine, (op, layer))

    def _take(self, engine: _Engine, item: Take) -> None:
        """Which buffer an operation has; that it may be written is seen when it is."""
        pool = self.program.pool(self._ops[item.op, item.layer].takes)
        if item.of:
            slot = self._slot.get((item.of, item.of_layer))
            if slot is None or self._ops[item.of, item.of_layer].takes != pool.name:
                raise _error(engine, f"that has no buffer of pool {pool.name}, expected one")
        else:
            slot = item.slot
        if not 0 <= slot < pool.slots:
            raise _error(engine, f"pool {pool.name} has {pool.slots} buffers, expected one of them")
        self._slot[item.op, item.layer] = slot

    def _do(self, engine: _Engine, key: Instance) -> None:
        op = self._ops[key]
        for read in self._reads[key]:
            self._check_known(engine, read, "reads what is not there: ")
            if self._holder.get(self.place(engine, read)) != read:
                now = self._holder[self.place(engine, read)]
                raise _error(
                    engine,
                    f"the buffer of {instance_text(*read)} holds {instance_text(*now)} by now, "
                    "expected it to be kept until the last read of it",
                )
        for before in self._present(key, op.after):
            self._check_known(engine, before, "begins too early: ")
        place = self.place(engine, key)
        old = self._holder.get(place)
        if old is not None:
            for user in (old, *self._readers.get(old, ())):
                if user != key or user in self._number:
                    text = f"writes over the buffer of {instance_text(*old)}: "
                    self._check_known(engine, user, text)
        self._holder[place] = key
        engine.done += 1
        engine.known[engine.name] = engine.done
        self._number[key], engine.last = engine.done, key

    def place(self, engine: _Engine, key: Instance) -> Place:
        """The buffer that an operation writes."""
        op = self._ops[key]
        if not op.takes:
            return "output", op.name, key[1] % self.program.outputs.get(op.name, 1)
        if key not in self._slot:
            raise _error(
                engine,
                f"{instance_text(*key)} has taken no buffer of pool {op.takes}, expected a take",
            )
        return "pool", op.takes, self._slot[key]

    def _present(self, key: Instance, refs: Sequence[Ref]) -> list[Instance]:
        """The operations that are referred to, of those that a step has: the first layers have
        none before them."""
        found = [(name, key[1] - back) for name, back in refs]
        return [other for other in found if other in self._ops]

    def _check_known(self, engine: _Engine, other: Instance, what: str) -> None:
        """That an operation is known to have ended."""
        number = self._number.get(other)
        on = self._ops[other].engine
        if number is None or engine.known.get(on, 0) < number:
            why = "was not begun" if number is None else "may not have ended"
            raise _error(
                engine,
                f"{what}{instance_text(*other)} on {on} {why}, expected a wait for it before",
            )


def _error(engine: _Engine, text: str) -> VerifyError:
    return VerifyError(
        f"{engine.name} at {text_of(engine.items[engine.at])} (instruction {engine.at}): {text}"
    )
