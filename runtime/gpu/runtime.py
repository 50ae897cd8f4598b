"""Runs the steps of a GPU plan: a program for every step, on a device, with the work behind it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.ir.batching import Step
from dovetail.ir.gpu_program import GpuProgram
from dovetail.ir.gpu_settings import GpuGroup, GpuSettings, gpu_groups
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.gpu.device import ComputeDevice
from dovetail.runtime.gpu.executor import GpuExecutor
from dovetail.runtime.gpu.experts import Experts
from dovetail.runtime.gpu.memory import GpuMemory
from dovetail.runtime.gpu.steady import SteadySteps
from dovetail.runtime.gpu.work import Choose, GpuWork
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.recorder import clock
from dovetail.runtime.safetensors_index import CheckpointIndex

Emitted = tuple[GpuProgram, Mapping[str, Any]]
"""A program and the namespace of its emitted executor."""
Programs = Callable[[tuple[GpuGroup, ...]], Emitted]
"""Gives the program of a step with these groups."""


class GpuRuntime:
    """A GPU plan at work on the device that ``make_device`` gives for the work of its launches.

    ``first`` are programs whose buffers are set aside at the start, so that too small a budget is
    refused before anything runs; ``activations`` bytes of hbm are left to torch's allocator.
    ``segments`` is the namespace of the emitted segments; ``experts`` does the experts' products
    on the device (torch's, one by one, without it). With ``graphs`` and experts that can be
    captured, ``steady`` captures and replays the steps of which it takes.
    """

    def __init__(
        self,
        graph: TaskGraph,
        settings: GpuSettings,
        constants: Mapping[str, Tensor],
        source: CheckpointIndex | MemoryWeights,
        segments: Mapping[str, Any],
        choose: Choose,
        make_device: Callable[[GpuWork], ComputeDevice],
        programs: Programs,
        first: Sequence[Emitted],
        activations: int,
        experts: Experts | None = None,
        graphs: bool = False,
    ) -> None:
        self.settings = settings
        self._source, self._programs, self._first = source, programs, list(first)
        self._activations, self._expert_runner = activations, experts
        self._work = GpuWork(graph, settings, constants, segments, choose)
        self.device = make_device(self._work)
        self.memory = GpuMemory(self.device, first[0][0].capacity)
        self.recorder = self._work.recorder
        self._executor: GpuExecutor | None = None
        self._graphs = graphs and experts is not None and experts.capturable
        self.steady: SteadySteps | None = None
        self._stopped = False

    def start(self) -> None:
        """Set all memory aside and load what stays resident. Raises BudgetError."""
        budgets = self.memory.budgets
        kernels = self._expert_runner.nbytes if self._expert_runner is not None else 0
        budgets["hbm"].reserve(kernels, "kernels")  # their buffers are activations too
        budgets["hbm"].reserve(max(0, self._activations - kernels), "activations")
        self._work.start(self.memory, self._source, self._expert_runner)
        program, functions = self._first[0]
        self._executor = GpuExecutor(program, self.device, functions, budgets)
        for program, functions in self._first[1:]:
            self._executor.use(program, functions)
        if self._graphs:
            self.steady = SteadySteps(self._work, self._work.stores["hbm"], self.device)

    def run_step(self, step: Step, inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Run one step; ``inputs`` has ``input_ids`` and ``position_ids`` ``[seqs, q_len]`` of
        every group of ``step``. Returns the next token of every sequence that gets one, in the
        order of ``step.receivers``."""
        assert self._executor is not None
        groups = gpu_groups(step, self.settings)
        program, functions = self._programs(groups)
        self._executor.use(program, functions)
        places = {index: place for place, index in enumerate(step.receivers)}
        ended = [g.group for g in groups if g.group.takes(len(self._work.graph.layers) - 1)]
        order = [places[g.members[row].index] for g in ended for row in g.receivers]
        mine = _inputs_of(step, inputs, groups)
        if self.steady is not None and self.steady.takes(groups, program):
            begin = clock()
            self.steady.run(groups, mine, order, program)
        else:
            self._work.begin(groups, mine, order, program)
            begin = clock()
            self._executor.run_step()
        self._work.end()
        self.recorder.end_step(clock() - begin)
        tokens = torch.empty(step.seqs, dtype=torch.int64)
        tokens[order] = self._work.tokens.to("cpu")
        return tokens

    def leave(self, indices: Sequence[int]) -> None:
        """Nothing is kept of sequences that have ended."""

    def stop(self) -> None:
        """End the device's work and give all memory back. Safe to call twice."""
        if self._stopped:
            return
        self._stopped = True
        self.device.close()
        if self.steady is not None:
            self.steady.close()
        self._work.close()


def _inputs_of(
    step: Step, inputs: Sequence[Mapping[str, Tensor]], groups: Sequence[GpuGroup]
) -> list[dict[str, Tensor]]:
    """The inputs of a program's groups, which have their rows from the step's."""
    places = {
        member: (number, row)
        for number, group in enumerate(step.groups)
        for row, member in enumerate(group.members)
    }
    found = []
    for each in groups:
        number, first = places[each.group.members[0]]
        rows = slice(first, first + len(each.group.members))
        found.append({name: value[rows] for name, value in inputs[number].items()})
    return found
