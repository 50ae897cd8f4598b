"""Every emitted kernel against float64, in Triton's interpreter; and edits that must be noticed."""

import importlib.util

import pytest

from dovetail.codegen.gate.cases import KERNELS, LAYERS
from dovetail.codegen.gate.interpret import Job, edited, interpret
from dovetail.codegen.gate.numbers import Case, Routing
from dovetail.ir.kernel_spec import GemmSpec, SortSpec

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

ROUTED = ("up bf16", "up swapped", "up int4", "down fp32", "down int8 swapped", "down add")

# (kernel, text, what it becomes): each computes something else, and stays inside its tensors.
BROKEN = [
    ("up bf16", "acc = gate * tl.sigmoid(gate) * up", "acc = up * tl.sigmoid(up) * gate"),
    ("up bf16", "(slot // TOP_K) * K", "(slot % TOP_K) * K"),
    ("up bf16", "expert = tl.load(tile_expert_ptr + pid_m)", "expert = tl.load(tile_expert_ptr)"),
    ("up bf16", "range(0, K, BLOCK_K)", "range(0, K - BLOCK_K, BLOCK_K)"),
    ("up bf16", "row_ok = slot < num_slots", "row_ok = slot < num_slots - 1"),
    ("up ragged k", "k0 + k < K", "k0 + k < K - 1"),
    ("up int4", "(packed & 15).to(tl.int8) - 8", "(packed & 15).to(tl.int8) - 7"),
    ("up int4", "(HALF_K + k0) // SCALE_K", "k0 // SCALE_K"),
    ("up fp8 blocks", "* 256.0", "* 128.0"),
    ("up gpt-oss", "tl.minimum(gate, 0.75)", "tl.maximum(gate, -0.75)"),
    ("down bf16", "acc *= tl.load(routed_weight_ptr", "acc += tl.load(routed_weight_ptr"),
    ("down bf16", "(slot * N)", "((num_slots - 1 - slot) * N)"),
    ("down split k", "tl.where(split == 0, ", "tl.where(split >= 0, "),
    ("route softmax", 'choice = tl.where(hit, float("-inf"), choice)', "choice = choice"),
    ("route groups by two best", "score + bias", "score"),
    ("route groups by two best", "best += tl.max(rest, axis=2)", "best = tl.max(choice, axis=2)"),
    ("sort, one launch", "at += tl.max(rank, axis=0)", "at += 0"),
    ("sort, two launches", "mask=pad < last", "mask=pad < first"),
    ("reduce", "(id >= 0) & (id < EXPERTS)", "(id >= -1) & (id < EXPERTS)"),
    ("activate", "range(SPLIT_K)", "range(1)"),
    ("up placed, apart", "w_ptr + UP_AT", "w_ptr + GATE_AT"),
]  # fmt: skip


def test_every_kernel_is_within_rounding_of_float64() -> None:
    cases = [(name, Case(13, "random", 1)) for name in KERNELS]
    cases += [(name, Case(1, "one_expert", 2)) for name in KERNELS]
    cases += [
        (name, Case(40, routing, 3))
        for name in ROUTED
        for routing in ("skewed", "one_expert", "foreign")
    ]
    # Past one block of the sort, and past one part of it.
    cases += [("sort, one launch", Case(97, "skewed", 4)), ("reduce", Case(9, "foreign", 5))]
    cases += [("sort, two launches", Case(10000, "foreign", 6))]
    verdicts = interpret([Job(KERNELS[name], case) for name, case in cases])
    wrong = [
        f"{name} on {case}: {verdict}"
        for (name, case), verdict in zip(cases, verdicts, strict=True)
        if not verdict.right
    ]
    assert not wrong, "\n".join(wrong)


def test_whole_layers_are_within_rounding_of_float64() -> None:
    both = Case(1, "random", 7), Case(21, "skewed", 7)
    cases = [(name, case) for name in LAYERS for case in both]
    verdicts = interpret([Job(LAYERS[name], case) for name, case in cases])
    found = zip(cases, verdicts, strict=True)
    wrong = [f"{name} on {case}: {verdict}" for (name, case), verdict in found if not verdict.right]
    assert not wrong, "\n".join(wrong)


def test_the_interpreter_refuses_every_broken_kernel() -> None:
    jobs = []
    for name, old, new in BROKEN:
        spec = KERNELS[name]
        tokens = 97 if isinstance(spec, SortSpec) else 13
        routing: Routing = "random" if isinstance(spec, GemmSpec) else "foreign"
        jobs.append(Job(spec, Case(tokens, routing, 1), ((old, new),)))
    passed = [
        f"{name}: {new}"
        for (name, _, new), verdict in zip(BROKEN, interpret(jobs), strict=True)
        if verdict.right
    ]
    assert not passed, "a broken kernel passed:\n" + "\n".join(passed)


def test_an_edit_that_finds_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no 'absent' to edit"):
        edited(Job(KERNELS["up bf16"], Case(1), (("absent", ""),)))


def test_a_process_that_breaks_off_says_why() -> None:
    broken = Job(KERNELS["up bf16"], Case(3), (("tl.program_id(0)", "tl.no_such_thing(0)"),))
    with pytest.raises(RuntimeError, match="no_such_thing"):
        interpret([broken])
