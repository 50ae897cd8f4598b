"""Policies against what their papers say: special cases are other policies, times follow closed
forms, and all of them are legal, within budget and above the bound."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.ir_cases import captured, flat, program_of

from dovetail.ir.batching import Step
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.moves import Dispatch, Move
from dovetail.ir.placement import expert_bytes, experts_of
from dovetail.ir.program import Load
from dovetail.ir.verify import verify_program
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.bound import bound, bound_of_steps
from dovetail.passes.cost import Costs
from dovetail.passes.lower import lower
from dovetail.passes.memory import ram_bytes, resident_bytes
from dovetail.passes.policies import POLICIES
from dovetail.passes.policies.common import Knobs, Setting
from dovetail.passes.simulate import Simulator, decode_step, workload_steps

RATE = Curve((1.0, 64.0, 1024.0), (1e9, 2e10, 5e10))
# A single read of a tiny model's load is slow, the disk as a whole is not.
DISK = Curve((1e6, 1e9), (1e8, 8e8))
MACHINE = Machine(
    name="paper",
    tiers={"ram": 1 << 30},
    workers=2,
    gemm={"float32": RATE},
    attention={"float32": RATE},
    kv_bandwidth={"float32": Curve((1.0,), (1e10,))},
    memory_bandwidth=1e10,
    op_seconds=2e-6,
    disk=DISK,
    slowdown={},
)
LENGTHS = (60, 44, 31, 31, 20, 9, 3, 1)
AMPLE = 1 << 30
LOADS: Knobs = {"chunk": 2, "slots": 3, "expert_rows": 64, "embed": False}


def setting(
    family: str = "olmoe", lengths: tuple[int, ...] = LENGTHS, budget: int = AMPLE
) -> Setting:
    return Setting(captured(family), MACHINE, budget, Workload.of(lengths, 6))


def moves_of(policy: str, where: Setting, knobs: Knobs) -> tuple[Move, ...]:
    moves = POLICIES[policy].moves(where, knobs)
    assert moves is not None
    return moves


def layout_of(policy: str, where: Setting, knobs: Knobs) -> Layout:
    return apply_moves(where.graph, moves_of(policy, where, knobs))


def decode_seconds(layout: Layout, machine: Machine = MACHINE, seqs: int = 8) -> float:
    """Seconds of a step in which ``seqs`` sequences of 32 tokens decode."""
    step = decode_step(seqs, layout.admission.rows, 32)
    return Simulator(layout, machine, Costs(machine)).step_seconds(step)[0]


# Every policy, with the knobs that its search need not reach here.
VARIANTS: dict[str, tuple[str, Knobs]] = {
    "pieces of a token": ("chunked_prefill", {**LOADS, "seqs": 4, "rows": 2, "chunk_tokens": 1}),
    "pieces of 16": ("chunked_prefill", {**LOADS, "seqs": 8, "rows": 3, "chunk_tokens": 16}),
    "two windows": ("weight_stream", {"seqs": 8, "chunk": 8, "window": 4, "loaders": 2}),
    "parallel loaders": ("weight_stream", {"seqs": 3, "chunk": 1, "window": 5, "loaders": 4}),
    "balanced locks": ("weight_stream", {"seqs": 8, "chunk": 2, "window": 2, "locked": 50}),
    "first layers locked": (
        "weight_stream",
        {"seqs": 8, "chunk": 2, "window": 2, "locked": 50, "balanced": False},
    ),
    "a block of batches": ("zigzag", {**LOADS, "seqs": 8, "batches": 4, "percent": 50}),
    "a block of one batch": ("zigzag", {**LOADS, "seqs": 5, "batches": 1, "percent": 0}),
}


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_are_legal_within_budget_and_above_their_bound(variant: str, family: str) -> None:
    policy, knobs = VARIANTS[variant]
    where = setting(family)
    layout = layout_of(policy, where, knobs)
    budget = sum(ram_bytes(layout).values())
    # As much memory as the schedule asks for when there is plenty is what it is given here.
    tight = replace(where, budget=budget)
    assert moves_of(policy, tight, knobs) == moves_of(policy, where, knobs)
    verify_program(lower(layout, {"ram": budget}), where.graph, steps=3)
    predicted = Simulator(layout, MACHINE, Costs(MACHINE)).predict(where.workload)
    assert predicted.peak_bytes <= budget
    assert predicted.tokens == where.workload.prompts * where.workload.new_tokens
    least = bound(where.graph, MACHINE, budget, where.workload)
    assert predicted.seconds >= least.seconds
    steps = list(workload_steps(layout, where.workload))
    assert bound_of_steps(where.graph, MACHINE, budget, steps) == least


# Chunked prefill (Sarathi-Serve).

PIECES: Knobs = {**LOADS, "seqs": 8, "rows": 4}


def test_chunked_prefill_with_one_piece_is_plain_prefill() -> None:
    where = setting()
    longest = where.workload.longest
    plain = {"attn_tokens": longest, "prefill_tokens": 2 * longest, "workers": 2, "refill": True}
    one = moves_of("chunked_prefill", where, {**PIECES, "chunk_tokens": longest})
    assert one == moves_of("module_batch", where, {**PIECES, **plain})
    # A longer piece changes nothing: the steps are those of whole prompts.
    whole = apply_moves(where.graph, one)
    dispatch = replace(whole.dispatch, chunk_tokens=longest + 1)
    steps = [list(workload_steps(lay, where.workload)) for lay in (
        whole, replace(whole, dispatch=dispatch))]  # fmt: skip
    assert steps[0] == steps[1]


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=10).map(tuple),
    piece=st.integers(1, 60),
    seqs=st.integers(1, 10),
)
def test_pieces_take_every_prompt_token_once(
    lengths: tuple[int, ...], piece: int, seqs: int
) -> None:
    where = setting(lengths=lengths)
    knobs = {**PIECES, "seqs": seqs, "chunk_tokens": piece}
    layout = layout_of("chunked_prefill", where, knobs)
    taken: dict[int, int] = {}
    for step in workload_steps(layout, where.workload):
        for group in (g for g in step.groups if g.prefill):
            for member, length in zip(group.members, group.lengths, strict=True):
                assert member.held == taken.get(member.index, 0) and length <= piece
                taken[member.index] = member.held + length
        assert sum(sum(g.lengths) for g in step.groups) <= layout.dispatch.step_tokens
    assert [taken[i] for i in range(len(lengths))] == where.workload.each()


def test_pieces_bound_the_longest_step_and_its_memory() -> None:
    """No step takes much longer than its token budget allows, however long the prompts are; with
    whole prompts the longest one sets both."""
    seconds: dict[int, list[float]] = {}
    memory: dict[int, list[int]] = {}
    for longest in (200, 400):
        where = setting(lengths=(longest,) * 4 + (20,) * 8)
        for piece in (32, longest):
            layout = layout_of("chunked_prefill", where, {**PIECES, "chunk_tokens": piece})
            simulator = Simulator(layout, MACHINE, Costs(MACHINE))
            steps = list(workload_steps(layout, where.workload))
            key = min(piece, 33)
            seconds.setdefault(key, []).append(max(_cpu_seconds(simulator, s) for s in steps))
            parts = ram_bytes(layout)
            memory.setdefault(key, []).append(parts["activations"] + parts["tokens"])
    assert seconds[32][1] < 1.3 * seconds[32][0] and seconds[33][1] > 1.8 * seconds[33][0]
    assert memory[32][1] < 1.3 * memory[32][0] and memory[33][1] > 1.8 * memory[33][0]


def _cpu_seconds(simulator: Simulator, step: Step) -> float:
    """Seconds that the compute workers are busy in a step."""
    classes = simulator.step_seconds(step)[1]
    return sum(value for name, value in classes.items() if name.startswith("run:"))


def test_attention_over_pieces_costs_what_it_costs_over_the_whole() -> None:
    flat_rate = {"float32": Curve((1.0,), (1e9,))}
    never = {"float32": Curve((1.0,), (1e30,))}
    machine = replace(
        MACHINE,
        gemm=never,
        attention=flat_rate,
        kv_bandwidth=never,
        memory_bandwidth=1e30,
        op_seconds=0.0,
    )
    where = replace(setting(lengths=(512,)), machine=machine)
    found = []
    for piece in (64, 128, 512):
        layout = layout_of("chunked_prefill", where, {**PIECES, "chunk_tokens": piece})
        simulator = Simulator(layout, machine, Costs(machine))
        steps = workload_steps(layout, where.workload)
        found.append(sum(_cpu_seconds(simulator, s) for s in steps if s.groups[0].prefill))
    assert found[0] == pytest.approx(found[2]) and found[1] == pytest.approx(found[2])


# Weight streaming (Superpipeline, Hermes, FlexInfer).


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_loads_are_dealt_in_turn(family: str, readers: int) -> None:
    graph = captured(family)
    alone, dealt = program_of(graph), program_of(graph, readers=readers)
    for ring in ("dense", "experts", "head"):
        loads = [i for i in flat(alone, "disk0") if isinstance(i, Load) and i.ring == ring]
        for reader in range(readers):
            items = flat(dealt, f"disk{reader}")
            mine = [i for i in items if isinstance(i, Load) and i.ring == ring]
            assert mine == loads[reader::readers]
    if readers == 1:
        assert alone == dealt


def _hermes(loaders: int, machine: Machine, seqs: int = 8) -> tuple[Layout, float, float]:
    """Hermes' schedule of k loaders and k + 1 buffers, whole layers at a time; with the seconds of
    a step's loads on one reader, and of its compute."""
    where = replace(setting(), machine=machine)
    experts = experts_of(where.graph, 0)
    assert experts is not None
    knobs = {"seqs": seqs, "chunk": experts.count, "window": loaders + 1, "loaders": loaders}
    layout = layout_of("weight_stream", where, knobs)
    step = decode_step(seqs, layout.admission.rows, 32)
    one = layout_of("weight_stream", where, {**knobs, "window": 2, "loaders": 1})
    classes = Simulator(one, machine, Costs(machine)).step_seconds(step)[1]
    load = sum(value for name, value in classes.items() if name.startswith("load:"))
    compute = sum(value for name, value in classes.items() if name.startswith("run:"))
    return layout, load, compute / machine.workers


