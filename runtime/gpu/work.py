"""The work behind each operation of a GPU program: `launch -> tensors`, on whatever device.

A program says when an operation begins, on which engine, and in which buffers; what it does is
here, by its name (ir.gpu_tasks). All of it is torch on tensors of the device or of the host, so a
``HostDevice`` computes the same tokens as a ``CudaDevice`` should. It has never run on the latter.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.ir.gpu_program import ENGINES, GpuProgram
from dovetail.ir.gpu_settings import GpuGroup, GpuSettings
from dovetail.ir.gpu_tasks import GpuTask, gpu_task
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.attention import attention
from dovetail.runtime.gpu.attention import gpu_attention
from dovetail.runtime.gpu.device import Buffer, ComputeDevice, Launch
from dovetail.runtime.gpu.expert_work import ExpertWork
from dovetail.runtime.gpu.experts import Experts
from dovetail.runtime.gpu.groups import HOST, GroupState, GroupStates
from dovetail.runtime.gpu.kv import (
    OneLayerKv,
    SentKv,
    TierKv,
    bring_kv,
    kv_nbytes,
    send_kv,
)
from dovetail.runtime.gpu.memory import GpuMemory
from dovetail.runtime.gpu.weights import GpuWeights, Key
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.recorder import Recorder, clock
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.weight_store import Tensors

Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""Turns logits ``[n, vocab]`` of the step's sequences with these numbers into tokens ``[n]``."""


