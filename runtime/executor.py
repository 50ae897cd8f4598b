"""What emitted executors stand on: pools, rings, engines on threads, and meetings between them.

The emitted source calls the methods of ``Runtime``; one thread runs each engine's function. The
first error in any engine stops all of them and is raised where the step was asked for.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dovetail.ir.batching import Member, Step, group_shares
from dovetail.ir.load_order import LoadOrder
from dovetail.ir.placement import beside_rows, embed_weights, experts_of
from dovetail.ir.program import Program, unroll
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.attention import attention
from dovetail.runtime.direct_io import Reader, direct_span
from dovetail.runtime.expert_packs import packs, run_pack
from dovetail.runtime.group_state import GroupState
from dovetail.runtime.kv_store import KvGroup, KvStore
from dovetail.runtime.memory_weights import MemoryWeights
from dovetail.runtime.modules import Modules, has_modules, state_nbytes
from dovetail.runtime.pools import Arena, RingClosed, SlotRing, TierBudget, torch_dtype
from dovetail.runtime.recorder import Recorder, clock
from dovetail.runtime.routing_sink import RoutingSink
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.tokens import Routing, TokenBuffers
from dovetail.runtime.warm_up import warm_up
from dovetail.runtime.weight_store import Tensors, WeightStore

DISK_WORKER = -1
"""The ``worker`` that a disk engine's function is called with."""
WAIT_RECORDED = 20e-6
"""Waits shorter than this many seconds are not worth a span."""


