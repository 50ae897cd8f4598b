"""GPU batch tables: `setting, a batch -> its rows, roles and units` (tables.py)."""

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import product

import numpy as np

from dovetail.ir.moves import Dispatch
from dovetail.ir.task_graph import ITEMSIZE, Experts
from dovetail.passes.gpu.cost import Shape
from dovetail.passes.gpu.loads import ROUNDING, ROWS, Attention, Loads
from dovetail.passes.gpu.phases import phases
from dovetail.passes.gpu.table_setting import (
    EXPERT_ROWS,
    FILLING,
    FINE,
    GROUPS,
    KIB,
    ON_DISK,
    OUTSIDE,
    PLACES,
    STAGED,
    STEPS,
    UNIT,
    UNUSED,
    Body,
    ExpertWay,
    Setting,
    Sizes,
)
from dovetail.passes.loop.experts import MAX_LOADS
from dovetail.passes.loop.work import TICK, StepWork
from dovetail.passes.memory import activation_bytes
from dovetail.passes.policies.gpu import DEFAULTS
from dovetail.solvers.batch_problem import Batch, Home, Option, Span, Units


class BatchTables:
    """The tables of one batch."""

    def __init__(self, tables: Setting, sizes: Sizes) -> None:
        self._t, self._sizes = tables, sizes
        setting, steps = tables.setting, tables.steps
        longest = setting.workload.longest
        self._kv_tokens = setting.kv_tokens(sizes.seqs)
        self.dispatch = Dispatch(sizes.seqs, self._kv_tokens, sizes.prefill, longest, sizes.refill)
        rows = list(dict.fromkeys(min(int(n), sizes.seqs) for n in steps["rows"]))
        tokens = min(sizes.prefill, max(int(DEFAULTS["attn_tokens"]), longest))
        shares = product(steps["kv_hbm"], steps["attention_cpu"], steps["streams"])
        self.ways = [
            Attention(n, tokens, int(kv), int(cpu), int(streams))
            for (kv, cpu, streams), n in product(shares, rows)
            if int(kv) + int(cpu) <= 100
        ]
        found = product(steps["experts_cpu"], steps["chunk"], steps["slots"])
        streamed = [ExpertWay(int(cpu), int(chunk), int(slots)) for cpu, chunk, slots in found]
        streamed += [self._layers(int(cpu), n) for cpu in steps["experts_cpu"] for n in rows]
        self._actives: dict[tuple[int, int, int], int] = {}
        self.expert_ways = [*streamed, ExpertWay(0, 1, 0)] if tables.experts else streamed[:1]

    def _layers(self, cpu: int, rows: int) -> ExpertWay:
        """Group by group, as runtimes that stream whole layers do."""
        chunk, slots = self._t.layered
        return ExpertWay(cpu, chunk, slots, rows)

    @cached_property
    def works(self) -> dict[StepWork, float]:
        """How many steps do what."""
        known: dict[StepWork, float] = {}
        for phase in phases(self.dispatch, self._t.setting.workload):
            if phase.steps > 0:
                known[phase.work] = known.get(phase.work, 0.0) + phase.steps
        return known

    def batch(self) -> Batch:
        """All tables."""
        rows = len(ROWS)
        each = [
            (work, steps, body) for work, steps in self.works.items() for body in self._t.bodies
        ]
        spans = tuple(
            Span(math.floor(STEPS * steps * body.count), rows * i, rows * (i + 1))
            for i, (_, steps, body) in enumerate(each)
        )
        return Batch(
            fixed=self._fixed(),
            spans=spans,
            start=self._flat("start", self._start),
            roles=(
                tuple(self._attention(way) for way in self.ways),
                tuple(self._experts(way) for way in self.expert_ways),
                *self._others(),
            ),
            units=self._units,
            taken={"hbm": self._token_bytes() // KIB},
        )

    def floor(self) -> int:
        """A bound of this batch: groups as large as may be, buffers and dense layers for nothing,
        and as many experts in hbm and in ram as fit beside KV."""
        widest = max(way.rows for way in self.ways)
        ways = [way for way in self.ways if way.rows == widest]
        attention = np.array([self._flat(way, self._attending(way)) for way in ways])
        hbm = self._t.capacities["hbm"] - self._token_bytes() // KIB
        room = np.array([hbm - self._kv_bytes(way)["hbm"] for way in ways])
        ram = np.array([self._t.capacities["ram"] - self._kv_bytes(way)["ram"] for way in ways])
        fits = (room >= 0) & (ram >= 0)
        if not fits.any():
            return self._fixed()
        attention, room, ram = attention[fits], room[fits], ram[fits]
        start = np.array(self._flat("start", self._start))
        weights = np.array([s.weight for s in self._spans()])
        least = math.inf
        held = self._most_held()
        percents = {(way.cpu, way.rows and widest): way for way in self.expert_ways}
        for (cpu, _), way in percents.items():
            base = self._flat(*self._expert_base(replace(way, rows=way.rows and widest)))
            rows = attention + start + np.array(base)
            if self._t.experts:
                rows = rows + self._outside(cpu, room, ram) - held
            busiest = rows.reshape(len(rows), len(weights), len(ROWS)).max(axis=2)
            least = min(least, float((busiest * weights).sum(axis=1).min()))
        return self._fixed() + math.floor(least * (1 - 1e-9))

    def _spans(self) -> list[Span]:
        rows, found = len(ROWS), []
        for i, (steps, body) in enumerate(product(self.works.values(), self._t.bodies)):
            found.append(Span(math.floor(STEPS * steps * body.count), rows * i, rows * (i + 1)))
        return found

    def _outside(self, cpu: int, room: np.ndarray, ram: np.ndarray) -> np.ndarray:
        """Ticks of copying and reading the experts that hbm, and ram, have no room for."""
        (units,) = self._units
        every, host = self._t.experts, self._on_cpu(cpu)
        in_hbm = np.minimum(room // max(1, units.homes["hbm"].nbytes["hbm"]), every - host)
        in_ram = np.minimum(ram // max(1, units.homes["ram"].nbytes["ram"]), every - in_hbm)
        copied, read = (np.array(units.homes[name].load) for name in ("ram", "disk"))
        # What comes off a row may come off it for every expert.
        outside: np.ndarray = np.outer(every - in_hbm, np.maximum(copied, 0))
        on_disk: np.ndarray = np.outer(every - in_hbm - in_ram, read - copied)
        ticks: np.ndarray = outside + every * np.minimum(copied, 0) + on_disk
        return ticks

    def _most_held(self) -> np.ndarray:
        """The most that buffers can take off a row."""
        most = max(way.slots * way.chunk for way in self.expert_ways)
        chunk = max(way.chunk for way in self.expert_ways)
        gpus = self._t.costs.gpu.count

        def held(work: StepWork, body: Body) -> Loads:
            if body.experts is None:
                return {}
            reads = (most + STAGED * chunk) * self._read(body.experts) * gpus
            return {"refill": most * self._copy(body.experts) * gpus, "relay": reads}

        return np.array(self._flat(("held", most), held)) + 1

    # Ticks of rows.

    def _flat(self, key: Hashable, loads: Callable[[StepWork, Body], Loads]) -> tuple[int, ...]:
        """The loads of all rows of all spans, rounded down, the CPU's beside copies; ``key`` says
        which loads these are, since batches share many."""
        flat: list[int] = []
        for work, body, known in self._known:
            rows = known.get(key)
            if rows is None:
                found = dict(loads(work, body))
                beside = self._t.loads.lost * found.get("h2d", 0.0)
                found["cpu"] = found.get("cpu", 0.0) + beside
                rows = tuple([math.floor(FINE * found.get(row, 0.0)) for row in ROWS])
                known[key] = rows
            flat += rows
        return tuple(flat)

    @cached_property
    def _known(self) -> list[tuple[StepWork, Body, dict[Hashable, tuple[int, ...]]]]:
        """Every span's step and layers, and the loads that are known there."""
        return [
            (work, body, self._t.rows.setdefault((work, body.layer), {}))
            for work, body in product(self.works, self._t.bodies)
        ]

    def _start(self, work: StepWork, body: Body) -> Loads:
        tail = self._t.loads.tail(work, body.layer)
        return {"gpu0": tail, "turn": tail}

    def _attending(self, way: Attention) -> Callable[[StepWork, Body], Loads]:
        return lambda work, body: self._t.loads.attention(work, body.layer, way)

    def _expert_base(self, way: ExpertWay) -> tuple[Hashable, Callable[[StepWork, Body], Loads]]:
        """Experts without their buffers; those of the CPU are not copied, which units count."""
        cpu, groups = way.cpu, (way.rows, self.ways[0].tokens) if way.rows else None

        def loads(work: StepWork, body: Body) -> Loads:
            if body.experts is None:
                return self._t.loads.experts(work, body.layer, cpu, groups)
            found = dict(self._t.loads.experts(work, body.layer, cpu, groups))
            saved = round(body.experts.count * cpu / 100) * self._copy(body.experts)
            found["h2d"] = found.get("h2d", 0.0) - saved
            found["refill"] = found.get("refill", 0.0) - saved * (1 - 1 / MAX_LOADS)
            # Of what is on disk, the CPU's experts may be the first.
            host = round(body.experts.count * cpu / 100) * self._read(body.experts)
            found["relay"] = found.get("relay", 0.0) - host - MAX_LOADS * ROUNDING
            return found

        return (cpu, groups), loads

    def _copy(self, experts: Experts) -> float:
        """Ticks of copying one of a layer's experts, each GPU its share."""
        gpu = self._t.costs.gpu
        return experts.nbytes / gpu.h2d.peak / gpu.count / TICK

    def _read(self, experts: Experts) -> float:
        """Ticks of reading one of a layer's experts from disk, for each GPU its share."""
        costs = self._t.costs
        return experts.nbytes / costs.machine.disk.peak / costs.gpu.count / TICK

    # Roles.

    def _attention(self, way: Attention) -> Option:
        kv = self._kv_bytes(way)
        active = self._active(way.rows, way.tokens, way.streams)
        return Option(
            self._flat(way, self._attending(way)),
            nbytes={
                "hbm": kv["hbm"] + active // KIB,
                GROUPS: int(self._t.steps["rows"][-1]) - way.rows,
                **_in_ram(kv["ram"]),
            },
        )

    def _active(self, rows: int, tokens: int, streams: int) -> int:
        """Bytes of activations on each GPU, wherever attention is."""
        key = rows, tokens, streams
        if key not in self._actives:
            layout = replace(
                self._t.layout,
                dispatch=self.dispatch,
                rows=rows,
                attn_tokens=tokens,
                workers=streams,
                expert_rows=min(EXPERT_ROWS),
            )
            self._actives[key] = math.ceil(activation_bytes(layout) / self._t.costs.gpu.count)
        return self._actives[key]

    def _kv_bytes(self, way: Attention) -> dict[str, int]:
        """KiB of KV, and of two groups' in hbm where some of it is copied."""
        kv = self._kv_tokens * self._t.sizes.kv
        in_hbm = kv * way.kv_hbm / 100 / self._t.costs.gpu.count
        if way.kv_hbm + way.cpu < 100:
            rows = math.ceil(way.rows / self._t.costs.gpu.count)
            group = rows * math.ceil(self._kv_tokens / self._sizes.seqs)
            in_hbm += 2 * group * self._t.sizes.kv_layer
        return {"hbm": int(in_hbm) // KIB, "ram": int(kv * (100 - way.kv_hbm) / 100) // KIB}

    def _experts(self, way: ExpertWay) -> Option:
        key, base = self._expert_base(way)
        most = max(self._t.sizes.expert)

        def loads(work: StepWork, body: Body) -> Loads:
            found = base(work, body)
            if body.experts is not None:
                held = way.slots * way.chunk * self._copy(body.experts) * self._t.costs.gpu.count
                found["refill"] -= held
                staged = (way.slots + STAGED) * way.chunk * self._t.costs.gpu.count
                found["relay"] -= staged * self._read(body.experts)
            return found

        if not self._t.experts:
            return Option(self._flat(key, base))
        if not way.slots:
            return Option(self._flat(key, base), nbytes={OUTSIDE: self._t.experts})
        buffered = way.slots * way.chunk
        rings, left = buffered * most // KIB, FILLING[way.chunk <= 2] * most // KIB
        taken = {"hbm": rings, PLACES: self._on_cpu(way.cpu), UNUSED: -left, GROUPS: way.rows}
        # Of equals, the one with the most buffers: a schedule wants what rows do not show.
        return Option(self._flat((key, way), loads), -buffered * self._tie, nbytes=taken)

    @cached_property
    def _tie(self) -> int:
        """Units of the objective that tell equals apart and matter nowhere else."""
        return self._fixed() // 10**6

    def _on_cpu(self, percent: int) -> int:
        return sum(round(count * percent / 100) for count in self._t.sizes.experts)

    def _others(self) -> Iterator[tuple[Option, ...]]:
        """Dense layers, head and embedding: in hbm, or in ram and copied."""
        sizes, gpu = self._t.sizes, self._t.costs.gpu
        none = self._flat("none", lambda work, body: {})
        dense, head, embed = sum(sizes.dense) // KIB, sizes.head // KIB, sizes.embed // KIB

        def copied(work: StepWork, body: Body) -> Loads:
            return {"h2d": sizes.dense[body.layer] / gpu.h2d.peak / TICK}

        ring = int(DEFAULTS["dense_slots"]) * max(sizes.dense) // KIB
        there = Option(none, nbytes={"hbm": dense})
        yield there, Option(self._flat("dense", copied), nbytes={"hbm": ring, **_in_ram(dense)})
        cost = math.floor(sum(self.works.values()) * sizes.head / gpu.h2d.peak / UNIT)
        yield Option(none, nbytes={"hbm": head}), Option(none, cost, {"hbm": head, **_in_ram(head)})
        yield Option(none, nbytes={"hbm": embed}), Option(none, nbytes=_in_ram(embed))
        # Either nothing is on disk, or ram is full.
        yield Option(none, nbytes={ON_DISK: self._t.experts, UNUSED: -(1 << 40)}), Option(none)

    # What is not chosen.

    @cached_property
    def _units(self) -> tuple[Units, ...]:
        if not self._t.experts:
            return ()
        machine, gpu, size = self._t.costs.machine, self._t.costs.gpu, max(self._t.sizes.expert)
        # Loads are bundled in a body: a bundle in a slot, and those that are staged.
        bundled = (1 + STAGED) / MAX_LOADS
        layers = sum(count > 0 for count in self._t.sizes.experts)

        def copied(work: StepWork, body: Body) -> Loads:
            ticks = self._copy(body.experts) / layers if body.experts else 0.0
            one = self._read(body.experts) / layers if body.experts else 0.0
            return {"h2d": ticks, "refill": ticks * (1 - 1 / MAX_LOADS), "relay": -bundled * one}

        def read(work: StepWork, body: Body) -> Loads:
            one = self._read(body.experts) / layers if body.experts else 0.0
            return copied(work, body) | {"disk": one, "relay": (1 - bundled) * one}

        none = self._flat("none", lambda work, body: {})
        setup = math.floor(size / machine.disk.peak / UNIT)
        homes = {
            "hbm": Home(none, setup, {"hbm": size // gpu.count // KIB, PLACES: 1}),
            "ram": Home(self._flat("copied", copied), setup, {**_in_ram(size // KIB), OUTSIDE: 1}),
            "disk": Home(self._flat("read", read), 0, {OUTSIDE: 1, ON_DISK: 1}),
        }
        return (Units(self._t.experts, homes),)

    def _fixed(self) -> int:
        """Units of the objective that no choice changes: setting up what always stays in memory,
        and the ends of every step."""
        graph, costs = self._t.setting.graph, self._t.costs
        seconds = self._t.always / costs.machine.disk.peak
        for work, steps in self.works.items():
            shape = Shape(max(1, math.ceil(work.seqs / costs.gpu.count)), 1, 0)
            parts = costs.group(graph.epilogue, shape)
            seconds += steps * (parts.before + parts.after + parts.tail)
        return math.floor(seconds / UNIT)

    def _token_bytes(self) -> int:
        graph, gpus = self._t.setting.graph, self._t.costs.gpu.count
        tokens = math.ceil(self.dispatch.step_tokens / gpus)
        return tokens * graph.hidden * 4 * ITEMSIZE[graph.dtype]


def _in_ram(kib: int) -> dict[str, int]:
    return {"ram": kib, UNUSED: -kib - 1}