class GpuWork:
    """Does what launches say. ``functions`` is the namespace of the emitted segments.

    ``begin`` sets a step's groups and program, ``tokens`` are its results.
    """

    def __init__(
        self,
        graph: TaskGraph,
        settings: GpuSettings,
        constants: Mapping[str, Tensor],
        functions: Mapping[str, Any],
        choose: Choose,
    ) -> None:
        self.graph, self.settings = graph, settings
        self._functions, self._choose = functions, choose
        self._constants = dict(constants)
        self.tokens: Tensor = torch.empty(0, dtype=torch.int64)
        self.states: list[GroupState] = []
        self.places: Sequence[int] = ()
        self.recorder = Recorder(list(ENGINES))

    def start(
        self,
        memory: GpuMemory,
        source: CheckpointIndex | MemoryWeights,
        experts: Experts | None = None,
    ) -> None:
        """Set memory aside and load what stays resident. Raises BudgetError, CheckpointError."""
        graph, settings, device = self.graph, self.settings, memory.device
        self.device = device
        self.weights = GpuWeights(graph, source, settings, memory)
        specs = [graph.body(i).kv for i in range(len(graph.layers))]
        wall, total = settings.admission.wall, settings.admission.kv_tokens
        self.stores: dict[str, TierKv] = {}
        for tier, count in (("hbm", wall), ("ram", total - wall)):
            held = memory.allocate(tier, kv_nbytes(specs, count), "kv")
            self.stores[tier] = TierKv(specs, count, held)
        self.experts = ExpertWork(graph, settings, self.weights, memory, self._functions, experts)
        self._groups = GroupStates(settings, device, self.stores)
        on_device = {name: value.to(device.compute) for name, value in self._constants.items()}
        self._near = DeviceSide(self.experts, on_device, device)
        self._far = HostSide(self._constants)
        self._core_weights = self._load_core_weights()
        self._there: dict[tuple[str, int], Tensors] = {}
        self._tail_weights: dict[int, Tensors] = {}

    def close(self) -> None:
        """Close files and forget tensors."""
        self.states = []
        self.weights.close()

    def begin(
        self,
        groups: Sequence[GpuGroup],
        inputs: Sequence[Mapping[str, Tensor]],
        places: Sequence[int],
        program: GpuProgram,
    ) -> None:
        """Prepare a step; ``places`` number the sequences that get a token, group by group."""
        self.begin_states(self._groups.of(groups, inputs), places, program)

    def begin_states(
        self, states: list[GroupState], places: Sequence[int], program: GpuProgram
    ) -> None:
        """Prepare a step whose groups are made already."""
        self.places, self.states = places, states
        self._there.clear()
        self._tail_weights.clear()
        self.experts.begin(self.states, program)

    def finish_last(self) -> None:
        """What follows the experts of the last layer, now and not when the head asks for it."""
        with torch.inference_mode():
            for state in self.states:
                self._finish_layer(state, len(self.graph.layers) - 1)

    def end(self) -> None:
        """Keep the values of groups that go on in a later step."""
        for state in self.states:
            if state.last < len(self.graph.layers) - 1:
                self._groups.kept[state.info.group.members] = state.values
        self.states = []

    def __call__(self, launch: Launch, device: ComputeDevice) -> None:
        """Do an operation, on the current stream or thread."""
        begin = clock()
        self._do(gpu_task(launch.op), launch)
        if device.timed:
            kind, _, name = launch.work.partition(":")
            self.recorder.add(launch.engine, kind, name, launch.layer, begin, clock())

    def _do(self, task: GpuTask, launch: Launch) -> None:
        with torch.inference_mode():
            if task.kind:
                state = self._takers(launch.layer)[task.number]
                _OF_GROUP[task.verb](self, state, launch)
            elif task.verb in _PLAIN:
                _PLAIN[task.verb](self, launch)
            elif task.verb not in ("barrier", "tail"):
                self.experts.do(task, launch)

    def _takers(self, layer: int) -> list[GroupState]:
        """The groups that go through a layer, as its body numbers them."""
        return [state for state in self.states if state.info.group.takes(layer)]

    # Weights that are not experts.

    def _read_dense(self, launch: Launch) -> None:
        key: Key = ("dense", launch.layer, -1)
        self.experts.staged[key] = self.weights.read([key], self.device.bytes_of(launch.writes))[0]

    def _copy_dense(self, launch: Launch) -> None:
        key: Key = ("dense", launch.layer, -1)
        self._bring(key, launch.writes)

    def _copy_head(self, launch: Launch) -> None:
        self._bring(("head", -1, -1), launch.writes)

    def _bring(self, key: Key, buffer: Buffer) -> None:
        staged = self.experts.staged
        mine = {key: staged.pop(key)} if key in staged else {}
        there = self.weights.copy([key], mine, self.device.bytes_of(buffer))
        self._there[key[0], key[1]] = there[0]

    def _dense(self, layer: int) -> Tensors:
        held = self.weights.resident["hbm"].get(("dense", layer, -1))
        return held if held is not None else self._there["dense", layer]

    # Before the first layer and after the last.

    def _embed_rows(self, launch: Launch) -> None:
        weights = self.weights.resident["ram"].get(("embed", -1, -1), {})
        for state in self._takers(-1):
            self._functions["prologue"](self._far, state.host, state.host.values, weights, -1)

    def _copy_rows(self, launch: Launch) -> None:
        for state in self._takers(-1):
            for name, value in state.host.values.items():
                if name not in state.values:
                    state.values[name] = self._to_device(value)

    def _embed(self, launch: Launch) -> None:
        if self.settings.embed == "hbm" or not self._has_rows(launch):
            weights = self.weights.resident["hbm"].get(("embed", -1, -1), {})
            for state in self._takers(-1):
                self._functions["prologue"](self._near, state, state.values, weights, -1)

    def _has_rows(self, launch: Launch) -> bool:
        return any(source.startswith("copy_rows") for source in launch.sources)

    def _head(self, launch: Launch) -> None:
        last = len(self.graph.layers) - 1
        for state in self.states:
            self._enter(state)
            self._finish_layer(state, min(state.last, last))
        ended = [s for s in self.states if s.info.group.takes(last)]
        hidden = torch.cat([state.last_hidden() for state in ended])
        weights = self.weights.resident["hbm"].get(("head", -1, -1))
        weights = weights if weights is not None else self._there["head", -1]
        found, tile = [], self.settings.head_rows
        for start in range(0, len(hidden), tile):
            stop = min(start + tile, len(hidden))
            logits = self._functions["epilogue"](self._near, hidden[start:stop], weights)
            found.append(self._choose(logits[:, -1], self.places[start:stop]))
        self.tokens = torch.cat(found)

    # A group's attention.

    def _attention(self, state: GroupState, launch: Launch) -> None:
        for part in ("before", "core", "after"):
            self._run(state, launch.layer, part)

    def _before(self, state: GroupState, launch: Launch) -> None:
        self._run(state, launch.layer, "before")

    def _core(self, state: GroupState, launch: Launch) -> None:
        self._run(state, launch.layer, "core")

    def _after(self, state: GroupState, launch: Launch) -> None:
        self._run(state, launch.layer, "after")

    def _run(self, state: GroupState, layer: int, part: str) -> None:
        """Run a part of a layer's body on a group, the end of the layer before first."""
        self._enter(state)
        self._finish_layer(state, layer - 1)
        weights = self._dense(layer)
        function = self._part(layer, part)
        if function is not None:
            function(self._near, state, state.values, weights, layer)
        if part == "after":
            self._keep_tail(layer, weights)

    def _part(self, layer: int, part: str) -> Any:
        return self._functions.get(f"{self.graph.body(layer).name}_{part}")

    def _enter(self, state: GroupState) -> None:
        """What another stream made is used by this one."""
        for value in state.values.values():
            self.device.keep(value)

    def _finish_layer(self, state: GroupState, layer: int) -> None:
        """What follows the experts of ``layer``, once; its sums are there until the next layer."""
        if state.done >= layer or not state.info.group.takes(layer) or layer < 0:
            return
        state.done = layer
        function = self._part(layer, "tail")
        if function is not None:
            weights = self._tail_weights.get(layer, {})
            function(self._near, state, state.values, weights, layer)

    def _keep_tail(self, layer: int, weights: Tensors) -> None:
        """Weights behind the experts outlive the buffer that they came in; they are few."""
        names = self._functions["TAILS"].get(self.graph.body(layer).name, ())
        if names and layer not in self._tail_weights:
            streamed = self.settings.dense[layer] != "hbm"
            self._tail_weights[layer] = {
                name: weights[name].clone() if streamed else weights[name] for name in names
            }

    # KV that is copied, and attention on the CPU.

    def _kv_in(self, state: GroupState, launch: Launch) -> None:
        spec = self.graph.body(launch.layer).kv
        assert spec is not None
        tokens = state.seqs * (state.past + 1)
        there = OneLayerKv(spec, tokens, self.device.bytes_of(launch.writes))
        bring_kv(self.stores["ram"], launch.layer, state.home, there)
        assert isinstance(state.kv, SentKv)
        state.kv.rooms[launch.layer] = there

    def _kv_out(self, state: GroupState, launch: Launch) -> None:
        if isinstance(state.kv, SentKv):
            new = state.kv.new.pop(launch.layer)
            for value in new:
                self.device.keep(value)
            send_kv(self.stores["ram"], launch.layer, state.home, new)

    def _down(self, state: GroupState, launch: Launch) -> None:
        state.host.values = {}
        for name in self._functions["CORES"][self.graph.body(launch.layer).name][0]:
            value = state.values[name]
            self.device.keep(value)
            state.host.values[name] = self._to_host(value)

    def _cpu(self, state: GroupState, launch: Launch) -> None:
        layer, values = launch.layer, state.host.values
        given = set(values)
        weights = self._core_weights.get(layer, {})
        self._part(layer, "core")(self._far, state.host, values, weights, layer)
        for name in given - set(values):
            del state.values[name]

    def _up(self, state: GroupState, launch: Launch) -> None:
        for name, value in state.host.values.items():
            if name not in state.values:
                state.values[name] = self._to_device(value)

    def _to_host(self, value: Tensor) -> Tensor:
        return to_host(value, self.device)

    def _to_device(self, value: Tensor) -> Tensor:
        return to_device(value, self.device)

    def _load_core_weights(self) -> dict[int, Tensors]:
        """Weights that attention on the CPU reads, in ram for the whole run."""
        found: dict[int, Tensors] = {}
        if not self.settings.attention_cpu:
            return found
        for layer in range(len(self.graph.layers)):
            names = self._functions["CORES"].get(self.graph.body(layer).name, ((), ()))[1]
            if names:
                key: Key = ("dense", layer, -1)
                held = self.weights.resident["ram"].get(key)
                found[layer] = held if held is not None else self.weights.fetch(key, names)
        return found


