"""Products with experts' matrices in fewer bits, and the graphs and plans that have them."""

from dataclasses import replace

import pytest
import torch
from tests.ir_cases import captured
from tests.plan_cases import MACHINE, WORKLOAD
from torch.nn import functional as F

from dovetail.codegen.executor import emit_executor
from dovetail.codegen.kernels.quantise import pack, unpack
from dovetail.ir import codec
from dovetail.ir.errors import BudgetError, InputError, VerifyError
from dovetail.ir.machine import Curve, Machine
from dovetail.ir.moves import ExpertFormat, Precision, precision_of
from dovetail.ir.task_graph import Body, TaskGraph
from dovetail.ir.verify import verify_graph
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.bound import bound
from dovetail.passes.choose import choose, smallest_budget
from dovetail.passes.choose_precision import choose_precision
from dovetail.passes.expert_precision import settled, weights_of, with_precision
from dovetail.passes.lower import lower
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies.common import Setting
from dovetail.runtime.linear import TiledLinear
from dovetail.runtime.packed import Packed
from dovetail.runtime.quantised import int4_matrix, int8_linear, rounded
from dovetail.tuning.space import Space

FORMS: tuple[ExpertFormat, ...] = ("int8", "int4")
BF16 = torch.bfloat16
WIDER = 32


def sixteen(family: str = "olmoe") -> TaskGraph:
    """A small graph that computes in 16 bits, with wide experts."""
    graph = codec.decode(_renamed(codec.encode(captured(family))), TaskGraph)
    return replace(graph, bodies=tuple(_wide(body) for body in graph.bodies))


def _wide(body: Body) -> Body:
    tasks = []
    for task in body.tasks:
        experts = task.experts
        if experts is not None:
            inner = experts.intermediate
            tensors = tuple(
                replace(t, shape=tuple(n * WIDER if n == inner else n for n in t.shape))
                for t in experts.tensors
            )
            experts = replace(experts, intermediate=inner * WIDER, tensors=tensors)
        tasks.append(replace(task, experts=experts))
    return replace(body, tasks=tuple(tasks))


def _renamed(data: codec.Json) -> codec.Json:
    if isinstance(data, dict):
        return {name: _renamed(value) for name, value in data.items()}
    if isinstance(data, list):
        return [_renamed(value) for value in data]
    return "bfloat16" if data == "float32" else data


def machine(disk: float = 1e7) -> Machine:
    """A machine whose processor is as fast in all formats."""
    (rate,) = MACHINE.gemm.values()
    return replace(
        MACHINE,
        gemm={"bfloat16": rate, "int8": rate, "int4": rate},
        attention={"bfloat16": rate},
        kv_bandwidth={"bfloat16": Curve((1.0,), (1e10,))},
        disk=Curve((4096.0, 1e6), (disk / 10, disk)),
    )


def matrices(outputs: int = 48, inputs: int = 128, count: int = 1) -> list[torch.Tensor]:
    """Random matrices [outputs, inputs] in bfloat16."""
    seed = torch.Generator().manual_seed(0)
    return [torch.randn(outputs, inputs, generator=seed).to(BF16) for _ in range(count)]


