"""GPU settings: `layout, costs, workload -> what a GPU executor needs beside its programs`.

Experts that no placement names are in hbm, ram and on disk in their order; of those that the CPU
computes, what ram holds comes first, as in the prediction (passes/loop/experts).
"""

from dataclasses import replace

from dovetail.ir.errors import VerifyError
from dovetail.ir.gpu_settings import Dealing, GpuGroup, GpuSettings, LayerExperts
from dovetail.ir.moves import Tier
from dovetail.ir.placement import experts_of
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout
from dovetail.passes.gpu.cost import GpuCosts, Shape
from dovetail.passes.gpu.lower import kv_slot_tokens
from dovetail.passes.gpu.memory import kv_wall
from dovetail.passes.loop.work import StepGroup, StepWork

ROWS = 64
"""Tokens at which the CPU's time for one more is taken."""


def gpu_settings(layout: Layout, costs: GpuCosts, workload: Workload) -> GpuSettings:
    """The settings of a layout. Raises VerifyError for what no executor does."""
    device = layout.device
    assert device is not None
    _check(layout, costs)
    layers = range(len(layout.graph.layers))
    longest = workload.longest + workload.new_tokens - 1
    dense: list[Tier] = [_tier(device.dense[i], layout.dense_resident[i]) for i in layers]
    admission = replace(layout.admission, wall=_wall(layout, longest))
    settled = layout.settings
    return GpuSettings(
        admission=admission,
        embed=_tier(device.embed, layout.embed_resident),
        head=_tier(device.head, layout.head_resident),
        dense=tuple(dense),
        experts=tuple(_experts(layout, costs, i) for i in layers),
        dealing=tuple(_dealing(layout, costs, i) for i in layers),
        attention_cpu=round(100 * device.attention_cpu / max(1, 100 - device.kv_percent)),
        kv_slot_tokens=kv_slot_tokens(layout, longest),
        accumulated=layout.accumulated,
        expert_rows=settled.expert_rows,
        head_rows=settled.head_rows,
        step_tokens=settled.step_tokens,
        block=settled.block,
        buckets=layout.buckets,
    )


def step_work(groups: tuple[GpuGroup, ...]) -> StepWork:
    """The work of a step that is to run."""
    return StepWork.of(
        tuple(
            StepGroup(
                each.kind,
                Shape(len(each.group.members), each.group.q_len, each.group.past),
                each.group.layers,
            )
            for each in groups
        )
    )


def _check(layout: Layout, costs: GpuCosts) -> None:
    device = layout.device
    assert device is not None
    if costs.gpu.count > 1:
        raise VerifyError(
            f"the plan is for {costs.gpu.count} GPUs, and the executor runs on one: plan for a "
            "machine with one GPU"
        )
    if device.linears_cpu:
        raise VerifyError(
            f"the plan has the CPU compute {device.linears_cpu} % of the columns of what is "
            "copied, which is planned and simulated only: plan again with linears_cpu=0"
        )
    if any(body.states for body in layout.graph.bodies):
        raise VerifyError(
            "the model has modules that run whole and keep a state, which the GPU executor does "
            "not do: run it on this machine's processor"
        )


def _tier(hbm: bool, ram: bool) -> Tier:
    return "hbm" if hbm else "ram" if ram else "disk"


def _wall(layout: Layout, longest: int) -> int:
    """Where KV goes on in ram: one of both sides holds the longest sequence."""
    assert layout.device is not None
    tokens = layout.dispatch.kv_tokens
    wall = kv_wall(layout.dispatch, layout.device)
    return wall if max(wall, tokens - wall) >= longest else max(0, tokens - longest)


def _experts(layout: Layout, costs: GpuCosts, layer: int) -> LayerExperts | None:
    spec, device = experts_of(layout.graph, layer), layout.device
    assert device is not None
    if spec is None:
        return None
    cpu = 0 if device.by_load else round(spec.count * device.experts_cpu / 100)
    every = range(spec.count)
    hbm = (device.which[layer] or tuple(every))[: min(device.experts[layer], spec.count - cpu)]
    named = layout.ram_which[layer] or tuple(e for e in every if e not in hbm)
    ram = tuple(e for e in named if e not in hbm)[: layout.experts_resident[layer]]
    disk = tuple(e for e in every if e not in hbm and e not in ram)
    shares = costs.loads.shares(layer, spec)
    least = [*sorted(ram, key=lambda e: shares[e]), *sorted(disk, key=lambda e: shares[e])]
    return LayerExperts(hbm, ram, disk, tuple(least[:cpu]))


def _dealing(layout: Layout, costs: GpuCosts, layer: int) -> Dealing | None:
    spec, device = experts_of(layout.graph, layer), layout.device
    assert device is not None
    if spec is None or not device.by_load:
        return None
    one = costs.host_experts(spec, 1.0, 1.0)
    per_row = max(0.0, costs.host_experts(spec, 1.0, float(ROWS)) - one) / (ROWS - 1)
    return Dealing(
        most=round(spec.count * device.experts_cpu / 100),
        copy=spec.nbytes / costs.gpu.h2d.at(spec.nbytes),
        base=max(0.0, one - per_row),
        per_row=per_row,
        reads=layout.chunk,
    )