@pytest.mark.parametrize("loaders", [1, 2, 4])
@pytest.mark.parametrize("rate", [2e7, 1e8, 4e8])
def test_parallel_loaders_take_the_longer_of_load_over_k_and_compute(
    rate: float, loaders: int
) -> None:
    machine = replace(MACHINE, disk=Curve((1e6, 1e9), (rate, 8 * rate)))
    layout, load, compute = _hermes(loaders, machine)
    seconds = decode_seconds(layout, machine)
    closed = max(load / loaders, compute)
    assert 0.999 * closed <= seconds
    # A step of so few layers has a beginning and an end that a long model hardly feels.
    assert seconds <= 1.15 * (closed + min(load / loaders, compute) / len(layout.graph.layers))


@pytest.mark.parametrize("loaders", [1, 2, 4])
def test_parallel_loaders_hold_one_layer_more_than_they_load(loaders: int) -> None:
    layout, _, _ = _hermes(loaders, MACHINE)
    experts = experts_of(layout.graph, 0)
    assert experts is not None
    ring = lower(layout, {}).ring("experts")
    assert ring.slots * ring.slot_bytes == (loaders + 1) * experts.count * expert_bytes(experts)


def test_readers_share_the_disk() -> None:
    """Where one reader has the whole disk's rate, more of them bring nothing; they lose a little,
    since turns that do not divide leave some without work at the end of a step."""
    machine = replace(MACHINE, disk=Curve((1.0,), (1e8,)))
    one, four = (decode_seconds(_hermes(k, machine)[0], machine) for k in (1, 4))
    assert one <= four <= 1.1 * one


