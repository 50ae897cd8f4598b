"""Step graph: `program -> what every instruction of a step waits for`, once for all durations.

Which instruction a wait waits for does not depend on how long instructions take, so two steps, one
after the other, are a graph whose longest paths are the times (the max-plus algebra of Baccelli et
al., Synchronization and Linearity, 1992). Workers that wait for the same and then do the same share
their nodes, and so do programs that differ in nothing that the graph has.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dovetail.ir.errors import VerifyError
from dovetail.ir.load_order import LoadOrder
from dovetail.ir.program import Flat, Free, Load, Program, Run, Signal, Wait, unroll

STEPS = 2
"""Steps of a graph: the second one is in steady state."""
KEPT = 24
"""Graphs that are remembered, the last ones used."""
START = 0
"""The node at which every engine begins."""


@dataclass(frozen=True, slots=True)
class Idle:
    """Waits of the second step for the same, ``ready``, ``room`` or ``phase`` of ``name``: from one
    node to another."""

    what: str
    name: str
    before: int
    node: int
    engines: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepGraph:
    """``deps`` of every node are nodes before it; node n takes as long as slot ``slots[n]`` (-1: no
    time). ``items`` has an instruction of each slot with its engine's number, ``lists`` the slots
    of every engine in a step, ``ends[i]`` the nodes with which compute (or without disk engines
    everything) ends step i, ``busy`` how often the second step has each slot, by class."""

    deps: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]
    items: tuple[tuple[Load | Run, int], ...]
    lists: Mapping[str, tuple[int, ...]]
    ends: tuple[tuple[int, ...], ...]
    idle: tuple[Idle, ...]
    busy: tuple[tuple[str, int, int], ...]

    def times(self, seconds: Sequence[float]) -> list[float]:
        """When every node ends, if its slot takes ``seconds[slot]``."""
        found = [0.0]
        add, lasting = found.append, [*seconds, 0.0]
        for deps, slot in zip(self.deps[1:], self.slots[1:], strict=True):
            if len(deps) == 1:
                add(found[deps[0]] + lasting[slot])
            else:
                add(max([found[dep] for dep in deps]) + lasting[slot])
        return found

    def classes(self, seconds: Sequence[float], times: Sequence[float]) -> dict[str, float]:
        """Seconds of all engines together in the second step, by class."""
        totals: dict[str, float] = defaultdict(float)
        for name, slot, count in self.busy:
            totals[name] += count * seconds[slot]
        for idle in self.idle:
            kind = "room" if idle.what == "room" else "wait"
            lost = times[idle.node] - times[idle.before]
            totals[f"{kind}:{idle.name}"] += len(idle.engines) * lost
        return {name: value for name, value in totals.items() if value > 0}

    def waits(self, times: Sequence[float]) -> dict[str, dict[str, float]]:
        """Seconds that every engine waits in the second step, by what for (``ready:experts``)."""
        found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for idle in self.idle:
            lost = times[idle.node] - times[idle.before]
            for engine in idle.engines if lost > 0 else ():
                found[engine][f"{idle.what}:{idle.name}"] += lost
        return found


def step_graph(program: Program) -> StepGraph:
    """The graph of a program. Raises VerifyError if engines wait for each other in a cycle."""
    key = (tuple(program.engines.items()), program.rings, program.segments)
    known = _KNOWN.pop(key, None)
    if known is None:
        known = _Builder(program).graph()
        if len(_KNOWN) >= KEPT:
            del _KNOWN[next(iter(_KNOWN))]
    _KNOWN[key] = known
    return known


_KNOWN: dict[tuple[object, ...], StepGraph] = {}


@dataclass(slots=True)
class _Engine:
    """An engine's place in its instructions, the node it has come to, and its counts by name."""

    name: str
    number: int
    items: tuple[Flat, ...]
    at: int = 0
    node: int = START
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, what: str, name: str) -> int:
        """How often something was counted before; counts it once more."""
        self.counts[what, name] += 1
        return self.counts[what, name] - 1


