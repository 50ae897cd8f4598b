"""Durations: `layout, step -> seconds of every instruction` on a machine."""

from collections.abc import Iterator

from dovetail.ir.batching import Group, Step, group_shares
from dovetail.ir.machine import Machine
from dovetail.ir.placement import dense_weights, experts_of, head_weights
from dovetail.ir.program import Load, Program, Run, Segment
from dovetail.passes.apply_moves import Layout
from dovetail.passes.cost import Costs, Workers
from dovetail.passes.lower import segment_body

ROW_READ_SECONDS = 1e-4
"""One embedding row read from disk: a small random read."""
QUANTUM = 64
"""KV lengths are rounded up to this many tokens, so that similar steps share a simulation."""


class Durations:
    """Seconds of every instruction of a layout's program in one step."""

    def __init__(self, layout: Layout, program: Program, machine: Machine, costs: Costs) -> None:
        self._layout, self._program = layout, program
        self._machine, self._costs = machine, costs
        self._workers = Workers(layout.graph.dtype, layout.buckets, layout.workers)
        self._segments = {segment.name: segment for segment in program.segments}
        self._bodies = {s.name: segment_body(layout.graph, s) for s in program.segments}
        busy = machine.keeps("cpu", "cpu") if layout.workers > 1 else 1.0
        self.speed = {"cpu": busy * _thread_speedup(machine, layout.threads), "disk": 1.0}
        self._load_bytes = {(ring, layer): size for ring, layer, size in _streamed_bytes(layout)}
        # Every load that is under way has a buffer, so more readers than buffers never read.
        buffers = sum(ring.slots for ring in program.rings)
        self._sharers = max(1, min(layout.readers, buffers))
        self._step: Step | None = None
        self._known: dict[tuple[object, ...], float] = {}

    @property
    def disk_bytes(self) -> int:
        """Bytes read in one step."""
        return sum(
            size * (self._layout.chunks(layer) if ring == "experts" else 1)
            for (ring, layer), size in self._load_bytes.items()
        )

    def contend(self, cpu_busy: float, disk_busy: float) -> None:
        """Slow compute and disk by the share of the step in which the other is busy."""
        cpu_keeps = self._machine.keeps("cpu", "disk")
        if self._layout.workers > 1:
            both = self._machine.keeps("cpu", "cpu+disk") / self._machine.keeps("cpu", "cpu")
            cpu_keeps = min(cpu_keeps, both)
        disk_keeps = self._machine.keeps("disk", "cpu")
        self.speed["cpu"] *= 1 - (1 - cpu_keeps) * disk_busy
        self.speed["disk"] *= 1 - (1 - disk_keeps) * cpu_busy
        self._known.clear()

    def of(self, item: Load | Run, worker: int, step: Step) -> float:
        """Seconds of a load or run. Equal layers take equally long, so each is worked out once."""
        if step is not self._step:
            self._step, self._shares = step, group_shares(step, self._layout.workers)
            self._known.clear()
        key = self._key(item, worker)
        if key not in self._known:
            slower = self._machine.corrected(self._class(item))
            self._known[key] = self._seconds(item, worker, step) * slower
        return self._known[key]

    def _class(self, item: Load | Run) -> str:
        """The class of work that corrections of the machine are kept by."""
        if isinstance(item, Load):
            return f"load:{item.ring}"
        return f"run:{self._segments[item.segment].over}"

    def _key(self, item: Load | Run, worker: int) -> tuple[object, ...]:
        if isinstance(item, Load):
            return item.ring, item.layer
        assert self._step is not None
        taken = tuple(group.takes(item.layer) for group in self._step.groups if group.layers)
        count = -1
        if item.chunk < 0 <= item.layer and self._segments[item.segment].over == "experts":
            count = self._layout.experts_resident[item.layer]
        return item.segment, item.unit, count, worker, taken

    def _seconds(self, item: Load | Run, worker: int, step: Step) -> float:
        if isinstance(item, Load):
            layer = -1 if item.ring == "head" else item.layer
            block = self._layout.prefetch[item.ring].block
            nbytes = self._load_bytes[item.ring, layer]
            piece = min(block, nbytes / self._reads(item))
            disk = self._machine.disk
            rate = min(disk.at(piece), disk.peak / self._sharers) * self.speed["disk"]
            return nbytes / rate
        segment = self._segments[item.segment]
        if segment.over == "experts":
            return self._experts(item, step) / self.speed["cpu"]
        if segment.over == "seqs":
            return self._head(segment, step) / self.speed["cpu"]
        seconds = self._groups(segment, worker, step, item.layer) / self.speed["cpu"]
        if item.unit == "disk rows":
            tokens = sum(group.tokens for group in step.groups if group.takes(item.layer))
            seconds += tokens / self._layout.workers * ROW_READ_SECONDS
        return seconds

    def _reads(self, load: Load) -> int:
        """Separate reads of a load: an expert's tensors lie side by side in published checkpoints,
        one expert after another only by chance."""
        graph = self._layout.graph
        if load.ring == "experts":
            return self._layout.chunk
        return len(
            head_weights(graph) if load.ring == "head" else dense_weights(graph.body(load.layer))
        )

    def _groups(self, segment: Segment, worker: int, step: Step, layer: int) -> float:
        groups = [step.groups[i] for i in self._shares[worker]]
        return sum(self._group(segment, g) for g in groups if g.takes(layer))

    def _group(self, segment: Segment, group: Group) -> float:
        body = self._bodies[segment.name]
        past = -(-group.past // QUANTUM) * QUANTUM if group.past else 0
        return sum(
            self._costs.task_seconds(
                task,
                body,
                self._workers,
                seqs=len(group.members),
                q_len=group.q_len,
                past=past,
            )
            for task in body.tasks
            if task.name in segment.tasks
        )

    def _head(self, segment: Segment, step: Step) -> float:
        layout, body = self._layout, self._bodies[segment.name]
        seqs = -(-step.seqs // layout.workers)
        if not seqs:
            return 0.0
        tiles = -(-seqs // layout.head_rows)
        return tiles * sum(
            self._costs.task_seconds(
                task,
                body,
                self._workers,
                seqs=-(-seqs // tiles),
                q_len=1,
                past=0,
            )
            for task in body.tasks
            if task.name in segment.tasks
        )

    def _experts(self, run: Run, step: Step) -> float:
        """Uniform routing: every expert that is hit gets an equal share of the tokens."""
        layout = self._layout
        experts = experts_of(layout.graph, run.layer)
        assert experts is not None
        tokens = sum(sum(group.lengths) for group in step.groups if group.takes(run.layer))
        if not tokens:  # prompts alone, in another group of layers (layered prefill)
            return 0.0
        hit = 1 - (1 - experts.top_k / experts.count) ** tokens
        rows = tokens * experts.top_k / (experts.count * hit)
        count = len(self._program.settings.chunk_experts(run.layer, run.chunk)) * hit
        one = self._costs.expert_seconds(
            experts,
            self._workers,
            rows,
            layout.expert_rows,
            layout.settings.pack,
            layout.grouped,
        )
        return count * one / layout.workers


def _thread_speedup(machine: Machine, threads: int) -> float:
    """Rate of one worker with several threads: as far as all cores together allow."""
    if threads <= 1:
        return 1.0
    return max(1.0, threads * machine.keeps("cpu", "cpu"))


def _streamed_bytes(layout: Layout) -> Iterator[tuple[str, int, int]]:
    graph = layout.graph
    for layer in range(len(graph.layers)):
        if not layout.dense_resident[layer]:
            yield "dense", layer, sum(w.nbytes for w in dense_weights(graph.body(layer)))
        experts = experts_of(graph, layer)
        if experts and layout.chunks(layer):
            yield "experts", layer, layout.chunk * experts.nbytes
    if not layout.head_resident:
        yield "head", -1, sum(w.nbytes for w in head_weights(graph))
