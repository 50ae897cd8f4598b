"""What capture finds in a model (kinds of layers, tasks, weights, constants)."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.capture_cases import captured_of, config_of, entries_of, experts_of, graph_of
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from dovetail.capture.capture import capture_config
from dovetail.capture.captured import load_captured
from dovetail.capture.clean import clean
from dovetail.capture.masks import MaskRule, mask_rule
from dovetail.ir.codec import canonical, digest
from dovetail.ir.errors import CaptureError, PlanError
from dovetail.ir.expr import PAST, Q_LEN, SEQS, parse_expr
from dovetail.ir.task_graph import Body, KvSpec, Op, Ref, Role, Weight

MOE = ["norm", "attention", "kv", "attention", "norm", "router", "experts", "other"]
SHARED = [*MOE[:6], "shared_expert", *MOE[6:]]
DENSE = ["norm", "attention", "kv", "attention", "norm", "mlp"]
LAYOUTS: dict[str, tuple[tuple[int, ...], list[list[str]]]] = {
    "olmoe": ((0, 0, 0, 0), [MOE]),
    "mixtral": ((0, 0, 0, 0), [MOE]),
    "qwen2_moe": ((0, 1, 0, 1), [DENSE, SHARED]),
    "qwen3_moe": ((0, 0, 0, 0), [MOE]),
    "deepseek_v2": ((0, 0, 1, 1), [DENSE, SHARED]),
    "deepseek_v3": ((0, 0, 1, 1), [DENSE, SHARED]),
    "gpt_oss": ((0, 1, 0, 1), [MOE, MOE]),
    "llama": ((0, 0, 0, 0), [DENSE]),
}


@pytest.mark.parametrize("family", LAYOUTS)
def test_layers_fold_into_kinds_with_their_tasks(family: str) -> None:
    graph, (layers, roles) = graph_of(family), LAYOUTS[family]
    assert graph.layers == layers
    assert [[t.role.value for t in body.tasks] for body in graph.bodies] == roles
    assert [t.role for t in graph.prologue.tasks] == [Role.EMBED, Role.OTHER]
    assert [t.role for t in graph.epilogue.tasks] == [Role.NORM, Role.HEAD]


@pytest.mark.parametrize("family", LAYOUTS)
def test_bodies_are_closed(family: str) -> None:
    """Every operator reads what came before it, and tasks declare exactly what crosses them."""
    graph = graph_of(family)
    for body in (graph.prologue, *graph.bodies, graph.epilogue):
        check_closed(body, set(graph.constants), graph.shared)
        assert len({t.name for t in body.tasks}) == len(body.tasks)
    for body in graph.bodies:
        assert body.inputs == ("hidden", *graph.shared)
        assert body.values[body.outputs[0]].shape == (SEQS, Q_LEN, 64)
        assert body.kv is not None
    assert graph.prologue.inputs == ("input_ids", "position_ids")
    assert graph.epilogue.values[graph.epilogue.outputs[0]].shape == (SEQS, Q_LEN, 256)


def check_closed(body: Body, constants: set[str], shared: tuple[str, ...]) -> None:
    """Assert the data flow of one body."""
    known = set(body.inputs)
    for task in body.tasks:
        assert set(task.reads) <= known
        local = set(task.reads) | {w.fqn for w in task.weights} | constants
        made: set[str] = set()
        for op in task.ops:
            assert set(op.uses()) <= local | made, (task.name, op)
            assert not made & set(op.outs)
            made |= set(op.outs)
        assert set(task.writes) <= made
        assert made <= set(body.values)
        known |= set(task.writes)
    assert set(body.outputs) <= known
    if body.name == "prologue":
        assert set(shared) <= known
    else:
        assert set(body.tasks[-1].writes) == set(body.outputs)


def test_everything_before_the_experts_does_not_wait_for_them() -> None:
    graph = graph_of("qwen2_moe")
    (at,) = (i for i, t in enumerate(graph.bodies[1].tasks) if t.role is Role.EXPERTS)
    task = graph.bodies[1].tasks[at]
    assert [op.target for op in task.ops] == ["dovetail.experts"]
    assert task.axes == ("tokens", "experts")
    assert graph.bodies[1].tasks[at - 1].role is Role.SHARED_EXPERT
    names = [w.fqn for w in graph.bodies[1].tasks[at - 1].weights]
    assert "model.layers.{layer}.mlp.shared_expert_gate.weight" in names


def test_seams_and_kv() -> None:
    graph = graph_of("deepseek_v3")
    body = graph.bodies[1]
    assert body.kv == KvSpec(1, 32, 1, 16, "float32")
    assert body.values["k_all"].shape == (SEQS, 1, PAST + Q_LEN, 32)
    ops = {op.target: op for task in body.tasks for op in task.ops}
    assert ops["dovetail.kv_update"] == Op(
        "dovetail.kv_update", (Ref("k"), Ref("v")), ("k_all", "v_all")
    )
    assert ops["dovetail.experts"].args == (Ref("x"), Ref("expert_idx"), Ref("expert_w"))
    assert ops["dovetail.attention"].args[3:] == (None, 32**-0.5, 0)
    targets = {op.target for task in body.tasks for op in task.ops}
    assert not any(t.rsplit(".", 1)[0].endswith("_") for t in targets), "no writes into tensors"
    assert "aten.new_empty.default" not in targets


@pytest.mark.parametrize(("family", "windows"), [("gpt_oss", [5, 0]), ("mixtral", [5])])
def test_windows_of_sliding_layers(family: str, windows: list[int]) -> None:
    ops = [op for b in graph_of(family).bodies for t in b.tasks for op in t.ops]
    assert [op.args[5] for op in ops if op.target == "dovetail.attention"] == windows


def test_weights_and_experts_carry_checkpoint_names() -> None:
    mixtral = experts_of(graph_of("mixtral"), 0)
    stem = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
    assert [(t.part, t.key, t.shape) for t in mixtral.tensors] == [
        ("gate", f"{stem}.w1.weight", (96, 64)),
        ("up", f"{stem}.w3.weight", (96, 64)),
        ("down", f"{stem}.w2.weight", (64, 96)),
    ]
    assert mixtral.split_gate and not mixtral.transposed
    assert mixtral.activation == (
        Op("aten.silu.default", (Ref("g"),), ("silu",)),
        Op("aten.mul.Tensor", (Ref("silu"), Ref("u")), ("a",)),
    )
    router = next(t for t in graph_of("mixtral").bodies[0].tasks if t.role is Role.ROUTER)
    assert router.weights == (
        Weight(
            "model.layers.{layer}.mlp.gate.weight",
            "model.layers.{layer}.block_sparse_moe.gate.weight",
            (8, 64),
            "float32",
        ),
    )
    gpt_oss = experts_of(graph_of("gpt_oss"), 0)
    assert [(t.part, t.shape, t.stacked) for t in gpt_oss.tensors] == [
        ("gate_up", (64, 192), True),
        ("down", (96, 64), True),
        ("gate_up_bias", (192,), True),
        ("down_bias", (64,), True),
    ]
    assert gpt_oss.transposed and not gpt_oss.split_gate
    assert (gpt_oss.count, gpt_oss.top_k, gpt_oss.intermediate) == (8, 2, 96)


def test_tied_head_reads_the_embedding() -> None:
    graph = graph_of("mixtral")
    (embed,) = graph.prologue.tasks[0].weights
    (head,) = graph.epilogue.tasks[-1].weights
    assert embed.key == head.key == "model.embed_tokens.weight"


@pytest.mark.parametrize("family", LAYOUTS)
def test_weight_bytes_are_the_models(family: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config_of(family), dtype=torch.float32
        )
    expected = sum(p.nbytes for p in model.parameters())
    extra = sum(b.nbytes for n, b in model.named_buffers() if n.endswith("correction_bias"))
    assert graph_of(family).weight_bytes == expected + extra


@pytest.mark.parametrize("rope", ["default", "yarn"])
def test_constants_are_those_of_a_real_model(rope: str) -> None:
    parameters: dict[str, Any] = {"rope_type": rope, "rope_theta": 5000.0}
    if rope == "yarn":
        parameters |= {"factor": 4.0, "original_max_position_embeddings": 64}
    config = config_of("gpt_oss", rope_parameters=parameters)
    model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    captured = capture_config(config, "bfloat16")
    assert set(captured.constants) == {"model.rotary_emb.inv_freq"}
    assert torch.equal(
        captured.constants["model.rotary_emb.inv_freq"], model.model.rotary_emb.inv_freq
    )


def test_dtypes_are_those_that_loading_gives() -> None:
    graph = capture_config(config_of("deepseek_v3"), "bfloat16").graph
    dtypes = {w.fqn: w.dtype for t in graph.bodies[1].tasks for w in t.weights}
    bias = dtypes.pop("model.layers.{layer}.mlp.gate.e_score_correction_bias")
    assert bias == "float32" and set(dtypes.values()) == {"bfloat16"}
    assert graph.dtype == "bfloat16" and graph.bodies[1].values["k"].dtype == "bfloat16"


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    captured = captured_of(family)
    captured.save(tmp_path / "new" / "folder")
    loaded = load_captured(tmp_path / "new" / "folder")
    assert loaded.graph == captured.graph
    assert canonical(loaded.graph) == canonical(captured.graph)
    assert all(torch.equal(loaded.constants[k], v) for k, v in captured.constants.items())


def test_load_refuses_a_folder_without_a_graph(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="holds no readable captured model"):
        load_captured(tmp_path)


REAL = """
import sys
from pathlib import Path
from transformers import AutoConfig
from dovetail.capture.capture import capture_config
from dovetail.ir.codec import digest
captured = capture_config(AutoConfig.for_model("deepseek_v3"), "bfloat16")
# Of this program alone: getrusage counts what the process held before it became this one.
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0])
print(digest(captured.graph), peak)
print(f"captured in {captured.seconds:.1f} s", file=sys.stderr)
"""


def test_deepseek_v3_at_full_size_needs_little_memory_and_is_deterministic() -> None:
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    with subprocess.Popen(
        [sys.executable, "-c", REAL],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
    ) as other:
        graph = capture_config(AutoConfig.for_model("deepseek_v3"), "bfloat16").graph
        out, log = other.communicate(timeout=240)
    assert other.returncode == 0, log
    print(log)
    assert graph.weight_bytes // 2 == pytest.approx(671.0e9, rel=1e-3)
    assert len(graph.layers) == 61 and len(graph.bodies) == 2
    their_digest, their_peak = out.split()
    assert their_digest == digest(graph)
    assert int(their_peak) * 1024 < 10**9


def test_entries_of_every_layer_are_enough() -> None:
    graph = graph_of("deepseek_v3")
    assert capture_config(config_of("deepseek_v3"), "float32", entries_of(graph)).graph == graph


def test_stored_dtype_decides_when_the_config_does_not() -> None:
    entries = {k: ("float16", s) for k, (_, s) in entries_of(graph_of("olmoe")).items()}
    assert capture_config(config_of("olmoe"), entries=entries).graph.dtype == "float16"


def test_mask_rules() -> None:
    assert mask_rule(masking_utils.causal_mask_function) == MaskRule(0)
    assert mask_rule(masking_utils.sliding_window_causal_mask_function(7)) == MaskRule(7)
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(1))
    assert mask_rule(chunked) == MaskRule(0, chunk=4)


@pytest.mark.parametrize(
    "function",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function(7),
        masking_utils.or_masks(
            masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
        ),
    ],
)
def test_other_masks_are_refused(function: Any) -> None:
    with pytest.raises(CaptureError, match="knows causal, sliding-window and chunked causal"):
        mask_rule(function)


class Writes(nn.Module):
    """Fills an empty tensor in parts, and divides in place."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` [rows, 3], ``y`` [rows, 2] to [rows, 5]."""
        whole = x.new_empty(x.shape[0], 5)
        whole[..., :3].copy_(x)
        whole[..., 3:].copy_(y)
        total = whole.exp()
        total /= total.sum(-1, keepdim=True)
        return total + whole


class WritesThroughView(nn.Module):
    """Writes into a view of a tensor that is read again."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [rows, 3] to the same shape."""
        copy = x * 1
        copy[:, 0].mul_(2)
        return copy


def test_writes_become_values() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    program = torch.export.export(Writes(), (x, y), strict=False)
    before = [str(n.target) for n in program.graph.nodes]
    clean(program.graph)
    after = [str(n.target) for n in program.graph.nodes]
    assert "aten.copy_.default" in before and "aten.div_.Tensor" in before
    assert not any("copy_" in t or "div_" in t or "empty" in t for t in after)
    (result,) = torch.fx.Interpreter(program.graph_module).run(x, y)
    assert torch.equal(result, Writes()(x, y))


def test_write_through_a_view_is_refused() -> None:
    program = torch.export.export(WritesThroughView(), (torch.randn(4, 3),), strict=False)
    with pytest.raises(CaptureError, match="writes into a tensor that is seen from elsewhere"):
        clean(program.graph)


def test_sizes_are_written_in_the_dims() -> None:
    values = graph_of("olmoe").bodies[0].values
    assert values["x"].shape == (parse_expr("seqs*q_len"), 64)
    assert values["expert_idx"].dtype == "int64"