_PLAIN = {
    "embed_rows": GpuWork._embed_rows,
    "copy_rows": GpuWork._copy_rows,
    "embed": GpuWork._embed,
    "read_dense": GpuWork._read_dense,
    "copy_dense": GpuWork._copy_dense,
    "copy_head": GpuWork._copy_head,
    "head": GpuWork._head,
}
_OF_GROUP = {
    "attention": GpuWork._attention,
    "before": GpuWork._before,
    "kv": GpuWork._core,
    "after": GpuWork._after,
    "kv_in": GpuWork._kv_in,
    "kv_out": GpuWork._kv_out,
    "down": GpuWork._down,
    "cpu": GpuWork._cpu,
    "up": GpuWork._up,
}


def to_host(value: Tensor, device: ComputeDevice) -> Tensor:
    """A copy in the host's memory, begun on the current stream."""
    made = device.host_tensor(tuple(value.shape), value.dtype)
    return made.copy_(value, non_blocking=True)


def to_device(value: Tensor, device: ComputeDevice) -> Tensor:
    """A copy on the device, begun on the current stream."""
    made = torch.empty(value.shape, dtype=value.dtype, device=device.compute)
    return made.copy_(value, non_blocking=True)


class DeviceSide:
    """What emitted functions call ``m`` where the device computes."""

    attention = staticmethod(gpu_attention)

    def __init__(
        self, experts: ExpertWork, constants: Mapping[str, Tensor], device: ComputeDevice
    ) -> None:
        self.constants, self.device = constants, device.compute
        self.gather, self.scatter = experts.gather, experts.scatter

    def embedding(self, weights: Tensors, name: str, ids: Tensor) -> Tensor:
        """Rows of the embedding table."""
        return torch.nn.functional.embedding(ids, weights[name])


class HostSide:
    """What emitted functions call ``m`` where the CPU computes."""

    attention = staticmethod(attention)
    device = HOST

    def __init__(self, constants: Mapping[str, Tensor]) -> None:
        self.constants = constants

    def embedding(self, weights: Tensors, name: str, ids: Tensor) -> Tensor:
        """Rows of the embedding table."""
        return torch.nn.functional.embedding(ids, weights[name])
