"""Steps that decode with everything in hbm: captured once, replayed while their shapes last.

`step, program -> graph`: between two tokens only what sequences hold changes. Here that is in
tensors: where new keys go, and up to where a query sees, as in vLLM's and transformers' static
caches; views of the KV are longer than they need be, so that their shape lasts ``WIDTH`` tokens.
The head is not captured: how tokens are chosen may change from run to run.

A CUDA graph of such a step has never been captured: nothing here has run on a GPU.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dovetail.ir.batching import Group
from dovetail.ir.gpu_program import Do, GpuProgram
from dovetail.ir.gpu_settings import GpuGroup
from dovetail.ir.gpu_tasks import gpu_task
from dovetail.runtime.gpu.device import Buffer, ComputeDevice, Graph, Launch
from dovetail.runtime.gpu.groups import GroupState, HostState, Values
from dovetail.runtime.gpu.kv import SteadyKv, TierKv
from dovetail.runtime.gpu.work import GpuWork

WIDTH = 64
"""Tokens of KV by whose multiples views grow; each multiple is captured anew."""
KEPT = 8
"""Graphs that are kept; each has memory of its own for what it computes."""
STEADY = (
    "embed", "attention", "before", "kv", "after", "experts_hbm", "experts_group", "tail",
)  # fmt: skip
"""Operations whose work is the same in every step but for the numbers in tensors."""
Shape = tuple[object, ...]


@dataclass(slots=True)
class _Captured:
    """A graph, its groups, the tensors of theirs that it reads, and the values that it leaves."""

    graph: Graph
    states: list[GroupState]
    given: list[Values]
    left: list[Values]

    def put(self, groups: Sequence[GpuGroup], inputs: Sequence[Mapping[str, Tensor]]) -> None:
        """Bring what a step changes to where the graph reads it."""
        for state, info, given, new in zip(self.states, groups, self.given, inputs, strict=True):
            assert isinstance(state.kv, SteadyKv)
            state.info = info
            state.kv.put(info.group)
            for name, value in new.items():
                given[name].copy_(value)


class SteadySteps:
    """Captures and replays the steps of ``work`` that ``takes`` allows; ``store`` is hbm's KV."""

    def __init__(self, work: GpuWork, store: TierKv, device: ComputeDevice) -> None:
        self._work, self._store, self._device = work, store, device
        self._known: dict[Shape, _Captured] = {}
        self._steady: dict[int, bool] = {}
        self.captures = self.replays = 0

    def takes(self, groups: Sequence[GpuGroup], program: GpuProgram) -> bool:
        """Whether a step may be captured: every sequence decodes with its KV in hbm, and one stream
        does all of it, without transfers, buffers that are taken over, and the host's engines."""
        if any(each.kind != "hbm" or each.group.layers is not None for each in groups):
            return False
        # Programs are kept for the whole run, so that their numbers stay theirs.
        if id(program) not in self._steady:
            self._steady[id(program)] = _is_steady(program)
        return self._steady[id(program)]

    def run(
        self,
        groups: Sequence[GpuGroup],
        inputs: Sequence[Mapping[str, Tensor]],
        places: Sequence[int],
        program: GpuProgram,
    ) -> None:
        """Run a step that ``takes`` allows; the tokens are the work's. Call with no other work on
        the device."""
        launches = _launches(program)
        key = _shape(groups)
        known = self._known.get(key)
        if known is None:
            known = self._captured(groups, inputs, places, program, launches[:-1])
            while len(self._known) >= KEPT:
                self._known.pop(next(iter(self._known)))
            self._known[key] = known
        known.put(groups, inputs)
        known.graph.replay()
        self.replays += 1
        for state, left in zip(known.states, known.left, strict=True):
            state.values = dict(left)
        self._work.begin_states(known.states, places, program)
        self._work(launches[-1], self._device)

    def close(self) -> None:
        """Let the graphs and their memory go; nothing may be replaying."""
        self._known.clear()

    def _captured(
        self,
        groups: Sequence[GpuGroup],
        inputs: Sequence[Mapping[str, Tensor]],
        places: Sequence[int],
        program: GpuProgram,
        launches: Sequence[Launch],
    ) -> _Captured:
        """The graph of these launches, which are done at least once before it is there: that
        changes nothing, since a step writes what it wrote before."""
        states, start = [], 0
        for info, values in zip(groups, inputs, strict=True):
            states.append(self._state(info, values, start))
            start += len(info.group.members)
        given = [dict(state.values) for state in states]

        def run() -> None:
            for state, values in zip(states, given, strict=True):
                state.values, state.done = dict(values), -1
                assert isinstance(state.kv, SteadyKv)
                state.kv.forget()
            self._work.begin_states(states, places, program)
            for launch in launches:
                self._work(launch, self._device)
            self._work.finish_last()

        graph = self._device.capture(run)
        self.captures += 1
        return _Captured(graph, states, given, [dict(state.values) for state in states])

    def _state(self, info: GpuGroup, inputs: Mapping[str, Tensor], start: int) -> GroupState:
        group, at = info.group, self._device.compute
        kv = SteadyKv(self._store, group, _width(group), at)
        values = {name: value.to(at, copy=True) for name, value in inputs.items()}
        host = HostState(len(group.members), 1, group.past, None)
        return GroupState(info, group, kv, start, None, values, host)


def _is_steady(program: GpuProgram) -> bool:
    used = [engine for engine, items in program.flat().items() if items]
    return len(used) == 1 and all(
        not op.takes and (op.name == "head" or gpu_task(op.name).verb in STEADY)
        for op in program.ops().values()
    )


def _launches(program: GpuProgram) -> list[Launch]:
    """The operations of a program with one stream, the head last; none has a buffer."""
    ops = program.ops()
    found = [
        Launch(op.name, item.layer, op.work, (), (), Buffer(op.name, 0, 0), op.engine)
        for items in program.flat().values()
        for item in items
        if isinstance(item, Do)
        for op in (ops[item.op, item.layer],)
    ]
    assert found[-1].op == "head"
    return found


def _width(group: Group) -> int:
    """Tokens of a row that a graph sees: enough for ``WIDTH`` steps, at most all that it has."""
    return min(group.stride, -(-(group.past + 1) // WIDTH) * WIDTH)


def _shape(groups: Sequence[GpuGroup]) -> Shape:
    """What has to be the same for a graph to be right: where rows are and how far views reach."""
    return tuple(
        (tuple(m.offset for m in each.group.members), each.group.stride, _width(each.group))
        for each in groups
    )
