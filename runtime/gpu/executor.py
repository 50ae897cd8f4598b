"""Runs emitted executors of GPU programs: a thread for each engine, which enqueues on its stream or
does the host's work itself.

Pools are allocated once, against each tier's budget, before the first step. A wait is passed on to
the device once the event was recorded: devices take a wait for an event that was never recorded as
one that has happened.
"""

import threading
from collections.abc import Mapping
from typing import Any

from dovetail.ir.errors import VerifyError
from dovetail.ir.gpu_program import GpuProgram, Instance, instance_text
from dovetail.runtime.gpu.device import Buffer, Device, Event, Launch
from dovetail.runtime.pools import TierBudget


class GpuExecutor:
    """An emitted executor at work on a device; ``functions`` is the emitted module's namespace.

    Without ``budgets`` what the plan keeps in a tier beside the pools counts as it was predicted;
    else they hold what was set aside already. Raises BudgetError where the pools do not fit.
    """

    def __init__(
        self,
        program: GpuProgram,
        device: Device,
        functions: Mapping[str, Any],
        budgets: Mapping[str, TierBudget] | None = None,
    ) -> None:
        self.device = device
        self.budgets = budgets or _predicted(program)
        self._pools: dict[str, int] = {}
        self.use(program, functions)
        self._changed = threading.Condition()
        self._slots: dict[Instance, int] = {}
        self._events: dict[Instance, Event] = {}
        self._engines: list[GpuEngine] = []
        self._wanted: dict[str, Instance] = {}
        self._running = 0
        self._error: BaseException | None = None

    def use(self, program: GpuProgram, functions: Mapping[str, Any]) -> None:
        """Run this program from now on. Raises BudgetError where a pool that it alone has does not
        fit, VerifyError where one that others have is too small for it."""
        self.program, self._functions = program, functions
        self.ops = program.ops()
        for pool in program.pools:
            if pool.nbytes <= self._pools.get(pool.name, -1):
                continue
            if pool.name in self._pools:
                raise VerifyError(
                    f"pool {pool.name} has {self._pools[pool.name]} bytes, expected the "
                    f"{pool.nbytes} that a later step wants: use the largest program first"
                )
            if pool.tier in self.budgets:
                self.budgets[pool.tier].reserve(pool.nbytes, f"pool {pool.name}")
            self.device.allocate(pool.tier, pool.nbytes, pool.name)
            self._pools[pool.name] = pool.nbytes

    def run_step(self) -> None:
        """Run one step; returns when the device has ended it. Raises what an engine raised, and
        VerifyError if all engines wait for events that nobody will record."""
        self._slots, self._events, self._error = {}, {}, None
        names = list(self.program.engines)
        self._running, self._wanted = len(names), {}
        threads = [threading.Thread(target=self._run, args=(name,), name=name) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        self.device.finish()

    def _run(self, name: str) -> None:
        error: BaseException | None = None
        try:
            self._functions[name](GpuEngine(name, self))
        except BaseException as caught:
            # Whatever stops one engine stops all of them, and is raised by run_step.
            error = caught
        with self._changed:
            self._running -= 1
            self._wanted.pop(name, None)
            self._error = self._error or error
            self._check_waiting()
            self._changed.notify_all()

    def record(self, engine: str, key: Instance) -> None:
        """Record an operation's event and let those go on that wait for it."""
        event = Event(instance_text(*key))
        self.device.record(engine, event)
        with self._changed:
            self._events[key] = event
            self._changed.notify_all()

    def event(self, engine: str, key: Instance) -> Event:
        """An operation's event, once it was recorded."""
        with self._changed:
            while key not in self._events:
                self._wanted[engine] = key
                self._check_waiting()
                if self._error is not None:
                    raise self._error
                self._changed.wait()
            self._wanted.pop(engine, None)
            return self._events[key]

    def _check_waiting(self) -> None:
        waiting = sum(key not in self._events for key in self._wanted.values())
        if self._running and waiting == self._running and self._error is None:
            self._error = VerifyError(
                "every engine waits for an event that is not recorded, expected each wait to be "
                "for an operation that some engine begins"
            )
            self._changed.notify_all()

    def take(self, key: Instance, of: Instance | None, slot: int) -> None:
        """Give an operation its buffer."""
        with self._changed:
            self._slots[key] = slot if of is None else self._slots[of]

    def launch_of(self, key: Instance) -> Launch:
        """An operation with its buffers."""
        op = self.ops[key]
        refs = [(name, key[1] - back) for name, back in op.reads]
        reads = [read for read in refs if read in self.ops]
        return Launch(
            op=op.name,
            layer=key[1],
            work=op.work,
            reads=tuple(self._buffer(read) for read in reads),
            sources=tuple(instance_text(*read) for read in reads),
            writes=self._buffer(key),
            engine=op.engine,
        )

    def _buffer(self, key: Instance) -> Buffer:
        op = self.ops[key]
        if not op.takes:
            number = key[1] % self.program.outputs.get(op.name, 1)
            return Buffer(f"output of {op.name}", number, 1)
        with self._changed:
            slot = self._slots.get(key)
        if slot is None:
            raise VerifyError(
                f"{instance_text(*key)} has no buffer of pool {op.takes}, expected a take before "
                "it and before who reads it"
            )
        size = self.program.pool(op.takes).slot_bytes
        return Buffer(op.takes, slot * size, size)


def _predicted(program: GpuProgram) -> dict[str, TierBudget]:
    """The tiers with what is predicted to be in them beside the pools."""
    budgets = {tier: TierBudget(size, tier) for tier, size in program.capacity.items()}
    for tier, budget in budgets.items():
        for what, nbytes in program.reserved.get(tier, {}).items():
            budget.reserve(nbytes, what)
    return budgets


class GpuEngine:
    """One engine, as the emitted source speaks to it."""

    def __init__(self, name: str, executor: GpuExecutor) -> None:
        self.name, self._executor = name, executor

    def wait(self, op: str, layer: int) -> None:
        """Let nothing behind this begin before the operation has ended."""
        event = self._executor.event(self.name, (op, layer))
        self._executor.device.wait(self.name, event)

    def take(self, op: str, layer: int, of: Instance | None = None, slot: int = 0) -> None:
        """The operation's buffer is that which ``of`` had, or number ``slot`` of its pool."""
        self._executor.take((op, layer), of, slot)

    def do(self, op: str, layer: int) -> None:
        """Begin the operation when all before it has ended."""
        self._executor.device.launch(self.name, self._executor.launch_of((op, layer)))

    def record(self, op: str, layer: int) -> None:
        """Record the event of the operation that was begun last."""
        self._executor.record(self.name, (op, layer))
