"""Products of a pack in one call: the same output to the last bit, wherever the matrices are."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import tune_cases as cases
from tests.ir_cases import captured
from tests.plan_cases import MACHINE
from torch import Tensor
from torch.nn import functional as F

from dovetail.ir import codec
from dovetail.ir.errors import PlanError
from dovetail.ir.gemm_tiles import LADDERS, tiles
from dovetail.ir.moves import Move, Pack
from dovetail.ir.notation import move_text
from dovetail.ir.task_graph import ExpertTensor, Task, TaskGraph
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.cost import Costs
from dovetail.passes.simulate import Simulator
from dovetail.runtime.expert_groups import FEWEST, Groups, Slots
from dovetail.runtime.expert_packs import Part, run_pack
from dovetail.runtime.linear import TiledLinear
from dovetail.runtime.packed import Packed
from dovetail.runtime.tokens import Routing
from dovetail.tuning.space import takes_groups

COUNT, HIDDEN, INNER = 24, 32, 16


class Counted:
    """Counts the calls of ``grouped_mm``."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._real = F.grouped_mm
        patch.setattr(F, "grouped_mm", self)

    def __call__(self, x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        self.calls += 1
        return self._real(x, weight, offs=offs)


def experts(dtype: torch.dtype, order: list[int], transposed: bool, bias: bool) -> list[Part]:
    """Parts of experts that stand in memory in this order, all of one after all of another."""
    seed = torch.Generator().manual_seed(0)
    memory = torch.randn(len(order), 2 * HIDDEN * INNER, generator=seed).to(dtype)
    biases = torch.randn(len(order), HIDDEN + INNER, generator=seed).to(dtype)
    shapes = {"up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    found: list[Part] = []
    for expert in range(len(order)):
        halves = memory[order.index(expert)].chunk(2)
        one = {
            part: half.view(shape[::-1] if transposed else shape)
            for half, (part, shape) in zip(halves, shapes.items(), strict=True)
        }
        if bias:
            one |= {"up_bias": biases[expert, :INNER], "down_bias": biases[expert, INNER:]}
        found.append(one)
    return found


def outputs(loaded: list[Part], counts: list[int], *, transposed: bool, grouped: bool) -> Tensor:
    """The sum over the experts with rows, as one pack."""
    dtype = loaded[0]["up"].dtype
    linear = TiledLinear(LADDERS[0])

    def product(x: Tensor, weights: Mapping[str, Packed], part: str) -> Tensor:
        weight = weights[part].t() if transposed else weights[part]
        return linear(x, weight, weights.get(f"{part}_bias"))

    def expert(x: Tensor, weights: Mapping[str, Packed]) -> Tensor:
        return product(F.silu(product(x, weights, "up")), weights, "down")

    seed = torch.Generator().manual_seed(1)
    x = torch.randn(40, HIDDEN, generator=seed).to(dtype)
    rows = torch.cat([torch.randperm(40, generator=seed)[:count] for count in counts])
    offsets = [sum(counts[:number]) for number in range(len(counts) + 1)]
    routing = Routing(rows, torch.rand(len(rows), 1, generator=seed), offsets, (0,) * len(counts))
    pack = [number for number, count in enumerate(counts) if count]
    total = torch.zeros(40, HIDDEN)
    sizes = LADDERS[0] if dtype.itemsize == 2 else ()
    run_pack(expert, x, routing, pack, [loaded[e] for e in pack], total, sizes, grouped)
    return total


NAMES = sorted(range(COUNT), key=str)
"""The order of experts in a checkpoint: that of their names."""
ALL = [1 + number % 5 for number in range(COUNT)]
HALF = [count * (number % 3 > 0) for number, count in enumerate(ALL)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("order", [list(range(COUNT)), NAMES], ids=["numbers", "names"])
@pytest.mark.parametrize("counts", [ALL, HALF], ids=["all", "gaps"])
def test_groups_change_no_bit(
    dtype: torch.dtype,
    transposed: bool,
    order: list[int],
    counts: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted = Counted(monkeypatch)
    loaded = experts(dtype, order, transposed, bias=False)
    apart, together = (
        outputs(loaded, counts, transposed=transposed, grouped=grouped) for grouped in (False, True)
    )
    assert torch.equal(apart, together)
    assert counted.calls == 2


def test_products_with_a_bias_are_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    loaded = experts(torch.bfloat16, NAMES, transposed=False, bias=True)
    apart, together = (
        outputs(loaded, ALL, transposed=False, grouped=grouped) for grouped in (False, True)
    )
    assert torch.equal(apart, together)
    assert counted.calls == 0


def test_matrices_apart_are_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    together = experts(torch.bfloat16, NAMES, transposed=False, bias=False)
    apart: list[Part] = [{part: w.clone() for part, w in one.items()} for one in together]
    # Of these, whose first part is one stack still, the second is not.
    mixed: list[Part] = [
        {"up": one["up"], "down": other["down"]} for one, other in zip(together, apart, strict=True)
    ]
    expected = outputs(together, ALL, transposed=False, grouped=False)
    for loaded, calls in ((apart, 0), (mixed, 1)):
        counted.calls = 0
        assert torch.equal(outputs(loaded, ALL, transposed=False, grouped=True), expected)
        assert counted.calls == calls


@given(
    st.lists(st.integers(1, 3), min_size=FEWEST - 1, max_size=20),
    st.sampled_from([1, 2, 3]),
    st.randoms(use_true_random=False),
)
def test_slots_are_where_the_matrices_are(steps: list[int], size: int, random: object) -> None:
    at = [0]
    for step in steps:
        at.append(at[-1] + step * size)
    memory = torch.zeros(at[-1] + 1, 8, 8)
    places = at[:]
    random.shuffle(places)  # type: ignore[attr-defined]
    slots = Slots.of([memory[place] for place in places])
    if slots is None:
        assert any(step % min(steps) for step in steps) or sum(steps) + 1 > 2 * len(at)
        return
    assert [places[number] for number in slots.order] == at
    scale = at[-1] // (slots.count - 1)
    assert [number * scale for number in slots.numbers] == at


def test_slots_refuse_few_matrices_and_those_in_fewer_bits() -> None:
    memory = torch.zeros(FEWEST, 8, 8)
    assert Slots.of(list(memory)) is not None
    assert Slots.of(list(memory)[1:]) is None
    assert Slots.of(list(memory.to(torch.int8))) is None
    assert Slots.of(list(memory.double())) is None


def test_groups_refuse_rows_of_broken_words_and_other_places() -> None:
    ends = list(range(1, FEWEST + 1))
    narrow = list(torch.randn(FEWEST, 8, 6))
    slots = Slots.of(narrow)
    assert slots is not None
    groups = Groups(slots, ends)
    assert groups.linear(torch.randn(FEWEST, 6), narrow) is None
    wide = list(torch.randn(FEWEST, 8, 8))
    x = torch.randn(FEWEST, 8)
    made = groups.linear(x, wide)
    assert made is not None
    assert torch.equal(made, torch.cat([row[None] @ w.t() for row, w in zip(x, wide, strict=True)]))
    assert groups.linear(x.double(), wide) is None
    assert groups.linear(x, wide[::-1]) is None


def test_tiles_of_groups_are_those_of_single_products(monkeypatch: pytest.MonkeyPatch) -> None:
    met: set[int] = set()
    real = F.grouped_mm

    def spy(x: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
        ends = [0, *offs.tolist()]
        met.update(b - a for a, b in pairwise(ends))
        return real(x, weight, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", spy)
    counts = list(range(1, COUNT + 1))
    loaded = experts(torch.bfloat16, NAMES, transposed=False, bias=False)
    outputs(loaded, counts, transposed=False, grouped=True)
    assert met == {sum(tiles(count, LADDERS[0])) for count in counts}


def test_pack_reads_as_before_it_could_be_grouped() -> None:
    before: codec.Json = {"kind": "Pack", "role": "experts", "rows": 64}
    assert codec.encode(Pack("experts", 64)) == before
    assert codec.decode(before, Move) == Pack("experts", 64)  # type: ignore[arg-type]
    grouped = Pack("experts", 64, "grouped")
    assert codec.decode(codec.encode(grouped), Move) == grouped  # type: ignore[arg-type]
    assert move_text(Pack("experts", 64)) == "pack(experts, rows=64)"
    assert move_text(grouped) == "pack(experts, rows=64, grouped)"


def test_pack_refuses_another_product() -> None:
    data: codec.Json = {"kind": "Pack", "role": "experts", "rows": 64, "product": "batched"}
    with pytest.raises(PlanError, match="'batched', expected one of '', 'grouped'"):
        codec.decode(data, Pack)


def test_the_tuner_may_group_packs() -> None:
    space = cases.space()
    assert space.ladders["grouped"] == (0, 1) and space.base["grouped"] == 0
    point = {**space.base, "pack": 64, "grouped": 1}
    moves = space.build(point).moves
    assert moves[-1] == Pack("experts", 64, "grouped")
    layout = apply_moves(cases.graph(), moves)
    assert layout.settings.grouped and layout.settings.pack == 64
    assert space.build({**point, "pack": 0}).moves == space.build(space.base).moves


def test_rows_from_before_there_was_a_knob_are_read() -> None:
    space = cases.space()
    old = {name: value for name, value in space.base.items() if name != "grouped"}
    assert space.holds(old) and space.complete(old) == space.base
    assert not space.holds({**old, "pack": -1})


def test_experts_with_a_bias_have_no_such_knob() -> None:
    assert takes_groups(captured("olmoe"))
    assert not takes_groups(with_tensors(lambda t: (t, replace(t, part=f"{t.part}_bias"))))
    assert not takes_groups(with_tensors(lambda t: (replace(t, dtype="int8"),)))
    assert not takes_groups(with_tensors(lambda t: (replace(t, shape=(6, 6)),)))


def with_tensors(change: Callable[[ExpertTensor], tuple[ExpertTensor, ...]]) -> TaskGraph:
    """A small captured model whose experts' tensors are changed."""
    graph = captured("olmoe")

    def task(one: Task) -> Task:
        if one.experts is None:
            return one
        tensors = tuple(new for tensor in one.experts.tensors for new in change(tensor))
        return replace(one, experts=replace(one.experts, tensors=tensors))

    bodies = tuple(replace(b, tasks=tuple(task(t) for t in b.tasks)) for b in graph.bodies)
    return replace(graph, bodies=bodies)


def test_groups_are_predicted_to_save_operators() -> None:
    packed, grouped = (
        Simulator(apply_moves(cases.graph(), moves), MACHINE, Costs(MACHINE))
        .predict(cases.setting().workload)
        .seconds
        for moves in (
            (*cases.untuned(), Pack("experts", 256)),
            (*cases.untuned(), Pack("experts", 256, "grouped")),
        )
    )
    assert grouped <= packed