def test_nothing_locked_by_one_loader_is_plain_streaming() -> None:
    where = setting()
    knobs: Knobs = {"seqs": 4, "chunk": 2, "window": 3}
    plain = moves_of("weight_stream", where, knobs)
    assert plain == moves_of("weight_stream", where, {**knobs, "loaders": 1, "locked": 0})
    everything = layout_of("weight_stream", where, {**knobs, "locked": 100})
    assert everything.chunks(0) == 0


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("percent", [25, 50, 75])
def test_balanced_locks_are_never_slower_than_the_first_layers(family: str, percent: int) -> None:
    where = setting(family)
    for seqs in (1, 4, 8):
        knobs: Knobs = {"seqs": seqs, "chunk": 1, "window": 2, "locked": percent}
        even = layout_of("weight_stream", where, knobs)
        first = layout_of("weight_stream", where, {**knobs, "balanced": False})
        assert resident_bytes(even) == resident_bytes(first)
        routed = [n for i, n in enumerate(even.experts_resident) if experts_of(where.graph, i)]
        assert len(set(routed)) == 1
        assert sorted(first.experts_resident[-len(routed):], reverse=True) == list(
            first.experts_resident[-len(routed):]
        )  # fmt: skip
        assert decode_seconds(even, seqs=seqs) <= 1.001 * decode_seconds(first, seqs=seqs)


