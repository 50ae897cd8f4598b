"""Bytes that expert parallelism moves: `trace, placement, way -> bytes by kind and device`.

A pure function: no model runs. The runtime (runtime/expert_parallel.py) sends rows of
ir/expert_rows.py to the devices of ir/expert_dispatch.py; this counts the same rows for the same
tokens. What a device sends to itself is not counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.errors import InputError
from dovetail.ir.expert_dispatch import ExpertDispatch, next_home, owners, visited
from dovetail.ir.expert_placement import ExpertPlacement
from dovetail.ir.expert_rows import HEADER, TOKEN_ROW, ExpertRows, expert_rows, kv_row
from dovetail.ir.placement import experts_of
from dovetail.ir.program import Segment
from dovetail.ir.routing_trace import RoutingTrace
from dovetail.ir.task_graph import TaskGraph

Ints = NDArray[np.int64]
Way = Literal["two", "one"]


@dataclass(frozen=True, slots=True)
class RowSizes:
    """Row sizes of a model: ``experts[layer]`` of each layer with experts, ``kv[layer]`` of what
    each layer keeps of a token (0: nothing), and how many kinds of the latter there are."""

    experts: Mapping[int, ExpertRows]
    kv: tuple[int, ...]
    kv_kinds: int

    @classmethod
    def of(cls, graph: TaskGraph, segments: Sequence[Segment]) -> "RowSizes":
        """Those of a captured model, whose program has these segments."""
        layers = range(len(graph.layers))
        specs = [graph.body(layer).kv for layer in layers]
        return cls(
            {i: expert_rows(graph, segments, i) for i in layers if experts_of(graph, i)},
            tuple(kv_row(spec) if spec is not None else 0 for spec in specs),
            len({spec for spec in specs if spec is not None}),
        )


@dataclass(frozen=True, slots=True)
class ExpertTraffic:
    """Bytes sent to other devices: ``sent[kind][device]``; and ``crossed``, the share of inputs
    that leave the device they are on (what affinity placement minimises)."""

    sent: Mapping[str, tuple[int, ...]]
    crossed: float

    @property
    def total(self) -> int:
        """All bytes."""
        return sum(sum(each) for each in self.sent.values())


def expert_traffic(
    trace: RoutingTrace, placement: ExpertPlacement, sizes: RowSizes, way: Way = "two"
) -> ExpertTraffic:
    """The traffic of a trace. Raises InputError if trace and placement are of other models."""
    found = (len(placement.layers), placement.experts)
    if found != (len(trace.layers), trace.num_experts) or trace.layers != tuple(sizes.experts):
        raise InputError(
            f"the placement is for {found[0]} layers of {found[1]} experts and the trace has "
            f"{len(trace.layers)} of {trace.num_experts}: place for this trace's model"
        )
    return _Count(trace, placement, sizes, way).run()


class _Count:
    """Where every token is, layer by layer, and what that sends."""

    def __init__(
        self, trace: RoutingTrace, placement: ExpertPlacement, sizes: RowSizes, way: Way
    ) -> None:
        self.trace, self.sizes, self.way = trace, sizes, way
        self.dispatch, self.devices = ExpertDispatch(placement), placement.devices
        self.prompt = trace.prompt.astype(np.int64)
        self.position = trace.position.astype(np.int64)
        self.sent: dict[str, Ints] = {}
        self.here = owners(self.prompt, self.devices)
        self.moving = trace.decode & (way == "one")
        self.seen = self.away = 0

    def run(self) -> ExpertTraffic:
        """Count everything."""
        columns = {layer: column for column, layer in enumerate(self.trace.layers)}
        others = self.devices - 1
        for layer, kv in enumerate(self.sizes.kv):
            if self.way == "one":
                self._add("coherence", self.here, kv * others)
            if layer in columns:
                self._experts(columns[layer], self.sizes.experts[layer])
        self._add("token", self.here[self._receivers()], TOKEN_ROW * others)
        self._add("headers", np.arange(self.devices), self._headers() * HEADER * others)
        sent = {kind: tuple(map(int, each)) for kind, each in self.sent.items()}
        return ExpertTraffic(sent, self.away / max(1, self.seen))

    def _add(self, kind: str, devices: Ints, nbytes: int) -> None:
        """Count ``nbytes`` for each entry of ``devices``, the senders."""
        counts = np.bincount(devices, minlength=self.devices) * nbytes
        self.sent[kind] = self.sent.get(kind, 0) + counts

    def _experts(self, column: int, rows: ExpertRows) -> None:
        experts = self.trace.experts[:, column].astype(np.int64)
        serving = self.dispatch.serving(column, experts, self.prompt, self.position)
        home = np.where(self.moving, next_home(serving, self.here, self.devices), self.here)
        self.seen += serving.size
        self.away += int((serving != self.here[:, None]).sum())
        token, device = np.nonzero(visited(serving, self.devices))
        self._add("dispatch", self.here[token[device != self.here[token]]], rows.dispatch)
        self._add("combine", device[device != home[token]], rows.combine)
        self._add("move", self.here[home != self.here], rows.move)
        self.here = home

    def _receivers(self) -> NDArray[np.bool_]:
        """The tokens that another follows: those fed back, and the last of every prompt."""
        last = np.full(int(self.prompt.max()) + 1, -1)
        prefill = ~self.trace.decode
        np.maximum.at(last, self.prompt[prefill], self.position[prefill])
        found: NDArray[np.bool_] = self.trace.decode | (self.position == last[self.prompt])
        return found

    def _headers(self) -> int:
        """Counts that a device tells each other one, over all steps: of inputs and moves, of sums
        where they are not known, of tokens, of rows of the KV store."""
        steps, layers = self.trace.steps, len(self.trace.layers)
        told = steps * (2 * layers + 1)
        if self.way == "two":
            return told
        prompts = len(np.unique(self.trace.step[~self.trace.decode]))
        sums = prompts if self.trace.top_k == 1 else steps
        return told + sums * layers + steps * self.sizes.kv_kinds