class Runtime:
    """Runs an emitted executor. ``functions`` is the emitted module's namespace, ``choose`` turns
    logits ``[n, vocab]`` and the numbers of the sequences in the step into tokens ``[n]``.
    ``routing_sink``, if set before the start, is told which experts tokens choose."""

    constants: Mapping[str, Tensor]

    def __init__(
        self,
        graph: TaskGraph,
        program: Program,
        constants: Mapping[str, Tensor],
        index: CheckpointIndex | MemoryWeights,
        functions: Mapping[str, Any],
        choose: Callable[[Tensor, range], Tensor],
    ) -> None:
        self.graph, self.program, self.constants = graph, program, constants
        self.routing_sink: RoutingSink | None = None
        self.budget = TierBudget(program.capacity["ram"])
        self.recorder = Recorder(list(program.engines))
        self._functions, self._choose = functions, choose
        self._dtype = torch_dtype(graph.dtype)
        self._workers = len(program.workers)
        self._reader = Reader(block_bytes=program.settings.block)
        self._directory = getattr(index, "directory", None)
        self._store: WeightStore | MemoryWeights = (
            index if isinstance(index, MemoryWeights) else WeightStore(graph, index, self._reader)
        )
        self._stopped = self._ready = False
        self._error: BaseException | None = None
        self._new_step = threading.Condition()
        self._asked, self._done = 0, 0
        self._barrier = threading.Barrier(self._workers)
        self._step: Step | None = None
        self._groups: list[GroupState] = []
        self._kept: dict[tuple[Member, ...], dict[str, Tensor]] = {}
        self._shares: tuple[tuple[int, ...], ...] = ()
        self._routing: Routing | None = None
        self._routed_layer = 0
        self._rings: dict[str, SlotRing] = {}
        self._held: dict[str, list[list[Tensors]]] = {}
        self._resident: dict[tuple[str, int], list[Tensors]] = {}
        self._beside_rows: list[Tensors] = []
        self._tokens: TokenBuffers | None = None
        self._pools: list[Arena | KvStore | TokenBuffers | Modules] = []
        self.modules: Modules | None = None
        self._row_lock = threading.Lock()
        self._hidden: Tensor | None = None
        self._next: Tensor = torch.empty(0, dtype=torch.int64)
        self._threads = [self._thread(name) for name in program.engines]
        self._warm = threading.Barrier(len(self._threads) + 1)
        for thread in self._threads:
            thread.start()
        self._warm.wait()

    # Set-up and the controller's side.

    def start(self) -> None:
        """Allocate all pools, load what stays resident, and let the engines go."""
        self._setup()
        with self._new_step:
            self._ready = True
            self._new_step.notify_all()

    def _setup(self) -> None:
        program, graph = self.program, self.graph
        settings = program.settings
        self._resident = self._load_resident()
        for ring in program.rings:
            self._rings[ring.name] = SlotRing(
                ring.slots, ring.slot_bytes, self.budget, f"ring {ring.name}", ring.consumers
            )
            self._held[ring.name] = [[] for _ in range(ring.slots)]
        self._order = LoadOrder({n: tuple(unroll(items)) for n, items in program.engines.items()})
        self._loads = {name: dict.fromkeys(self._rings, 0) for name in program.engines}
        self._waits = [dict.fromkeys(self._rings, 0) for _ in range(self._workers)]
        layers = range(len(graph.layers))
        self.kv = KvStore(
            [graph.body(i).kv for i in layers], settings.admission.kv_tokens, self._kv_memory
        )
        self._pools.insert(0, self.kv)
        if has_modules(graph):
            admitted = settings.admission
            nbytes = state_nbytes(graph, admitted.seqs, admitted.kv_tokens)
            self.modules = Modules(graph, self._directory, self.budget, nbytes)
            self._pools.append(self.modules)
        specs = [spec for i in layers if (spec := experts_of(graph, i))]
        if specs:
            self._tokens = TokenBuffers(
                specs,
                settings.step_tokens,
                self._workers,
                self._dtype,
                self.budget,
                settings.buckets,
            )
            self._pools.append(self._tokens)
        widest = max((w.nbytes // w.shape[0] for w in embed_weights(graph)), default=0)
        row = direct_span(4095, widest)
        self._load_beside_rows()
        rows = Arena(row, self.budget, "embedding rows")
        self._row_buffer = rows.view(rows.allocate(row), row)
        self._pools.append(rows)

    def _kv_memory(self, nbytes: int) -> memoryview:
        arena = Arena(nbytes, self.budget, "kv")
        self._pools.append(arena)
        return arena.view(arena.allocate(nbytes), nbytes)

    def _load_resident(self) -> dict[tuple[str, int], list[Tensors]]:
        if isinstance(self._store, MemoryWeights):
            held = self.program.resident
            return {(k, i): self._store.tensors(k, i, range(n)) for k, i, n in held}
        units = {}
        for kind, layer, experts in self.program.resident:
            units[kind, layer] = self._store.unit(kind, layer, range(experts))
        total = sum(unit.nbytes for unit in units.values())
        if not total:
            return {}
        arena = Arena(total, self.budget, "resident weights")
        self._pools.append(arena)
        buffers = [arena.view(arena.allocate(u.nbytes), u.nbytes) for u in units.values()]
        # Several readers: what takes time is as much the system's giving of memory as the disk.
        with ThreadPoolExecutor(self._workers) as readers:
            read = partial(self._store.read, streamed=False)
            return dict(zip(units, readers.map(read, units.values(), buffers), strict=True))

    def _load_beside_rows(self) -> None:
        if not beside_rows(self.graph) or ("embed", -1) in self._resident:
            return
        if isinstance(self._store, MemoryWeights):
            self._beside_rows = self._store.tensors("embed")
            return
        unit = self._store.unit("beside rows")
        arena = Arena(unit.nbytes, self.budget, "resident weights")
        self._pools.append(arena)
        buffer = arena.view(arena.allocate(unit.nbytes), unit.nbytes)
        self._beside_rows = self._store.read(unit, buffer, streamed=False)

    def run_step(self, step: Step, inputs: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Run one step; ``inputs`` has ``input_ids`` and ``position_ids`` ``[seqs, q_len]`` of
        every group. Returns the next token of every sequence, group by group."""
        begin = clock()
        groups = self._states(step, inputs)
        with self._new_step:
            self._step, self._groups = step, groups
            self._shares = group_shares(step, self._workers)
            self._next = torch.zeros(step.seqs, dtype=torch.int64)
            self._asked += 1
            self._new_step.notify_all()
            while self._done < self._asked * self._workers and self._error is None:
                self._new_step.wait()
        if self._error is not None:
            raise self._error
        self.recorder.end_step(clock() - begin)
        return self._next

    def _states(self, step: Step, inputs: Sequence[Mapping[str, Tensor]]) -> list[GroupState]:
        """The groups of a step. Groups that take all layers have the first tokens, so that the
        tokens of any layer are the first ones."""
        states: list[GroupState | None] = [None] * len(step.groups)
        start = 0
        for place in sorted(range(len(states)), key=lambda i: step.groups[i].layers is not None):
            group = step.groups[place]
            goes_on = group.layers is not None and group.layers[0] > 0
            values = self._kept.pop(group.members) if goes_on else dict(inputs[place])
            state = GroupState(group, KvGroup(self.kv, group), start, values)
            states[place] = state
            start += state.tokens
        return [state for state in states if state is not None]

    def leave(self, indices: Sequence[int]) -> None:
        """Forget the states of sequences that have ended."""
        if self.modules is not None:
            self.modules.leave(list(indices))

    def stop(self) -> None:
        """End every engine and give all memory back. Safe to call twice."""
        if self._stopped:
            return
        with self._new_step:
            self._stopped = True
            self._new_step.notify_all()
        self._barrier.abort()
        for ring in self._rings.values():
            ring.abort(RingClosed())
        for thread in self._threads:
            thread.join()
        for ring in self._rings.values():
            ring.close()
        self._groups, self._routing, self._hidden = [], None, None
        self._kept.clear()
        self._held, self._resident, self._beside_rows = {}, {}, []
        for pool in self._pools:
            pool.close()
        self._reader.close()

    def __enter__(self) -> "Runtime":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _thread(self, engine: str) -> threading.Thread:
        worker = DISK_WORKER if engine.startswith("disk") else int(engine.removeprefix("cpu"))
        function = self._functions.get(engine) or self._functions[engine.rstrip("0123456789")]

        def body() -> None:
            torch.set_num_threads(self.program.settings.threads)
            warm_up(self._dtype)
            self._warm.wait()
            try:
                self._await_start()
                with torch.inference_mode():
                    function(self, worker)
            except (RingClosed, threading.BrokenBarrierError):
                pass
            except BaseException as error:
                self._fail(error)

        return threading.Thread(target=body, name=f"dovetail-{engine}", daemon=True)

    def _fail(self, error: BaseException) -> None:
        with self._new_step:
            if self._error is None:
                self._error = error
            self._new_step.notify_all()
        self._barrier.abort()
        for ring in self._rings.values():
            ring.abort(error)

    def _await_start(self) -> None:
        with self._new_step:
            while not (self._ready or self._stopped):
                self._new_step.wait()

    # What emitted code calls.

    def steps(self, worker: int) -> Iterator[None]:
        """One turn per step; disk engines run ahead and are held back by their rings alone."""
        if worker == DISK_WORKER:
            while not self._stopped:
                yield
            return
        seen = 0
        while True:
            with self._new_step:
                while self._asked == seen and not self._stopped:
                    self._new_step.wait()
                if self._stopped:
                    return
            seen += 1
            yield

    def wait_room(self, ring: str, loader: str = "disk0") -> None:
        """Block until the buffer of the loader's next load is free."""
        begin = clock()
        self._rings[ring].acquire(self._next_load(ring, loader))
        self._waited(loader, ring, begin, "room")

    def load(self, ring: str, layer: int, chunk: int, loader: str = "disk0") -> None:
        """Read a unit into its buffer of the ring."""
        begin = clock()
        n = self._next_load(ring, loader)
        buffer = self._rings[ring].acquire(n)
        experts = (
            self.program.settings.chunk_experts(layer, chunk) if ring == "experts" else range(0)
        )
        at, slot = -1 if ring == "head" else layer, n % len(self._held[ring])
        if isinstance(self._store, MemoryWeights):
            self._held[ring][slot] = self._store.tensors(ring, at, experts)
        else:
            unit = self._store.unit(ring, at, experts)
            self._held[ring][slot] = self._store.read(unit, buffer, streamed=True)
        self.recorder.add(loader, "load", ring, layer, begin, clock())

    def signal_ready(self, ring: str, loader: str = "disk0") -> None:
        """Let the workers use the load."""
        self._rings[ring].publish(self._next_load(ring, loader))
        self._loads[loader][ring] += 1

    def _next_load(self, ring: str, loader: str) -> int:
        """The number of the load that the loader signals next."""
        return self._order.number(loader, ring, self._loads[loader][ring])

    def wait_ready(self, worker: int, ring: str) -> None:
        """Block until the next load of the ring is there."""
        begin = clock()
        self._rings[ring].wait(self._waits[worker][ring])
        self._waited(f"cpu{worker}", ring, begin)

    def free(self, worker: int, ring: str) -> None:
        """This worker is done with the load it waited for."""
        self._rings[ring].release(self._waits[worker][ring])
        self._waits[worker][ring] += 1

    def meet(self, worker: int, phase: str) -> None:
        """Wait for all workers; the last one does what the phase calls for."""
        begin = clock()
        first = self._barrier.wait() == 0
        if phase in ("tokens", "hidden"):
            if first and phase == "tokens":
                self._route()
            elif first:
                self._gather_hidden()
            self._barrier.wait()
        self._waited(f"cpu{worker}", phase, begin)

    def signal(self, worker: int, phase: str) -> None:
        """This worker has finished the step."""
        assert phase == "step"
        with self._new_step:
            self._done += 1
            self._new_step.notify_all()

    def run_groups(self, worker: int, function: Any, layer: int, unit: str) -> None:
        """Run a segment on this worker's groups."""
        begin = clock()
        weights = self._weights(worker, unit, "embed" if layer < 0 else "dense", layer)
        for index in self._shares[worker]:
            state = self._groups[index]
            if not state.group.takes(layer):
                continue
            function(self, state, state.values, weights, layer)
        name = function.__name__
        self.recorder.add(f"cpu{worker}", "run", name, layer, begin, clock())

    def run_experts(self, worker: int, function: Any, layer: int, chunk: int) -> None:
        """Run this worker's experts of a chunk over all tokens routed to them."""
        begin = clock()
        routing, tokens = self._routing, self._tokens
        assert routing is not None and tokens is not None
        settings = self.program.settings
        total = tokens.sums[worker]
        unit = "ram" if chunk < 0 else "experts"
        loaded = self._unit(worker, unit, "experts", layer)
        weights = dict(zip(settings.chunk_experts(layer, chunk), loaded, strict=True))
        own = [expert for expert in weights if routing.owner[expert] == worker]
        sizes = settings.buckets if self._dtype.itemsize == 2 else ()
        together = packs(own, routing.offsets, settings.pack, sizes) if settings.pack else None
        for pack in together or [[expert] for expert in own]:
            if len(pack) > 1:
                parts = [weights[expert] for expert in pack]
                run_pack(function, tokens.x, routing, pack, parts, total, sizes, settings.grouped)
            else:
                self._run_expert(function, pack[0], weights[pack[0]], total)
        self.recorder.add(f"cpu{worker}", "run", function.__name__, layer, begin, clock())

    def _run_expert(self, function: Any, expert: int, weights: Tensors, total: Tensor) -> None:
        routing, tokens = self._routing, self._tokens
        assert routing is not None and tokens is not None
        tile = self.program.settings.expert_rows
        first, last = routing.offsets[expert], routing.offsets[expert + 1]
        for start in range(first, last, tile):
            stop = min(start + tile, last)
            rows = routing.rows[start:stop]
            y = function(tokens.select(rows), weights)[: stop - start].to(total.dtype)
            total.index_add_(0, rows, y.mul_(routing.weights[start:stop]))

    def run_head(self, worker: int, function: Any, layer: int, unit: str) -> None:
        """Run the epilogue on this worker's share of the sequences and choose their tokens."""
        begin = clock()
        assert self._hidden is not None
        weights = self._weights(worker, unit, "head", -1)
        seqs = self._hidden.shape[0]
        share = -(-seqs // self._workers)
        tile = self.program.settings.head_rows
        for start in range(worker * share, min(seqs, (worker + 1) * share), tile):
            stop = min(start + tile, seqs, (worker + 1) * share)
            logits = function(self, self._hidden[start:stop], weights)
            self._next[start:stop] = self._choose(logits[:, -1], range(start, stop))
        self.recorder.add(f"cpu{worker}", "run", function.__name__, layer, begin, clock())

    def gather(self, g: GroupState, layer: int, x: Tensor, index: Tensor, weight: Tensor) -> None:
        """Bring a group's tokens (padding left out) to the experts."""
        assert self._tokens is not None
        x, index, weight = (t.reshape(-1, t.shape[-1]) for t in (x, index, weight))
        if g.valid is not None:
            x, index, weight = (t.index_select(0, g.valid) for t in (x, index, weight))
        self._tokens.put(g.start, x, index, weight)
        self._routed_layer = layer

    def scatter(self, g: GroupState) -> Tensor:
        """The experts' output for a group, ``[seqs * q_len, hidden]``; zeros where padded."""
        assert self._tokens is not None
        y = self._tokens.take(g.start, g.tokens, self._dtype)
        if g.valid is None:
            return y
        padded = torch.zeros((g.seqs * g.q_len, y.shape[1]), dtype=y.dtype)
        return padded.index_copy_(0, g.valid, y)

    def embedding(self, weights: Tensors, name: str, ids: Tensor) -> Tensor:
        """Rows of the embedding table, from memory or, if it stays there, from disk."""
        if name in weights:
            return torch.nn.functional.embedding(ids, weights[name])
        unique, places = torch.unique(ids, return_inverse=True)
        with self._row_lock:
            table = self._store.rows(name, unique, self._row_buffer)
        return table.index_select(0, places.view(-1)).view(*ids.shape, -1)

    attention = staticmethod(attention)

    def _route(self) -> None:
        spec = experts_of(self.graph, self._routed_layer)
        assert spec is not None and self._tokens is not None
        takes = [state for state in self._groups if state.group.takes(self._routed_layer)]
        count = sum(state.tokens for state in takes)
        if self.routing_sink is not None:
            groups = [state.group for state in sorted(takes, key=lambda state: state.start)]
            chosen = self._tokens.chosen(count, spec.top_k)
            self.routing_sink.routed(self._asked, self._routed_layer, groups, chosen)
        self._routing = self._tokens.route(count, spec, list(range(spec.count)))

    def _gather_hidden(self) -> None:
        last = len(self.graph.layers) - 1
        ended = [state for state in self._groups if state.group.takes(last)]
        self._hidden = torch.cat([state.last_hidden() for state in ended])
        for state in self._groups:
            if state in ended:
                state.values.clear()
            else:
                self._kept[state.group.members] = state.values

    def _weights(self, worker: int, unit: str, kind: str, layer: int) -> Tensors:
        loaded = self._unit(worker, unit, kind, layer)
        return loaded[0] if loaded else {}

    def _unit(self, worker: int, unit: str, kind: str, layer: int) -> list[Tensors]:
        if unit == "ram":
            return self._resident.get((kind, layer), [])
        if unit in self._rings:
            n = self._waits[worker][unit]
            return self._held[unit][n % len(self._held[unit])]
        return self._beside_rows if kind == "embed" else []

    def _waited(self, engine: str, name: str, begin: float, kind: str = "wait") -> None:
        end = clock()
        if end - begin > WAIT_RECORDED:
            self.recorder.add(engine, kind, name, -1, begin, end)