# Zig-zag (FlexGen).


@pytest.mark.parametrize("seqs", [1, 2, 8])
def test_a_block_of_a_batch_for_each_worker_is_model_batch(seqs: int) -> None:
    where = setting()
    block: Knobs = {**LOADS, "seqs": seqs, "batches": MACHINE.workers, "percent": 100}
    zigzag = moves_of("zigzag", where, block)
    assert zigzag == moves_of("model_batch", where, {**LOADS, "seqs": seqs})


def test_a_block_with_nothing_kept_is_weight_stream() -> None:
    where = setting()
    loads: Knobs = {"chunk": 2, "slots": 3, "embed": False}
    block = {**loads, "seqs": 8, "batches": MACHINE.workers, "percent": 0}
    stream = moves_of("weight_stream", where, {"seqs": 8, "chunk": 2, "window": 3})
    assert moves_of("zigzag", where, block) == stream


def test_a_block_reads_a_layer_once_for_all_its_batches() -> None:
    where = setting()
    per_token = []
    for batches in (1, 2, 4):
        knobs: Knobs = {**LOADS, "seqs": 2 * batches, "batches": batches, "percent": 0}
        layout = layout_of("zigzag", where, knobs)
        assert (layout.rows, layout.dispatch.seqs) == (2, 2 * batches)
        predicted = Simulator(layout, MACHINE, Costs(MACHINE)).predict(where.workload)
        per_token.append(predicted.disk_bytes / predicted.tokens)
    assert per_token == pytest.approx([per_token[0] / n for n in (1, 2, 4)])


def test_the_share_kept_is_the_percent_asked_for() -> None:
    where = setting()
    kept = []
    for percent in (0, 25, 50, 75, 100):
        knobs: Knobs = {**LOADS, "seqs": 4, "batches": 2, "percent": percent}
        kept.append(resident_bytes(layout_of("zigzag", where, knobs)))
        assert percent == 100 or kept[-1] <= where.graph.weight_bytes * percent / 100
    assert kept == sorted(set(kept))


def _by_name(moves: tuple[Move, ...]) -> Mapping[str, Move]:
    return {type(move).__name__: move for move in moves}


@pytest.mark.parametrize("policy", POLICIES)
def test_every_start_of_a_policy_says_how_many_sequences(policy: str) -> None:
    """The choice among schedules keeps one for each number of sequences in flight."""
    where = setting()
    for knobs in POLICIES[policy].starts(where):
        dispatch = _by_name(moves_of(policy, where, knobs))["Dispatch"]
        assert isinstance(dispatch, Dispatch) and dispatch.seqs == knobs["seqs"]
