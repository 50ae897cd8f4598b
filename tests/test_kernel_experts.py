"""Experts of task graphs as kernels see them: activations recognised, places, what is refused."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dovetail.capture.experts import trace_activation
from dovetail.codegen.gate.cases import LAYERS
from dovetail.codegen.kernels.activation import recognise
from dovetail.codegen.kernels.addresses import expert_addresses, slot_addresses
from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.choose import choose_layer
from dovetail.codegen.kernels.of_experts import layer_of_experts, packed
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_parts import Activation, Place
from dovetail.ir.task_graph import Experts, ExpertTensor

INTER = 24
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def gpt_oss(h: Tensor) -> Tensor:
    gate, up = h[..., ::2].clamp(max=5.5), h[..., 1::2].clamp(-5.5, 5.5)
    return (up + 1) * gate * torch.sigmoid(gate * 1.7)


FORMS = {
    "silu of halves": (
        lambda h: torch.nn.functional.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
        Activation("swiglu"),
    ),
    "up times silu, by slices": (
        lambda h: h[:, INTER:] * (h[:, :INTER] * torch.sigmoid(h[:, :INTER])),
        Activation("swiglu"),
    ),
    "gelu, by split": (
        lambda h: torch.nn.functional.gelu(h.split(INTER, -1)[0]) * h.split(INTER, -1)[1],
        Activation("geglu"),
    ),
    "gelu by tanh": (
        lambda h: torch.nn.functional.gelu(h[:, :INTER], approximate="tanh") * h[:, INTER:],
        Activation("geglu_tanh"),
    ),
    "relu of halves": (lambda h: h[:, :INTER].relu() * h[:, INTER:], Activation("reglu")),
    "pairs side by side": (
        lambda h: torch.nn.functional.silu(h[:, 0::2]) * h[:, 1::2],
        Activation("swiglu", "interleaved"),
    ),
    "clamped pairs": (gpt_oss, Activation("clamped", "interleaved", 1.7, 5.5)),
    "reordered pairs": (
        lambda h: torch.nn.functional.silu(
            h.reshape(-1, INTER, 2).transpose(-1, -2).flatten(-2).chunk(2, -1)[0]
        ) * h.reshape(-1, INTER, 2).transpose(-1, -2).flatten(-2).chunk(2, -1)[1],
        Activation("swiglu", "interleaved"),
    ),
    "relu squared": (lambda h: h.relu().square(), Activation("relu2")),
    "gelu alone": (torch.nn.functional.gelu, Activation("gelu")),
    "silu alone": (torch.nn.functional.silu, Activation("silu")),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_activations_are_recognised_however_they_are_written(name: str) -> None:
    function, expected = FORMS[name]
    wide = 2 * INTER if expected.gated else INTER
    ops, split = trace_activation(function, name, wide, torch.float32)
    assert recognise(ops, INTER, expected.gated, split) == expected


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda h: h[:, :INTER].relu() * h[:, INTER:] * 2, "no kernel computes the experts' activ"),
        (lambda h: h[:, :INTER].cumsum(-1) * h[:, INTER:], "the operator aten.cumsum.default"),
    ],
)
def test_other_activations_are_refused(function: object, text: str) -> None:
    ops, split = trace_activation(function, "x", 2 * INTER, torch.float32)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=text):
        recognise(ops, INTER, True, split)


def experts(
    *tensors: ExpertTensor, form: str = "silu of halves", transposed: bool = False
) -> Experts:
    """Four experts of 16 × 24 with these tensors."""
    function, act = FORMS[form]
    wide = 2 * INTER if act.gated else INTER
    ops, split = trace_activation(function, "x", wide, torch.bfloat16)
    return Experts(4, 2, 16, INTER, tensors, ops, split, transposed)


def tensor(
    part: str, *shape: int, dtype: str = "bfloat16", transposed: bool = False
) -> ExpertTensor:
    return ExpertTensor(part, f"{part}.{{expert}}", shape, dtype, transposed)


GATE, UP, DOWN = tensor("gate", INTER, 16), tensor("up", INTER, 16), tensor("down", 16, INTER)


def test_tensors_of_an_expert_follow_each_other() -> None:
    layer = layer_of_experts("a", experts(GATE, UP, DOWN))
    assert layer.up_place == Place((0, 384)) and layer.down_place == Place((768,))
    assert (layer.up.order, layer.down.order) == ("nk", "nk")
    assert packed(experts(DOWN, GATE, UP)) == {"down": 0, "gate": 768, "up": 1536}
    moved = layer_of_experts("a", experts(GATE, UP, DOWN), {"gate": 64, "up": 1024, "down": 4096})
    assert moved.up_place == Place((32, 512)) and moved.down_place == Place((2048,))


def test_transposed_biased_and_ungated_experts() -> None:
    one = experts(
        tensor("gate_up", 16, 2 * INTER), tensor("gate_up_bias", 2 * INTER),
        tensor("down", INTER, 16), tensor("down_bias", 16), form="clamped pairs", transposed=True,
    )  # fmt: skip
    layer = layer_of_experts("a", one)
    assert (layer.up.order, layer.down.order, layer.bias) == ("kn", "kn", True)
    assert layer.up_place == Place((0,), (768,)) and layer.down_place == Place((816,), (1200,))
    only_down = tensor("down", INTER, 16, transposed=True)
    plain = layer_of_experts("b", experts(UP, only_down, form="relu squared"))
    assert (plain.up.order, plain.down.order) == ("nk", "kn")
    assert plain.activation == Activation("relu2")
    kernels = choose_layer(plain, ARCHS["sm_90"], (1, 16))
    assert kernels.up.outputs == kernels.up.n == INTER


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (
            experts(tensor("gate", INTER, 16, dtype="uint8"), UP, DOWN),
            "a: its experts are stored as bfloat16 and uint8; kernels for experts in slots take",
        ),
        (
            experts(tensor("gate", 16, INTER, transposed=True), UP, DOWN),
            "of gate and up one is transposed",
        ),
        (
            experts(GATE, UP, DOWN, tensor("down_bias", 16)),
            "some of its experts' products have a bias",
        ),
        (
            experts(GATE, UP, DOWN, form="pairs side by side"),
            "gate and up are apart, but the activation takes them in pairs",
        ),
    ],
)
def test_experts_that_no_kernel_runs_are_refused(made: Experts, text: str) -> None:
    with pytest.raises(InputError, match=text):
        layer_of_experts("a", made)


def test_a_place_within_an_element_is_refused() -> None:
    with pytest.raises(InputError, match="up begins at byte 7 of an expert, kernels expect whole"):
        layer_of_experts("a", experts(GATE, UP, DOWN), {"gate": 0, "up": 7, "down": 64})


def test_addresses_come_from_slots_and_from_tensors() -> None:
    pool = torch.zeros(6, 32, dtype=torch.uint8)
    slots = torch.tensor([4, -1, 0], dtype=torch.int32)
    base = pool.data_ptr()
    assert slot_addresses(pool, 32, slots).tolist() == [base + 128, 0, base]
    table = torch.zeros(3, dtype=torch.int64)
    assert slot_addresses(pool, 32, slots, table) is table and table[0] == base + 128
    assert expert_addresses({2: pool[1]}, 3, "cpu").tolist() == [0, 0, base + 32]


def test_misaligned_experts_are_refused() -> None:
    pool = torch.zeros(6, 40, dtype=torch.uint8)
    with pytest.raises(
        InputError, match=r"slots of 40 bytes from address .* multiples of 16 bytes"
    ):
        slot_addresses(pool, 40, torch.zeros(1, dtype=torch.int32))
    with pytest.raises(
        InputError, match=r"expert 0 lies at .*: kernels expect experts in one piece"
    ):
        expert_addresses({0: pool[0, 4:]}, 1, "cpu")
    with pytest.raises(InputError, match=r"expert 0 lies at .*, not contiguous: kernels expect"):
        expert_addresses({0: pool[::2, :16]}, 1, "cpu")


@needs_triton
def test_the_runner_refuses_what_it_is_not_for(tmp_path: Path) -> None:
    from dovetail.codegen.kernels.experts_runner import ExpertsRunner
    from dovetail.codegen.kernels.layer import LayerRunner, buffer_bytes

    layer = LAYERS["slots, gate and up apart"]
    ladder = [choose_layer(layer, ARCHS["sm_90"], (1, 4))]
    with pytest.raises(InputError, match="ExpertsRunner runs such layers"):
        LayerRunner(layer, ladder, 4, "cpu", tmp_path)
    with pytest.raises(InputError, match="5 tokens, its kernels are for at most 4"):
        ExpertsRunner(layer, ladder, 5, "cpu", tmp_path)
    other = dataclasses.replace(layer, up_place=None, down_place=None)
    with pytest.raises(InputError, match="this runner takes routed experts at addresses"):
        ExpertsRunner(other, ladder, 4, "cpu", tmp_path)
    runner = ExpertsRunner(layer, ladder, 4, "cpu", tmp_path)
    assert runner.nbytes == buffer_bytes(layer, ladder, 4) > 0
    with pytest.raises(InputError, match="run comes after begin"):
        runner.run(torch.zeros(6, dtype=torch.int64), torch.zeros(3, 96))
    x, ids = torch.zeros(3, 96), torch.zeros(3, 2, dtype=torch.int64)
    with pytest.raises(InputError, match=r"found x \[3, 96\] of torch.float32, ids \[3, 2\]"):
        runner.begin(x, ids, torch.zeros(3, 2))