class _Builder:
    """The graph as far as it is built."""

    def __init__(self, program: Program) -> None:
        self._rings = {ring.name: ring for ring in program.rings}
        self._over = {segment.name: segment.over for segment in program.segments}
        self._workers = len(program.workers)
        made: dict[tuple[object, ...], tuple[Flat, ...]] = {}
        flat: dict[str, tuple[Flat, ...]] = {}
        for name, items in program.engines.items():
            if items not in made:
                made[items] = tuple(unroll(items))
            flat[name] = made[items]
        self._order = LoadOrder(flat)
        self._engines = [_Engine(n, i, items) for i, (n, items) in enumerate(flat.items())]
        self._compute = set(program.workers) if len(flat) > self._workers else set(flat)
        self._ready: dict[tuple[str, int], int] = {}
        self._freed: dict[tuple[str, int], list[int]] = defaultdict(list)
        self._phases: dict[tuple[str, int], list[int]] = defaultdict(list)
        self._nodes: dict[tuple[int, tuple[int, ...]], int] = {}
        self._deps: list[tuple[int, ...]] = [()]
        self._slots: list[int] = [-1]
        self._slot: dict[tuple[object, ...], int] = {}
        self._items: list[tuple[Load | Run, int]] = []
        self._lists: dict[str, list[int]] = {engine.name: [] for engine in self._engines}
        self._ends: list[list[int]] = [[] for _ in range(STEPS)]
        self._idle: dict[tuple[str, str, int, int], list[str]] = defaultdict(list)
        self._busy: Counter[tuple[str, int]] = Counter()

    def graph(self) -> StepGraph:
        """Take every engine through its instructions."""
        moved = True
        while moved:
            moved = False
            for engine in self._engines:
                moved |= self._run(engine)
        stuck = [e for e in self._engines if e.at < STEPS * len(e.items)]
        if stuck:
            where = "; ".join(f"{e.name} at {e.items[e.at % len(e.items)]}" for e in stuck)
            raise VerifyError(f"engines wait for each other in a cycle: {where}")
        return StepGraph(
            deps=tuple(self._deps),
            slots=tuple(self._slots),
            items=tuple(self._items),
            lists={name: tuple(slots) for name, slots in self._lists.items()},
            ends=tuple(tuple(dict.fromkeys(nodes)) for nodes in self._ends),
            idle=tuple(Idle(*key, tuple(names)) for key, names in self._idle.items()),
            busy=tuple((name, slot, count) for (name, slot), count in self._busy.items()),
        )

    def _run(self, engine: _Engine) -> bool:
        """Go on until the engine has to wait for what is not there yet; whether it went on."""
        first, many = engine.at, len(engine.items)
        while engine.at < STEPS * many:
            item = engine.items[engine.at % many]
            second = engine.at >= many
            if isinstance(item, Wait):
                needs = self._needs(engine, item)
                if needs is None:
                    break
                self._wait(engine, item, needs, second)
            elif isinstance(item, Signal):
                self._signal(engine, item)
            elif isinstance(item, Free):
                self._freed[item.ring, engine.count("free", item.ring)].append(engine.node)
            else:
                self._work(engine, item, second)
            engine.at += 1
            if engine.at % many == 0 and engine.name in self._compute:
                self._ends[engine.at // many - 1].append(engine.node)
        return engine.at > first

    def _needs(self, engine: _Engine, item: Wait) -> Sequence[int] | None:
        """The nodes that a wait waits for, or None while these are not known."""
        counts, name = engine.counts, item.name
        if item.what == "ready":
            ready = self._ready.get((name, counts["ready", name]))
            return None if ready is None else (ready,)
        if item.what == "room":
            ring = self._rings[name]
            number = self._order.number(engine.name, name, counts["load", name]) - ring.slots
            if number < 0:
                return ()
            freed = self._freed[name, number]
            return freed if len(freed) >= ring.consumers else None
        signals = self._phases[name, counts["phase", name]]
        return signals if len(signals) == self._workers else None

    def _wait(self, engine: _Engine, item: Wait, needs: Sequence[int], second: bool) -> None:
        if item.what != "room":
            engine.count(item.what, item.name)
        # A path through what all wait for says no more than that.
        node = self._node(-1, (engine.node, *needs))
        if second and node != engine.node:
            self._idle[item.what, item.name, engine.node, node].append(engine.name)
        engine.node = node

    def _signal(self, engine: _Engine, item: Signal) -> None:
        if item.what == "ready":
            count = engine.count("load", item.name)
            number = self._order.number(engine.name, item.name, count)
            self._ready[item.name, number] = engine.node
        else:
            self._phases[item.name, engine.count("signal", item.name)].append(engine.node)

    def _work(self, engine: _Engine, item: Load | Run, second: bool) -> None:
        slot = self._slot_of(engine, item)
        engine.node = self._node(slot, (engine.node,))
        if second:
            kind = f"load:{item.ring}" if isinstance(item, Load) else f"run:{item.segment}"
            self._busy[kind, slot] += 1
        else:
            self._lists[engine.name].append(slot)

    def _slot_of(self, engine: _Engine, item: Load | Run) -> int:
        key: tuple[object, ...]
        if isinstance(item, Load):
            key = item.ring, item.layer
        else:
            # Groups are dealt out to the workers; all else takes each of them equally long.
            own = engine.number if self._over[item.segment] == "groups" else -1
            key = item.segment, item.unit, item.layer, item.chunk < 0, own
        if key not in self._slot:
            self._slot[key] = len(self._items)
            self._items.append((item, engine.number))
        return self._slot[key]

    def _node(self, slot: int, deps: Sequence[int]) -> int:
        unique = tuple(sorted(set(deps)))
        if slot < 0 and len(unique) == 1:
            return unique[0]
        key = slot, unique
        if key not in self._nodes:
            self._nodes[key] = len(self._deps)
            self._deps.append(unique)
            self._slots.append(slot)
        return self._nodes[key]
