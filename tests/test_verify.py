"""The verifier: what capture and lowering give is legal, and every rule refuses its breach."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import sympy
from tests.ir_cases import (
    body_changed,
    captured,
    find_body,
    find_task,
    op_changed,
    task_changed,
)
from transformers import AutoConfig

from dovetail.capture.capture import capture_config
from dovetail.ir import codec
from dovetail.ir.errors import VerifyError
from dovetail.ir.task_graph import Experts, Op, Ref, Role, TaskGraph, Value
from dovetail.ir.verify import verify_graph

COMMON: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "intermediate_size": 96,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 8},
    "deepseek_v2": {
        "moe_intermediate_size": 48,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "head_dim": 16,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_graphs_are_legal(family: str, golden: Callable[[str], None]) -> None:
    # The text is also what other tests take as a graph. A change of it is a change of graph
    # digests, which makes plans of earlier versions unusable.
    graph = capture_config(AutoConfig.for_model(family, **COMMON, **FAMILIES[family])).graph
    verify_graph(graph)
    golden(json.dumps(codec.encode(graph)).replace('{"kind": "Op"', '\n{"kind": "Op"') + "\n")


MOE = "layer_1"
SYMBOL = sympy.Symbol("batch", integer=True)


def _values(graph: TaskGraph, body: str, **changes: Value | None) -> TaskGraph:
    """The graph with shapes of a body changed, or removed for None."""
    values = {**find_body(graph, body).values, **changes}
    return body_changed(graph, body, values={k: v for k, v in values.items() if v is not None})


def _spec(graph: TaskGraph) -> Experts:
    spec = find_task(graph, f"{MOE}.experts_0").experts
    assert spec is not None
    return spec


def _experts(graph: TaskGraph, **changes: object) -> TaskGraph:
    changed = replace(_spec(graph), **changes)  # type: ignore[arg-type]
    return task_changed(graph, f"{MOE}.experts_0", experts=changed)


def _weights(graph: TaskGraph, at: str, /, **changes: object) -> TaskGraph:
    first, *others = find_task(graph, at).weights
    changed = replace(first, **changes)  # type: ignore[arg-type]
    return task_changed(graph, at, weights=(changed, *others))


ROUTER, ATTENTION = f"{MOE}.router_0", f"{MOE}.attention_1"
EXPERTS_OP = Op("dovetail.experts", (Ref("x"), Ref("expert_idx"), Ref("expert_w")), ("again",))
SHAPE = Value((sympy.Integer(1),), "float32")

BAD_GRAPHS: dict[str, tuple[Callable[[TaskGraph], TaskGraph], str]] = {
    "two bodies of a name": (
        lambda g: body_changed(g, "layer_0", name=MOE),
        "body layer_1 occurs twice",
    ),
    "two tasks of a name": (
        lambda g: task_changed(g, f"{MOE}.norm_1", name="norm_0"),
        "layer_1: task norm_0 occurs twice",
    ),
    "no such body": (
        lambda g: replace(g, layers=(0, 1, 2)),
        "layer 2 runs body 2, expected one of 0..1",
    ),
    "no layers": (lambda g: replace(g, layers=()), "no layers, expected at least one"),
    "unknown name": (
        lambda g: op_changed(g, ROUTER, 0, args=(Ref("nowhere"), (1, 64))),
        "layer_1.router_0: aten.view.default uses nowhere, expected a value made before, a weight",
    ),
    "use before its definition": (
        lambda g: task_changed(g, ROUTER, ops=find_task(g, ROUTER).ops[::-1]),
        "which router_0 makes only later; expected it before its use",
    ),
    "tasks in the wrong order": (
        lambda g: body_changed(g, MOE, tasks=find_body(g, MOE).tasks[::-1]),
        "uses expert_out, which experts_0 makes only later",
    ),
    "weight that the task lacks": (
        lambda g: task_changed(g, ROUTER, weights=()),
        "uses model.layers.{layer}.mlp.gate.weight, expected a value made before",
    ),
    "weight of another task": (
        lambda g: op_changed(
            g, ROUTER, 0, args=(Ref(find_task(g, f"{MOE}.norm_0").weights[0].fqn),)
        ),
        "input_layernorm.weight, a weight of norm_0; expected it among this task's weights",
    ),
    "weight that nothing uses": (
        lambda g: task_changed(
            g,
            ROUTER,
            weights=(*find_task(g, ROUTER).weights, *find_task(g, f"{MOE}.norm_0").weights),
        ),
        "input_layernorm.weight is used by none of the task's operators",
    ),
    "weight without its layer": (
        lambda g: _weights(g, f"{MOE}.norm_0", key="norm.weight"),
        "layer_1.norm_0: weight norm.weight, expected {layer} left open inside a layer",
    ),
    "weight of no size": (
        lambda g: _weights(g, f"{MOE}.norm_0", shape=(0,)),
        r"input_layernorm.weight: shape \[0\], expected sizes of at least 1",
    ),
    "name made twice": (
        lambda g: op_changed(g, ROUTER, 1, outs=find_task(g, ROUTER).ops[0].outs),
        "aten.linear.default makes .*, which is already defined",
    ),
    "reads too much": (
        lambda g: task_changed(g, f"{MOE}.norm_1", reads=("add_3", "hidden")),
        "layer_1.norm_1: reads add_3, hidden, expected add_3 from its operators",
    ),
    "writes too little": (
        lambda g: task_changed(g, ROUTER, writes=("expert_idx", "x")),
        "layer_1.router_0: writes expert_idx, x, expected expert_idx, expert_w, x",
    ),
    "writes what nothing reads": (
        lambda g: task_changed(g, ROUTER, writes=(*find_task(g, ROUTER).writes, "linear")),
        "layer_1.router_0: writes .*linear, expected",
    ),
    "output that is not made": (
        lambda g: body_changed(g, MOE, outputs=("nowhere",)),
        "layer_1: output nowhere is made by no task",
    ),
    "shared value that is not made": (
        lambda g: replace(g, shared=("cos",)),
        "prologue: shared value cos is made by no task",
    ),
    "input that no one gives": (
        lambda g: _values(
            body_changed(g, "layer_0", inputs=("hidden", "rope", "x")), "layer_0", x=SHAPE
        ),
        "layer_0: input x is neither carried nor shared, expected one of rope, input_ids",
    ),
    "carried state of another shape": (
        lambda g: _values(g, "epilogue", hidden=SHAPE),
        r"epilogue: input hidden is \[1\] float32, expected \[seqs, q_len, 64\] float32 as ",
    ),
    "shared value of another shape": (
        lambda g: _values(g, MOE, rope=SHAPE),
        r"layer_1: shared rope is \[1\] float32, expected .*complex64 as prologue makes rope",
    ),
    "value without a shape": (
        lambda g: _values(g, MOE, expert_out=None),
        "layer_1.experts_0: dovetail.experts: expert_out has no shape",
    ),
    "foreign dim": (
        lambda g: _values(g, MOE, expert_out=Value((SYMBOL,), "float32")),
        r"value expert_out: shape \[batch\] float32 holds batch, expected the dims seqs, q_len",
    ),
    "unknown dtype": (
        lambda g: _values(g, MOE, expert_out=Value((), "float4")),
        "value expert_out: dtype float4, expected one of complex128",
    ),
    "wrong axis": (
        lambda g: task_changed(g, ATTENTION, axes=("seqs", "tokens")),
        "layer_1.attention_1: axis tokens, expected for attention: seqs",
    ),
    "experts beside another operator": (
        lambda g: _values(
            task_changed(
                g,
                f"{MOE}.experts_0",
                ops=(*find_task(g, f"{MOE}.experts_0").ops, EXPERTS_OP),
            ),
            MOE,
            again=SHAPE,
        ),
        "dovetail.experts among 2 operators of a task of role experts, expected it alone",
    ),
    "experts of another role": (
        lambda g: task_changed(g, f"{MOE}.experts_0", role=Role.MLP, axes=("tokens",)),
        "dovetail.experts among 1 operators of a task of role mlp, expected it alone in a task of "
        "role experts",
    ),
    "experts with a tensor too few": (
        lambda g: op_changed(
            task_changed(g, f"{MOE}.experts_0", reads=("x", "expert_idx")),
            f"{MOE}.experts_0",
            0,
            args=EXPERTS_OP.args[:2],
        ),
        "dovetail.experts takes 2 tensors and gives 1, expected 3 and 1",
    ),
    "experts without a description": (
        lambda g: task_changed(g, f"{MOE}.experts_0", experts=None),
        "no description of experts on a task of role experts",
    ),
    "kv without its operator": (
        lambda g: task_changed(g, f"{MOE}.kv_0", ops=(), reads=(), writes=()),
        "a task of role kv without dovetail.kv_update",
    ),
    "more chosen than there are": (
        lambda g: _experts(g, top_k=9),
        "layer_1.experts_0: top 9 of 8 experts, expected 1..8",
    ),
    "experts without a matrix": (
        lambda g: _experts(g, tensors=_spec(g).tensors[:2]),
        "experts made of gate, up, expected gate, up and down, or gate_up and down",
    ),
    "activation without a result": (
        lambda g: _experts(g, activation=()),
        "the activation does not make a",
    ),
    "activation of something else": (
        lambda g: _experts(g, activation=(Op("aten.silu.default", (Ref("z"),), ("a",)),)),
        "aten.silu.default of the activation uses z, expected one of g, u",
    ),
}


@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_verify_graph_refuses(case: str) -> None:
    change, text = BAD_GRAPHS[case]
    with pytest.raises(VerifyError, match=text):
        verify_graph(change(captured("deepseek_v2")))


def test_verify_graph_refuses_two_kv_tasks() -> None:
    graph = captured("deepseek_v2")
    kv = find_task(graph, "layer_0.kv_0")
    again = replace(
        kv,
        name="kv_1",
        ops=(Op("dovetail.kv_update", kv.ops[0].args, ("k_two", "v_two")),),
        writes=(),
    )
    body = find_body(graph, "layer_0")
    at = body.tasks.index(kv) + 1
    graph = body_changed(graph, "layer_0", tasks=(*body.tasks[:at], again, *body.tasks[at:]))
    with pytest.raises(VerifyError, match="layer_0: kv tasks kv_0, kv_1, expected at most one"):
        verify_graph(_values(graph, "layer_0", k_two=SHAPE, v_two=SHAPE))
