"""Policies against what they reduce to: a special case of one is another, exactly where the papers'
schedules are the same, and the quantities that the papers argue with follow closed forms."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir_cases import captured
from tests.test_gpu_choose import DECODE
from tests.test_gpu_choose import MACHINE as GPU_MACHINE
from tests.test_gpu_choose import setting as gpu_setting
from tests.test_policies import LOADS, MACHINE, layout_of, moves_of, setting

from dovetail.ir.batching import Step
from dovetail.ir.errors import VerifyError
from dovetail.ir.machine import Curve
from dovetail.ir.moves import Accumulate, Assign, Dispatch, Reorder
from dovetail.ir.placement import experts_of
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.gpu.cost import GpuCosts, Shape
from dovetail.passes.gpu.memory import tier_bytes, unit_sizes
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.loop.body import TICK, Loop, StepWork, loop_body
from dovetail.passes.loop.builder import Builder
from dovetail.passes.loop.groups import shapes
from dovetail.passes.loop.simulate import pace
from dovetail.passes.policies.common import Knobs, Setting
from dovetail.passes.policies.gpu import DEFAULTS, GPU_POLICIES, LINEARS, linears_share
from dovetail.passes.policies.gpu import moves as gpu_moves
from dovetail.passes.simulate import Simulator, workload_steps
from dovetail.solvers.loop_problem import check_problem

LAYERED: Knobs = {**LOADS, "seqs": 8, "rows": 4, "prefill_tokens": 60}


def steps_of(layout: Layout, where: Setting) -> list[Step]:
    """The steps of the setting's workload."""
    return list(workload_steps(layout, where.workload))


# Layered prefill.