def converted(matrix: torch.Tensor, form: ExpertFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix as a converted checkpoint holds it."""
    stored, scale = pack(matrix[None], weights_of(form))
    assert scale is not None
    return stored[0], scale[0]


def test_int4_is_turned_into_what_its_numbers_stand_for() -> None:
    (matrix,) = matrices()
    stored, scale = converted(matrix, "int4")
    exact = unpack(stored[None], scale[None], weights_of("int4"))[0]
    made = int4_matrix(stored, scale, BF16)
    # The product of a number from -7 to 7 and a scale, both in bfloat16.
    assert torch.allclose(made.double(), exact, rtol=2**-7, atol=0)
    assert torch.equal(int4_matrix(stored, scale, torch.float32).double().float(), exact.float())


def test_int8_product_is_that_of_rounded_rows_and_weights() -> None:
    (matrix,) = matrices()
    stored, scale = converted(matrix, "int8")
    x = torch.randn(5, 128).to(BF16)
    rows = rounded(x)
    assert rows.values.abs().amax(1).tolist() == [127] * 5
    exact = unpack(stored[None], scale[None], weights_of("int8"))[0]
    expected = (rows.values.double() * rows.steps.double()) @ exact.T
    bias = torch.randn(48).to(BF16)
    assert torch.allclose(int8_linear(rows, stored, scale).double(), expected, rtol=2**-7)
    found = int8_linear(rows, stored, scale, bias).double()
    assert torch.allclose(found, expected + bias.double(), rtol=2**-7, atol=1e-2)
    apart = found - F.linear(x.float(), matrix.float(), bias.float()).double()
    assert apart.norm() / expected.norm() < 0.02
    assert torch.equal(rounded(torch.zeros(2, 4)).values, torch.zeros(2, 4, dtype=torch.int8))


@pytest.mark.parametrize("form", FORMS)
def test_tiles_and_packs_change_nothing(form: ExpertFormat) -> None:
    """Rows of an expert are padded to whole tiles before."""
    linear, scales, stored = TiledLinear((8, 16)), [], []
    for matrix in matrices(count=3):
        weight, scale = converted(matrix, form)
        stored.append(weight)
        scales.append(scale)
    x = torch.randn(40, 128).to(BF16)
    whole = linear(x, stored[0], scale=scales[0])
    parts = [linear(part, stored[0], scale=scales[0]) for part in torch.split(x, [16, 16, 8])]
    assert torch.equal(whole, torch.cat(parts))
    ends = [8, 24, 40]
    together = linear(x, Packed(stored, ends), scale=Packed(scales, ends))
    starts = [0, *ends]
    apart = [
        linear(x[a:b], weight, scale=scale)
        for a, b, weight, scale in zip(starts, ends, stored, scales, strict=False)
    ]
    assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
@pytest.mark.parametrize("form", FORMS)
def test_graph_keeps_all_but_routed_experts(family: str, form: ExpertFormat) -> None:
    graph = sixteen(family)
    made = with_precision(graph, form)
    verify_graph(made)
    assert made is with_precision(graph, form)
    share = {"int8": 0.5, "int4": 0.3}[form]
    for before, after in zip(graph.bodies, made.bodies, strict=True):
        if before.experts is None:
            assert before == after
            continue
        assert after.experts is not None
        one, other = before.experts.experts, after.experts.experts
        assert one is not None and other is not None
        assert other.precision == form and one.precision == ""
        assert other.parameters == one.parameters
        assert share < other.nbytes / one.nbytes < share + 0.1
        assert replace(after.experts, experts=one) == before.experts


def test_graph_refuses_what_cannot_be_converted() -> None:
    with pytest.raises(InputError, match=r"computes in float32, expected 16 bits"):
        with_precision(captured("olmoe"), "int8")
    with pytest.raises(InputError, match=r"in fewer bits already"):
        with_precision(with_precision(sixteen(), "int8"), "int4")
    graph = sixteen()
    dense = replace(graph, bodies=(), layers=())
    with pytest.raises(InputError, match=r"no routed experts"):
        with_precision(dense, "int8")


def test_precision_comes_first_and_once() -> None:
    graph = sixteen()
    budget = {"ram": 2 * smallest_budget(graph, machine(), WORKLOAD)}
    plan = choose(graph, machine(), budget, WORKLOAD, "model_batch")
    eight = Precision("experts", "int8")
    assert apply_moves(graph, (eight, *plan.moves)).precision == "int8"
    for moves in ((*plan.moves, eight), (eight, eight, *plan.moves)):
        with pytest.raises(VerifyError, match=r"precision: found it as move .*once, and first"):
            apply_moves(graph, moves)


def test_allowed_format_is_chosen_where_it_is_faster() -> None:
    graph = sixteen()
    budget = {"ram": 2 * smallest_budget(graph, machine(), WORKLOAD)}
    plain = choose_precision(graph, machine(), budget, WORKLOAD, "model_batch")
    assert plain == choose(graph, machine(), budget, WORKLOAD, "model_batch")
    slow_disk = choose_precision(
        graph, machine(), budget, WORKLOAD, "model_batch", allow=("int8", "int4")
    )
    assert precision_of(slow_disk.moves) == "int4"
    assert slow_disk.graph == plain.graph
    assert slow_disk.prediction.seconds < plain.prediction.seconds
    assert slow_disk.bound.seconds <= plain.bound.seconds
    assert any("with experts as they are" in c.refused for c in slow_disk.candidates)
    layout = apply_moves(graph, slow_disk.moves)
    assert sum(ram_bytes(layout).values()) == slow_disk.prediction.peak_bytes
    slow: dict[str, Curve] = {form: Curve((1.0,), (1e8,)) for form in FORMS}
    fast_disk = machine(1e12)
    fast_disk = replace(fast_disk, gemm={**fast_disk.gemm, **slow})
    kept = choose_precision(graph, fast_disk, budget, WORKLOAD, "model_batch", allow=FORMS)
    assert precision_of(kept.moves) is None


def test_allowed_format_makes_a_model_fit() -> None:
    graph, here = sixteen(), machine()
    least = smallest_budget(graph, here, WORKLOAD)
    less = smallest_budget(with_precision(graph, "int4"), here, WORKLOAD)
    assert less < least
    budget = {"ram": (less + least) // 2}
    with pytest.raises(BudgetError):
        choose_precision(graph, here, budget, WORKLOAD)
    assert precision_of(choose_precision(graph, here, budget, WORKLOAD, allow=("int4",)).moves) == (
        "int4"
    )


def test_formats_on_a_gpu_or_twice_are_refused() -> None:
    graph = sixteen()
    with pytest.raises(InputError, match=r"run on the processor only"):
        choose_precision(graph, machine(), {"ram": 1, "hbm": 1}, WORKLOAD, allow=("int8",))
    with pytest.raises(InputError, match=r"allow int8 int8: expected int8 or int4, each once"):
        choose_precision(graph, machine(), {"ram": 1}, WORKLOAD, allow=("int8", "int8"))


def test_bound_holds_for_a_format() -> None:
    """With a processor that is faster in int8 the least time is less than with one that is not."""
    graph, budget = with_precision(sixteen(), "int8"), 1 << 30
    here = machine(1e15)
    faster = replace(here, gemm={**here.gemm, "int8": Curve((1.0,), (1e12,))})
    assert (
        bound(graph, faster, budget, WORKLOAD).parts["cpu"]
        < (bound(graph, here, budget, WORKLOAD).parts["cpu"])
    )


def test_settled_plan_can_be_solved_again() -> None:
    graph = sixteen()
    budget = {"ram": 2 * smallest_budget(graph, machine(), WORKLOAD)}
    plan = choose_precision(graph, machine(), budget, WORKLOAD, "model_batch", allow=("int8",))
    made, again = settled(graph, plan)
    assert apply_moves(made, again.moves).experts_resident == (
        apply_moves(graph, plan.moves).experts_resident
    )
    assert settled(made, again) == (made, again)


def test_emitted_expert_rounds_rows_once() -> None:
    graph = sixteen()
    budget = {"ram": 2 * smallest_budget(graph, machine(), WORKLOAD)}
    plan = choose(graph, machine(), budget, WORKLOAD, "model_batch")
    texts = {}
    for form in FORMS:
        layout = apply_moves(graph, (Precision("experts", form), *plan.moves))
        texts[form] = emit_executor(layout.graph, lower(layout, plan.budget), {})
    assert """    x = rounded(x)
    g = linear(x, w["gate"], scale=w["gate_scale"])
    u = linear(x, w["up"], scale=w["up_scale"])
""" in texts["int8"]
    assert 'scale=w["down_scale"]' in texts["int4"] and "rounded" not in texts["int4"]


def test_tuner_moves_to_allowed_formats_only() -> None:
    graph = sixteen()
    budget = 4 * smallest_budget(graph, machine(), WORKLOAD)
    setting = Setting(graph, machine(), budget, WORKLOAD)
    plan = choose(graph, machine(), {"ram": budget}, WORKLOAD, "module_batch")
    layout = apply_moves(graph, plan.moves)
    assert "bits" not in Space.around(setting, layout).ladders
    space = Space.around(setting, layout, ("int8",))
    assert space.ladders["bits"] == (16, 8)
    built = space.build(space.complete({"bits": 8}))
    assert precision_of(built.moves) == "int8"
    assert apply_moves(graph, built.moves).precision == "int8"
    assert precision_of(space.build(space.base).moves) is None
