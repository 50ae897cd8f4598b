"""Policies against what they reduce to: a special case of one is another, exactly where the papers'
schedules are the same, and the quantities that the papers argue with follow closed forms."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir_cases import captured
from tests.test_policies import LOADS, MACHINE, layout_of, moves_of, setting

from dovetail.ir.batching import Step
from dovetail.ir.errors import VerifyError
from dovetail.ir.moves import Dispatch
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.policies.common import Knobs, Setting
from dovetail.passes.simulate import Simulator, workload_steps

LAYERED: Knobs = {**LOADS, "seqs": 8, "rows": 4, "prefill_tokens": 60}


def steps_of(layout: Layout, where: Setting) -> list[Step]:
    """The steps of the setting's workload."""
    return list(workload_steps(layout, where.workload))


# Layered prefill.


def test_one_group_of_layers_is_plain_prefill() -> None:
    where = setting()
    plain = {**LAYERED, "attn_tokens": where.workload.longest, "workers": 2, "refill": True}
    one = moves_of("layered_prefill", where, {**LAYERED, "layer_groups": 1})
    assert one == moves_of("module_batch", where, plain)


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
    for groups in (1, 2, 4):
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
    assert seconds[4] < seconds[2] < seconds[1]


def test_groups_of_layers_refuse_what_they_cannot_be() -> None:
    graph = captured("olmoe")
    moves = moves_of("layered_prefill", setting(), {**LAYERED, "layer_groups": 2})
    dispatch = next(m for m in moves if isinstance(m, Dispatch))
    others = [m for m in moves if m is not dispatch]
    with pytest.raises(VerifyError, match=r"layer_groups must be from 1 to .* found 99"):
        apply_moves(graph, [replace(dispatch, layer_groups=99), *others])
    with pytest.raises(VerifyError, match="layer_groups=2 with chunk_tokens=8"):
        apply_moves(graph, [replace(dispatch, chunk_tokens=8), *others])
