"""The work behind the operations of a layer's experts: reads, copies, products, and the CPU's part.

Where experts are dealt out by their loads, whoever first needs to know waits for the routing.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.ir.gpu_program import GpuProgram
from dovetail.ir.gpu_settings import ExpertLoad, GpuSettings, deal, expert_loads
from dovetail.ir.gpu_tasks import GpuTask, gpu_task
from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import Experts as ExpertSpec
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.gpu.device import Launch
from dovetail.runtime.gpu.experts import Experts, GpuTokens, Routing, TorchExperts, tokens_nbytes
from dovetail.runtime.gpu.groups import GroupState
from dovetail.runtime.gpu.memory import GpuMemory
from dovetail.runtime.gpu.weights import GpuWeights, Key
from dovetail.runtime.pools import torch_dtype
from dovetail.runtime.weight_store import Tensors

Part = tuple[list[int], tuple[ExpertLoad, ...]]
"""The CPU's experts of a layer in a step, and what each copy brings."""


class ExpertWork:
    """Does the operations of experts; ``staged`` holds units that were read and not yet copied."""

    def __init__(
        self,
        graph: TaskGraph,
        settings: GpuSettings,
        weights: GpuWeights,
        memory: GpuMemory,
        functions: Mapping[str, Any],
        experts: Experts | None,
    ) -> None:
        self._graph, self._settings, self._weights = graph, settings, weights
        self._device, self._functions = memory.device, functions
        self._experts = experts or TorchExperts(settings.expert_rows)
        self._on_host = TorchExperts(settings.expert_rows)
        self._dtype = torch_dtype(graph.dtype)
        specs = [s for i in range(len(graph.layers)) if (s := experts_of(graph, i))]
        self._tokens: GpuTokens | None = None
        if specs:
            nbytes = tokens_nbytes(specs, settings.step_tokens, self._dtype)
            held = memory.allocate("hbm", nbytes, "tokens")
            self._tokens = GpuTokens(specs, settings.step_tokens, self._dtype, held)
        self.staged: dict[Key, Tensors] = {}
        self._lock = threading.Lock()
        self._clear()

    def _clear(self) -> None:
        self._states: list[GroupState] = []
        self._program: GpuProgram | None = None
        self._routings: dict[int, tuple[int, Routing]] = {}
        self._parts: dict[int, Part] = {}
        self._there: dict[tuple[int, int], list[Tensors]] = {}
        self._sent: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._made: dict[int, Tensor] = {}
        self._from_host: dict[int, tuple[Tensor, int]] = {}

    def begin(self, states: list[GroupState], program: GpuProgram) -> None:
        """Prepare a step."""
        self._clear()
        self._states, self._program = states, program

    def do(self, task: GpuTask, launch: Launch) -> None:
        """Do an operation."""
        _DOES[task.verb](self, launch, task.number)

    # What emitted functions call.

    def gather(self, g: GroupState, layer: int, x: Tensor, index: Tensor, weight: Tensor) -> None:
        """Bring a group's tokens (padding left out) to the experts."""
        assert self._tokens is not None
        x, index, weight = (t.reshape(-1, t.shape[-1]) for t in (x, index, weight))
        if g.valid is not None:
            x, index, weight = (t.index_select(0, g.valid) for t in (x, index, weight))
        self._tokens.put(g.start, x, index, weight)

    def scatter(self, g: GroupState) -> Tensor:
        """The experts' output for a group, ``[seqs * q_len, hidden]``; zeros where padded."""
        assert self._tokens is not None
        rows = slice(g.start, g.start + g.tokens)
        total = self._tokens.sums[rows]
        with self._lock:
            made, left = self._from_host.get(g.done, (None, 0))
            if made is not None and left == 1:
                del self._from_host[g.done]
            elif made is not None:
                self._from_host[g.done] = made, left - 1
        if made is not None:
            self._device.keep(made)
            total = total + made[rows]
        y = total.to(self._dtype, copy=True)
        if g.valid is None:
            return y
        padded = torch.zeros((g.seqs * g.q_len, y.shape[1]), dtype=y.dtype, device=y.device)
        return padded.index_copy_(0, g.valid, y)

    # Reads, copies and products.

    def _read(self, launch: Launch, number: int) -> None:
        on_disk = self._part(launch.layer)[1][number].disk
        self._stage([("experts", launch.layer, e) for e in on_disk], launch)

    def _read_cpu(self, launch: Launch, number: int) -> None:
        layer = launch.layer
        in_ram = self._weights.resident["ram"]
        keys: list[Key] = [("experts", layer, e) for e in self._part(layer)[0]]
        self._stage([key for key in keys if key not in in_ram], launch)

    def _stage(self, keys: list[Key], launch: Launch) -> None:
        read = self._weights.read(keys, self._device.bytes_of(launch.writes))
        with self._lock:
            self.staged |= dict(zip(keys, read, strict=True))

    def _copy(self, launch: Launch, number: int) -> None:
        load = self._part(launch.layer)[1][number]
        keys: list[Key] = [("experts", launch.layer, e) for e in load.experts]
        with self._lock:
            mine = {key: self.staged.pop(key) for key in keys if key in self.staged}
        there = self._weights.copy(keys, mine, self._device.bytes_of(launch.writes))
        self._there[launch.layer, number] = there

    def _held(self, launch: Launch, number: int) -> None:
        self._multiply_held(launch.layer, self._all(launch.layer))

    def _gemm(self, launch: Launch, number: int) -> None:
        self._multiply_load(launch.layer, number, self._all(launch.layer))

    def _of_group(self, launch: Launch, number: int) -> None:
        state = self._takers(launch.layer)[number]
        routing = self._routing(launch.layer, state.start, state.start + state.tokens)
        self._multiply_held(launch.layer, routing)
        for load in range(len(self._part(launch.layer)[1])):
            self._multiply_load(launch.layer, load, routing)

    def _multiply_held(self, layer: int, routing: Routing) -> None:
        placed = self._settings.experts[layer]
        assert placed is not None
        held = self._weights.resident["hbm"]
        cpu = set(self._part(layer)[0])
        mine = [e for e in placed.hbm if e not in cpu]
        self._multiply(layer, mine, [held["experts", layer, e] for e in mine], routing)

    def _multiply_load(self, layer: int, number: int, routing: Routing) -> None:
        experts = self._part(layer)[1][number].experts
        self._multiply(layer, experts, self._there[layer, number], routing)

    def _multiply(
        self, layer: int, experts: Sequence[int], weights: Sequence[Tensors], routing: Routing
    ) -> None:
        assert self._tokens is not None
        self._device.keep(routing.order)
        self._experts.run(
            layer, self._function(layer), experts, weights, routing, self._tokens.x,
            self._tokens.sums,
        )  # fmt: skip

    def _function(self, layer: int) -> Any:
        return self._functions[f"{self._graph.body(layer).name}_expert"]

    # Experts on the CPU.

    def _down(self, launch: Launch, number: int) -> None:
        assert self._tokens is not None
        routing = self._all(launch.layer)
        x = self._tokens.x[: len(routing.index)]
        found = []
        for value in (x, routing.index, routing.weight):
            made = self._device.host_tensor(tuple(value.shape), value.dtype)
            found.append(made.copy_(value, non_blocking=True))
        self._sent[launch.layer] = found[0], found[1], found[2]

    def _cpu(self, launch: Launch, number: int) -> None:
        layer = launch.layer
        x, index, weight = self._sent.pop(layer)
        experts, held = self._part(layer)[0], self._weights.resident["ram"]
        weights = []
        with self._lock:
            for expert in experts:
                key: Key = ("experts", layer, expert)
                weights.append(held[key] if key in held else self.staged.pop(key))
        sums = self._device.host_tensor(tuple(x.shape), weight.dtype).zero_()
        routing = Routing(0, index, weight, self._spec(layer).count)
        self._on_host.run(layer, self._function(layer), experts, weights, routing, x, sums)
        self._made[layer] = sums

    def _up(self, launch: Launch, number: int) -> None:
        made = self._made.pop(launch.layer)
        there = torch.empty(made.shape, dtype=made.dtype, device=self._device.compute)
        there.copy_(made, non_blocking=True)
        with self._lock:
            self._from_host[launch.layer] = there, len(self._takers(launch.layer))

    # Who chose whom, and what is done where.

    def _takers(self, layer: int) -> list[GroupState]:
        return [state for state in self._states if state.info.group.takes(layer)]

    def _all(self, layer: int) -> Routing:
        """The choices of all tokens of a layer."""
        return self._routing(layer, 0, sum(state.tokens for state in self._takers(layer)))

    def _routing(self, layer: int, start: int, stop: int) -> Routing:
        assert self._tokens is not None
        with self._lock:
            known = self._routings.get(start)
            if known is None or known[0] != layer:
                known = layer, self._tokens.routing(start, stop, self._spec(layer))
                self._routings[start] = known
            return known[1]

    def _spec(self, layer: int) -> ExpertSpec:
        spec = experts_of(self._graph, layer)
        assert spec is not None
        return spec

    def _part(self, layer: int) -> Part:
        """The CPU's experts of a layer, and what each copy brings; worked out once a step."""
        dealing, placed = self._settings.dealing[layer], self._settings.experts[layer]
        assert placed is not None and self._program is not None
        # Counts wait for the device, which must not be under the lock that streams take.
        counts = self._all(layer).counts if dealing and layer not in self._parts else []
        with self._lock:
            if layer not in self._parts:
                if dealing is None:
                    cpu = list(placed.cpu)
                    copied = [e for e in (*placed.ram, *placed.disk) if e not in placed.cpu]
                else:
                    cpu, copied = deal(dealing, placed, counts)
                self._parts[layer] = cpu, self._loads(layer, copied, set(placed.disk))
            return self._parts[layer]

    def _loads(self, layer: int, copied: Sequence[int], disk: set[int]) -> tuple[ExpertLoad, ...]:
        assert self._program is not None
        tasks = [gpu_task(op.name) for op in self._program.body(layer)]
        count = sum(task.verb == "copy_experts" for task in tasks)
        reading = sorted(task.number for task in tasks if task.verb == "read_experts")
        in_ram = [e for e in copied if e not in disk]
        return expert_loads(in_ram, [e for e in copied if e in disk], count, reading)


_DOES = {
    "read_experts": ExpertWork._read,
    "read_cpu_experts": ExpertWork._read_cpu,
    "copy_experts": ExpertWork._copy,
    "experts_hbm": ExpertWork._held,
    "gemm": ExpertWork._gemm,
    "experts_group": ExpertWork._of_group,
    "down_experts": ExpertWork._down,
    "cpu_experts": ExpertWork._cpu,
    "up_experts": ExpertWork._up,
}