def test_one_group_of_layers_is_plain_prefill() -> None:
    where = setting()
    plain = {**LAYERED, "attn_tokens": where.workload.longest, "workers": 2, "refill": True}
    none = moves_of("layered_prefill", where, {**LAYERED, "layer_groups": 0})
    assert none == moves_of("module_batch", where, plain)
    one = layout_of("layered_prefill", where, {**LAYERED, "layer_groups": 1})
    assert steps_of(one, where) == steps_of(apply_moves(where.graph, none), where)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=10).map(tuple),
    groups=st.integers(2, 4),
    seqs=st.integers(1, 10),
    tokens=st.integers(1, 120),
)
def test_every_prompt_meets_every_layer_once(
    lengths: tuple[int, ...], groups: int, seqs: int, tokens: int
) -> None:
    """The paper's argument: chunks of a prompt load a layer's experts once each, groups of layers
    load them once."""
    where = setting(lengths=lengths)
    tokens = max(tokens, where.workload.longest)
    knobs = {**LAYERED, "seqs": seqs, "prefill_tokens": tokens, "layer_groups": groups}
    layout = layout_of("layered_prefill", where, knobs)
    layers = len(where.graph.layers)
    met: dict[int, list[int]] = {index: [] for index in range(len(lengths))}
    made = dict.fromkeys(met, 0)
    for step in steps_of(layout, where):
        for group in step.groups:
            for row, member in enumerate(group.members):
                if group.prefill:
                    assert member.held == 0
                    met[member.index] += [i for i in range(layers) if group.takes(i)]
                    through = group.takes(layers - 1)
                    assert (row in group.receivers) is through
                made[member.index] += row in group.receivers
    assert all(found == list(range(layers)) for found in met.values())
    assert set(made.values()) == {where.workload.new_tokens}
    piece = max(1, where.workload.longest // 3)
    chunked = layout_of("chunked_prefill", where, {**LAYERED, "seqs": seqs, "chunk_tokens": piece})
    assert layer_passes(chunked, where) == sum(-(-n // piece) for n in lengths) * layers
    assert layer_passes(layout, where) == len(lengths) * layers


def layer_passes(layout: Layout, where: Setting) -> int:
    """How often layers meet a prompt or a piece of one."""
    layers = range(len(where.graph.layers))
    return sum(
        sum(group.takes(layer) for layer in layers) * len(group.members)
        for step in steps_of(layout, where)
        for group in step.groups
        if group.prefill
    )


def test_groups_of_layers_shorten_the_longest_step_beside_decode() -> None:
    where = setting(lengths=(60,) * 8)
    seconds: dict[int, float] = {}
    for groups in (0, 2, 4):
        knobs = {**LAYERED, "seqs": 5, "rows": 1, "layer_groups": groups}
        layout = layout_of("layered_prefill", where, knobs)
        simulator = Simulator(layout, MACHINE, Costs(MACHINE))
        mixed = [
            step
            for step in steps_of(layout, where)
            if len({group.prefill for group in step.groups}) == 2
        ]
        assert mixed and all((groups > 1) == any(g.layers for g in s.groups) for s in mixed)
        seconds[groups] = max(simulator.step_seconds(step)[0] for step in mixed)
    assert seconds[4] < seconds[2] < seconds[0]


def test_groups_of_layers_refuse_what_they_cannot_be() -> None:
    graph = captured("olmoe")
    moves = moves_of("layered_prefill", setting(), {**LAYERED, "layer_groups": 2})
    dispatch = next(m for m in moves if isinstance(m, Dispatch))
    others = [m for m in moves if m is not dispatch]
    with pytest.raises(VerifyError, match=r"layer_groups must be from 0 to .* found 99"):
        apply_moves(graph, [replace(dispatch, layer_groups=99), *others])
    with pytest.raises(VerifyError, match="layer_groups=2 with chunk_tokens=8"):
        apply_moves(graph, [replace(dispatch, chunk_tokens=8), *others])


# Machines with a GPU.

ROWS: Knobs = {"seqs": 6, "rows": 2, "kv_hbm": 0}
LINK = Curve((1.0,), (4e9,))
# A link whose rate does not depend on the block.
assert GPU_MACHINE.accelerator is not None
EVEN = replace(GPU_MACHINE, accelerator=replace(GPU_MACHINE.accelerator, h2d=LINK, d2h=LINK))


def gpu_layout(knobs: Knobs, share: float = 0.3, family: str = "olmoe") -> Layout:
    """The layout of these knobs with hbm of ``share`` of the weights."""
    found = gpu_moves(gpu_setting(family, share), {**DEFAULTS, **knobs})
    assert found is not None
    return apply_moves(captured(family), found)


def gpu_loop(knobs: Knobs, share: float = 0.3, work: StepWork = DECODE) -> Loop:
    """The loop body of the first layer."""
    return loop_body(gpu_layout(knobs, share), GpuCosts(EVEN, "float32"), work, 0)


def test_one_nano_batch_is_serial() -> None:
    """With one group there is nothing to run beside its attention, whatever the streams."""
    loop = gpu_loop({"seqs": 6, "rows": 6, "kv_hbm": 100, "streams": 2}, share=4.0)
    total = sum(op.duration for op in loop.problem.ops) * TICK
    assert {op.engine for op in loop.problem.ops} == {"gpu0", "gpu1"}
    assert pace(loop).period == pytest.approx(total, rel=1e-3)
    two = gpu_loop({"seqs": 6, "rows": 3, "kv_hbm": 100, "streams": 2}, share=4.0)
    busiest = max(two.loads().values())
    assert busiest <= pace(two).period < sum(two.loads().values())


def test_nothing_on_the_cpu_is_streaming() -> None:
    fixed = GPU_POLICIES["weight_stream"].fixed
    streamed = {**DEFAULTS, **fixed, "seqs": 4}
    where = gpu_setting("olmoe", 0.3)
    none = {"linears_cpu": 0, "experts_cpu": 0, "by_load": False}
    assert gpu_moves(where, {**streamed, **none}) == gpu_moves(where, streamed)


@pytest.mark.parametrize("share", [10, 50, 90])
def test_the_cpus_share_of_linears_is_not_copied(share: int) -> None:
    """HeteGen: α of what was copied is computed on the CPU, the rest crosses the link."""
    knobs = {**ROWS, "kv_hbm": 100, "resident": 0}
    plain, split = gpu_loop(knobs), gpu_loop({**knobs, "linears_cpu": share})

    def weights(loop: Loop) -> int:
        return sum(
            op.duration for op in loop.problem.ops if loop.classes[op.name].startswith("copy:")
            and op.engine == "h2d" and loop.classes[op.name] != "copy:hidden"
        )  # fmt: skip

    assert "cpu" not in plain.loads()
    assert weights(split) == pytest.approx(weights(plain) * (1 - share / 100), abs=12)
    half = gpu_loop({**knobs, "linears_cpu": 50}).loads()["cpu"]
    assert split.loads()["cpu"] == pytest.approx(half * share / 50, abs=3 * TICK)


def test_the_planned_share_is_that_of_a_sweep() -> None:
    """The share that balances the rates is next to the one whose steps are shortest."""
    where = gpu_setting("olmoe", 0.3)
    planned = linears_share(where, 6)
    work = StepWork(Shape(6, 1, 1), None)
    knobs = {"seqs": 6, "rows": 6, "kv_hbm": 100, "resident": 0, "slots": 16}
    periods = {p: pace(gpu_loop({**knobs, "linears_cpu": p}, work=work)).period for p in LINEARS}
    assert periods[planned] <= 1.1 * min(periods.values()), (planned, periods)


def test_experts_dealt_by_load_take_no_longer_than_fixed_shares_of_them() -> None:
    costs = GpuCosts(GPU_MACHINE, "float32")
    experts = experts_of(captured("olmoe"), 0)
    assert experts is not None
    one = experts.nbytes / costs.gpu.h2d.at(experts.nbytes)
    deals = {most: costs.dealt(0, experts, (), 6, most) for most in range(experts.count + 1)}
    free = deals[experts.count]
    seconds = {most: max(d.host, d.copies * one + d.copied) for most, d in deals.items()}
    assert free.host > 0 and seconds[experts.count] <= min(seconds.values()) * 1.05
    assert deals[0].host == 0 and deals[0].copies == pytest.approx(
        deals[experts.count].copies + deals[experts.count].host_rows / 1, abs=experts.count
    )
    held = costs.dealt(0, experts, tuple(range(experts.count)), 6, experts.count)
    assert held.copies == held.host == 0


def test_a_barrier_ends_every_group_before_the_next() -> None:
    """FlexGen: a layer takes, for each batch, the longest of what its attention's stage does, and
    then the same of its experts' stages; the layer's experts come beside the first attention, the
    next layer's other weights beside the first experts, each batch's KV beside the attention before
    (the first one's beside the last experts)."""
    knobs = {**ROWS, "accumulate": False, "layers": 2, "barrier": True, "resident": 0}
    loop = gpu_loop(knobs, work=StepWork(Shape(6, 1, 200), None))
    seconds = {op.name: op.duration * TICK for op in loop.problem.ops}
    first, second, third = [n.removeprefix("kv_in_") for n in seconds if n.startswith("kv_in_")]
    experts = sum(t for name, t in seconds.items() if name.startswith("copy_experts"))
    stages = (
        (f"attention_{first}", experts + seconds[f"kv_in_{second}"], 0.0),
        (f"attention_{second}", seconds[f"kv_in_{third}"], seconds[f"kv_out_{first}"]),
        (f"attention_{third}", 0.0, seconds[f"kv_out_{second}"]),
        ("experts_group0", seconds["copy_dense"], seconds[f"kv_out_{third}"]),
        ("experts_group1", 0.0, 0.0),
        ("experts_group2", seconds[f"kv_in_{first}"], 0.0),
    )
    total = sum(max(seconds[name], up, down) for name, up, down in stages)
    assert pace(loop).period == pytest.approx(total, rel=1e-3)
    check_problem(loop.problem)


def test_a_barrier_with_one_batch_has_two_stages() -> None:
    knobs = {"seqs": 6, "rows": 6, "kv_hbm": 0, "accumulate": False, "layers": 2, "resident": 0}
    loop = gpu_loop({**knobs, "barrier": True})
    seconds = {op.name: op.duration * TICK for op in loop.problem.ops}
    (group,) = [n.removeprefix("kv_in_") for n in seconds if n.startswith("kv_in_")]
    up = {name: t for name, t in seconds.items() if name.startswith("copy_")}
    dense = up.pop("copy_dense") + seconds[f"kv_in_{group}"]
    products = sum(t for name, t in seconds.items() if name.startswith(("gemm", "experts_hbm")))
    attention = max(seconds[f"attention_{group}"], sum(up.values()))
    total = attention + max(products, dense, seconds[f"kv_out_{group}"])
    assert pace(loop).period == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("gpus", [1, 2, 3])
def test_a_groups_sequences_are_dealt_out_to_the_gpus(gpus: int) -> None:
    """``rows`` are those of a group on all GPUs together: so many groups follow each other, and a
    GPU computes, holds and copies its share of each."""
    assert EVEN.accelerator is not None
    machine = replace(EVEN, accelerator=replace(EVEN.accelerator, count=gpus))
    costs = GpuCosts(machine, "float32")
    layout = gpu_layout({"seqs": 12, "rows": 6, "kv_hbm": 0, "chunk": 1}, share=0.3)
    work = StepWork(Shape(12, 1, 30), None)
    whole, fine = (loop_body(layout, costs, work, 0, fine=each) for each in (False, True))
    assert pace(whole).period == pytest.approx(pace(fine).period, rel=1e-3)
    body = layout.graph.body(0)
    one = costs.group(body, Shape(6 // gpus, 1, 30))
    groups = [op for op in fine.problem.ops if op.name.startswith("attention_")]
    assert len(groups) == 2
    for op in groups:
        assert op.duration * TICK == pytest.approx(one.before + one.attention + one.after, abs=TICK)
    assert body.kv is not None
    sizes = [n for name, n in fine.sizes.items() if name.startswith("kv_in")]
    assert sizes == [pytest.approx(body.kv.bytes_per_token * 30 * 6 / gpus)] * 2
    tokens = layout.dispatch.kv_tokens / layout.dispatch.seqs
    staged = 2 * (6 / gpus) * tokens * unit_sizes(layout.graph).kv_layer
    assert tier_bytes(layout, gpus)["hbm"]["kv"] == pytest.approx(staged, rel=0.05)


def test_a_barrier_refuses_what_it_cannot_order() -> None:
    moves = gpu_moves(gpu_setting("olmoe", 0.3), {**DEFAULTS, **ROWS, "accumulate": False})
    assert moves is not None
    barrier = Reorder("experts", "barrier")
    with pytest.raises(VerifyError, match="with experts or linears on the cpu"):
        apply_moves(captured("olmoe"), [*moves, barrier, Assign("linears", "cpu", 50)])
    with pytest.raises(VerifyError, match="no experts to run over all groups at once"):
        apply_moves(captured("olmoe"), [*moves, barrier, Accumulate("experts", "tokens")])
    with pytest.raises(VerifyError, match="only experts have loads"):
        apply_moves(captured("olmoe"), [*moves, Assign("linears", "cpu", 50, "load")])


def test_layered_steps_of_a_gpu_blend_mixed_and_decode_steps() -> None:
    layout = gpu_layout({"seqs": 6, "rows": 6, "kv_hbm": 100, "refill": True}, share=4.0)
    predictor = GpuPredictor(layout, GpuCosts(GPU_MACHINE, "float32"))
    decode, prompt = Shape(4, 1, 20), Shape(2, 24, 0)
    mixed, plain = (predictor.step(StepWork(decode, p))[0] for p in (prompt, None))
    for groups in (2, 4):
        layered = predictor.step(StepWork(decode, prompt, groups))[0]
        assert layered == pytest.approx(mixed / groups + plain * (1 - 1 / groups))


def test_no_sequence_is_lost_between_places_of_its_attention() -> None:
    for seqs in (1, 2, 3, 5):
        layout = gpu_layout({"seqs": 6, "rows": 6, "kv_hbm": 40, "attention_cpu": 40})
        b = Builder(layout, GpuCosts(EVEN, "float32"), StepWork(Shape(seqs, 1, 9), None), 0)
        assert sum(shape.seqs for _, shape in shapes(b)) == seqs
