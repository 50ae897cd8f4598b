"""Buffers of a GPU plan: `plan -> an offset for every buffer of some layers in steady state`.

Weights on their way, KV that is copied for a step, and what is read into ram on the way each hold a
buffer from one operation to another. Rings set aside as many of one kind as are ever alive; laid
out together, buffers of one kind take the room that those of another leave.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from dovetail.ir.plan import Certificate, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.memory import tier_bytes, unit_sizes
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.loop.body import TICK, Loop, StepWork
from dovetail.passes.loop.simulate import held
from dovetail.solvers import buffer_offsets
from dovetail.solvers.buffer_offsets import Buffer

ALIGN = 1 << 12
"""Bytes of whose multiples every offset is one: direct reads and copies want pages."""
WARM, LAYERS, MOST = 6, 6, 120
"""Layers before those that are laid out, how many these are, and most buffers of them."""
WORK = 0.2
"""Deterministic work of the solver for a tier; about as many seconds."""
TIERS: Mapping[str, tuple[str, ...]] = {"hbm": ("dense", "experts", "kv"), "ram": ("staging",)}
"""The pools of a loop body, by the tier that their buffers are in."""


@dataclass(frozen=True, slots=True)
class Pools:
    """Buffers of a tier with their lives in ticks, how many bytes its rings set aside, and over how
    many layers of what kind of step."""

    buffers: tuple[Buffer, ...]
    reserved: int
    layers: int
    kind: str


def with_offsets(plan: Plan, graph: TaskGraph) -> Plan:
    """The plan with its buffers' offsets, and what is proved of each tier's peak."""
    offsets: dict[str, int] = {}
    certificates = list(plan.certificates)
    for tier, pools in buffers_of(graph, plan).items():
        solved = buffer_offsets.solve(pools.buffers, work=WORK)
        offsets |= {f"{tier}: {name}": offset for name, offset in solved.value.items()}
        certificates.append(
            Certificate(
                name=f"buffers in {tier}: peak of {pools.layers} layers of a {pools.kind} step",
                objective=solved.objective,
                bound=solved.bound or 0.0,
                status="optimal" if solved.status == "optimal" else "feasible",
                unit="bytes",
            )
        )
    return replace(plan, certificates=tuple(certificates), offsets=offsets)


def check_offsets(plan: Plan, graph: TaskGraph) -> list[str]:
    """What is wrong with a plan's offsets, in words, without a solver; empty if nothing is."""
    wrong: list[str] = []
    for tier, pools in buffers_of(graph, plan).items():
        head = f"{tier}: "
        mine = {n.removeprefix(head): v for n, v in plan.offsets.items() if n.startswith(head)}
        wrong += buffer_offsets.check(pools.buffers, mine)
    return wrong


def buffers_of(graph: TaskGraph, plan: Plan) -> dict[str, Pools]:
    """The buffers of every tier that has any, in the step that takes most of the time."""
    layout = apply_moves(graph, plan.moves)
    costs = GpuCosts(plan.machine, graph.dtype, plan.workload.routing)
    predictor = GpuPredictor(layout, costs)
    work, layer = heaviest(predictor, plan.workload)
    loop = predictor.loop(work, layer)
    sizes = pool_sizes(predictor, loop)
    count = min(LAYERS, max(2, MOST // max(1, len(loop.problem.holds))))
    found: dict[str, Pools] = {}
    for tier, pools in TIERS.items():
        buffers = [
            buffer
            for iteration in range(WARM, WARM + count)
            for pool, spans in held(loop, 2 * WARM + count, iteration).items()
            if pool in pools and pool in sizes
            for buffer in _buffers(pool, sizes[pool][1], spans, iteration - WARM)
        ]
        if buffers:
            reserved = sum(n * size for pool, (n, size) in sizes.items() if pool in pools)
            found[tier] = Pools(tuple(buffers), reserved, count, work.kind)
    return found


def _buffers(pool: str, size: int, spans: list[tuple[float, float]], layer: int) -> list[Buffer]:
    size = -(-size // ALIGN) * ALIGN
    return [
        Buffer(
            f"{pool} {number} of layer {layer}",
            size,
            round(start / TICK),
            max(round(end / TICK), round(start / TICK) + 1),
            ALIGN,
        )
        for number, (start, end) in enumerate(spans)
    ]


def heaviest(predictor: GpuPredictor, workload: Workload) -> tuple[StepWork, int]:
    """The step that takes most of a workload's time, and a layer like most."""
    phase = max(predictor.phases(workload), key=lambda p: p.steps * predictor.step(p.work)[0])
    return phase.work, max(predictor.kinds, key=lambda kind: kind[1])[0]


def pool_sizes(predictor: GpuPredictor, loop: Loop) -> dict[str, tuple[int, int]]:
    """Buffers of every pool in hbm and ram, and the bytes of one."""
    layout, sizes = predictor.layout, unit_sizes(predictor.layout.graph)
    device, pools = layout.device, loop.problem.pools
    assert device is not None
    used = tier_bytes(layout, predictor.costs.gpu.count)
    sent = 1 - device.linears_cpu / 100
    ring = layout.prefetch["experts"].slots * layout.chunk * max(sizes.expert, default=0)
    rows = -(-layout.rows // predictor.costs.gpu.count)
    group = rows * -(-layout.dispatch.kv_tokens // layout.dispatch.seqs)
    per_token = max((b.kv.bytes_per_token for b in layout.graph.bodies if b.kv), default=0)
    found = {
        "dense": max(sizes.dense, default=0) * sent,
        "experts": ring * sent / max(1, pools.get("experts", 1)),
        "staging": used["ram"]["staging"] / 2,
        "kv": 2 * group * per_token / max(1, pools.get("kv", 1)),
    }
    return {pool: (pools[pool], round(found[pool])) for pool in pools if found.get(pool)}
