"""Abstract execution of a program with vector clocks.

Every instruction is an event. An engine's clock counts the events of every engine that are known to
have happened: its own, and through signals, frees and phases those of others. What is not known to
have happened may happen later, whatever order this execution takes.
"""

from collections.abc import Iterator, Mapping, Sequence

from dovetail.ir.errors import VerifyError
from dovetail.ir.load_order import LoadOrder
from dovetail.ir.program import Flat, Free, Load, Program, Run, Signal, Wait
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.verify_engine import Clock, Engine, RingState, text_of, unit_of
from dovetail.ir.verify_values import Values


class Execution:
    """Executes ``steps`` steps of the engines' flat lists; ``run`` raises VerifyError."""

    def __init__(
        self,
        program: Program,
        graph: TaskGraph,
        flat: Mapping[str, Sequence[Flat]],
        steps: int,
    ) -> None:
        self._flat = flat
        self._engines = [
            Engine(name, number, _steps(items, steps, name in program.workers), [0] * len(flat))
            for number, (name, items) in enumerate(flat.items())
        ]
        self._workers = [e for e in self._engines if e.name in program.workers]
        self._rings = {ring.name: RingState(ring) for ring in program.rings}
        self._order = LoadOrder(flat)
        self._signals: dict[tuple[str, int], dict[int, Clock]] = {}
        self._values = Values(program, graph, self._workers)

    def run(self) -> None:
        """Execute everything; raises VerifyError at the first thing that is not legal."""
        for engine in self._engines:
            engine.at = next(engine.items, None)
        moved = True
        while moved:
            moved = False
            for engine in self._engines:
                while engine.at is not None and self._passes(engine, engine.at[2]):
                    self._execute(engine, engine.at[2])
                    engine.at = next(engine.items, None)
                    moved = True
        self._check_ended()

    def _passes(self, engine: Engine, item: Flat) -> bool:
        """Whether what a wait is for has happened."""
        match item:
            case Wait("ready", name) if name not in engine.held:
                return engine.waits.get(name, 0) in self._rings[name].ready
            case Wait("room", name):
                ring = self._rings[name]
                before = self._next_load(engine, name) - ring.spec.slots
                return before < 0 or len(ring.freed.get(before, {})) >= ring.spec.consumers
            case Wait("phase", name):
                return len(self._met(engine, name)) == len(self._workers)
        return True

    def _next_load(self, engine: Engine, ring: str) -> int:
        """The number of the load that the engine signals next."""
        return self._order.number(engine.name, ring, engine.loads.get(ring, 0))

    def _met(self, engine: Engine, phase: str) -> dict[int, Clock]:
        return self._signals.get((phase, engine.awaited.get(phase, 0)), {})

    def _execute(self, engine: Engine, item: Flat) -> None:
        engine.clock[engine.number] += 1
        match item:
            case Wait("ready", name):
                self._wait_ready(engine, self._rings[name])
            case Wait("room", name):
                self._wait_room(engine, self._rings[name])
            case Wait(_, name):
                self._wait_phase(engine, name)
            case Signal("ready", name):
                self._signal_ready(engine, self._rings[name])
            case Signal(_, name):
                self._signal_phase(engine, name)
            case Load():
                self._load(engine, item)
            case Free():
                self._free(engine, item)
            case Run():
                if engine.ended:
                    raise engine.error("the end of the step is signalled already, expected after")
                self._values.run(engine, item)

    def _wait_room(self, engine: Engine, ring: RingState) -> None:
        self._check_signalled(engine, ring)
        number = self._next_load(engine, ring.spec.name)
        engine.room[ring.spec.name] = number
        before = number - ring.spec.slots
        # With fewer consumers than workers any of them may have ended the wait: it orders nothing.
        if before >= 0 and ring.spec.consumers >= len(self._workers):
            for clock in ring.freed[before].values():
                engine.join(clock)

    def _load(self, engine: Engine, item: Load) -> None:
        ring = self._rings[item.ring]
        self._check_signalled(engine, ring)
        number = self._next_load(engine, item.ring)
        if engine.room.get(item.ring) != number:
            live = ", ".join(ring.live(len(self._workers))) or "nothing"
            raise engine.error(
                f"no room was waited for: the {ring.spec.slots} buffers of ring {item.ring} may "
                f"still hold {live}; expected wait(room, {item.ring}) before"
            )
        before = number - ring.spec.slots
        for worker in self._workers if before >= 0 else ():
            clock = ring.freed[before].get(worker.number)
            if clock is None or engine.clock[worker.number] < clock[worker.number]:
                raise engine.error(
                    f"the buffer still holds {text_of(ring.loads[before])}, which {worker.name} "
                    f"may be reading: ring {item.ring} gives room after {ring.spec.consumers} "
                    f"frees, expected {len(self._workers)}, one of each worker"
                )
        ring.loads[number] = unit_of(item)
        ring.freed[number] = {}
        engine.loading[item.ring] = number

    def _check_signalled(self, engine: Engine, ring: RingState) -> None:
        if ring.spec.name in engine.loading:
            last = text_of(ring.loads[engine.loading[ring.spec.name]])
            raise engine.error(f"{last} is loaded and not signalled, expected its signal before")

    def _signal_ready(self, engine: Engine, ring: RingState) -> None:
        number = engine.loading.pop(ring.spec.name, None)
        if number is None:
            raise engine.error("nothing was loaded since the last signal, expected a load before")
        ring.ready[number] = list(engine.clock)
        engine.loads[ring.spec.name] = engine.loads.get(ring.spec.name, 0) + 1

    def _wait_ready(self, engine: Engine, ring: RingState) -> None:
        name = ring.spec.name
        if name in engine.held:
            held = text_of(engine.held[name])
            raise engine.error(f"{held} is still held, expected its free before the next wait")
        number = engine.waits.get(name, 0)
        engine.join(ring.ready[number])
        engine.waits[name] = number + 1
        engine.held[name] = ring.loads[number]

    def _free(self, engine: Engine, item: Free) -> None:
        held = engine.held.pop(item.ring, None)
        if held != unit_of(item):
            found = f"{text_of(held)} is held" if held else "nothing is held"
            raise engine.error(f"{found}, expected to free what was waited for, once")
        number = engine.frees.get(item.ring, 0)
        self._rings[item.ring].freed[number][engine.number] = list(engine.clock)
        engine.frees[item.ring] = number + 1

    def _signal_phase(self, engine: Engine, name: str) -> None:
        number = engine.signalled.get(name, 0)
        self._signals.setdefault((name, number), {})[engine.number] = list(engine.clock)
        engine.signalled[name] = number + 1
        if name == "step":
            self._values.check_complete(engine)
            engine.ended = True

    def _wait_phase(self, engine: Engine, name: str) -> None:
        for clock in self._met(engine, name).values():
            engine.join(clock)
        engine.awaited[name] = engine.awaited.get(name, 0) + 1
        engine.met[name] = list(engine.clock)
        if name == "step":
            engine.ended = False

    def _check_ended(self) -> None:
        stuck = [engine for engine in self._engines if engine.at is not None]
        if any(engine in self._workers for engine in stuck):
            raise VerifyError(self._why_stuck(stuck))
        for name in self._rings:
            loads = self._order.in_step(name)
            for worker in self._workers:
                waits = sum(item == Wait("ready", name) for item in self._flat[worker.name])
                if waits != loads:
                    raise VerifyError(
                        f"ring {name}: {loads} loads in a step, but {worker.name} waits for "
                        f"{waits}; expected as many waits as loads"
                    )

    def _why_stuck(self, stuck: list[Engine]) -> str:
        by_name = {engine.name: engine for engine in stuck}
        path = [next(engine for engine in stuck if engine in self._workers)]
        while True:
            awaited = self._awaited(path[-1])
            following = next((by_name[name] for name in awaited if name in by_name), None)
            if following is None:
                others = ", ".join(awaited) or "a disk engine"
                return f"{path[-1].place()}: waits forever, expected {others} to end the wait"
            if following in path:
                break
            path.append(following)
        found = "; ".join(
            f"{engine.place()} waits for {', '.join(self._awaited(engine))}"
            for engine in path[path.index(following) :]
        )
        return (
            f"engines wait for each other in a cycle: {found}. Expected loads in the order in "
            "which they are waited for, and signals before the waits that need them"
        )

    def _awaited(self, engine: Engine) -> list[str]:
        """The engines that have to go on before this one can."""
        assert engine.at is not None
        item = engine.at[2]
        assert isinstance(item, Wait)
        if item.what == "ready":
            loader = self._order.loader(item.name, engine.waits.get(item.name, 0))
            return [loader] if loader else []
        if item.what == "room":
            ring = self._rings[item.name]
            there = ring.freed.get(self._next_load(engine, item.name) - ring.spec.slots, {})
        else:
            there = self._met(engine, item.name)
        return [worker.name for worker in self._workers if worker.number not in there]


def _steps(items: Sequence[Flat], steps: int, compute: bool) -> Iterator[tuple[int, int, Flat]]:
    """Step, place in the list and instruction. A step begins when every worker has ended the one
    before: whoever asked for it sees to that. Disk engines run ahead."""
    for step in range(steps):
        if step and compute:
            yield step, -1, Wait("phase", "step")
        for place, item in enumerate(items):
            yield step, place, item
