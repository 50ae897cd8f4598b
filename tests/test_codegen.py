"""The emitted executor: golden text, and a pure function of graph and program."""

from collections.abc import Callable

import pytest
from tests.ir_cases import captured, program_of

from dovetail.codegen.executor import emit_executor
from dovetail.codegen.ops import op_text, size_text
from dovetail.ir.expr import PAST, Q_LEN, SEQS, parse_expr, to_expr
from dovetail.ir.task_graph import Const, Op, Ref, Size

TITLE = {"model": "a small one", "policy": "module_batch"}


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v2"])
def test_executor_text(family: str, golden: Callable[[str], None]) -> None:
    graph = captured(family)
    golden(emit_executor(graph, program_of(graph, head=True, experts=2), TITLE))


def test_same_inputs_same_text() -> None:
    graph = captured("olmoe")
    texts = {emit_executor(graph, program_of(graph), TITLE) for _ in range(2)}
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("op", "text"),
    [
        (Op("aten.add.Tensor", (Ref("a"), 1.5), ("b",)), "a + 1.5"),
        (Op("aten.linear.default", (Ref("x"), Ref("w")), ("y",)), "linear(x, w)"),
        (
            Op("aten.view.default", (Ref("x"), (Size(SEQS * Q_LEN), 8)), ("y",)),
            "x.view(q_len*seqs, 8)",
        ),
        (Op("aten.slice.Tensor", (Ref("x"), 3, 0, 8), ("y",)), "x[:, :, :, 0:8]"),
        (Op("aten.to.dtype", (Ref("x"), Const("torch.float32")), ("y",)), "x.to(torch.float32)"),
        (
            Op("aten.masked_fill.Scalar", (Ref("x"), Ref("m"), Const("-inf")), ("y",)),
            'aten.masked_fill.Scalar(x, m, float("-inf"))',
        ),
        (
            Op("aten.sum.dim_IntList", (Ref("x"), (-1,), True), ("y",), {"dtype": None}),
            "aten.sum.dim_IntList(x, [-1], True, dtype=None)",
        ),
    ],
)
def test_operators_read_like_torch(op: Op, text: str) -> None:
    assert op_text(op, str) == text


def test_sizes_are_whole_numbers() -> None:
    assert size_text(parse_expr("floor((past + q_len)/2)")) == "((past + q_len) // (2))"
    assert size_text(to_expr(PAST + Q_LEN)) == "past + q_len"
