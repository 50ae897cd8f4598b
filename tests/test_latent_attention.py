"""Attention over latents: absorbed and expanded give the same in any type, and what they cost."""

from typing import Any

import pytest
import torch
from tests.ir_cases import captured
from torch import Tensor

from dovetail.capture.latent import with_latent_attention
from dovetail.ir.expr import evaluate
from dovetail.ir.task_graph import Body, Op, Ref
from dovetail.passes.op_cost import op_costs
from dovetail.runtime.attention import attention
from dovetail.runtime.gpu.attention import gpu_attention
from dovetail.runtime.linear import TiledLinear

HEADS, OWN, SHARED, INNER, VALUE = 4, 16, 8, 24, 12
SCALE = 0.2


class Rows:
    """As much of a KV group as attention over tensors reads."""

    def __init__(self, held: tuple[int, ...], q_len: int) -> None:
        self.held, self.lengths = held, (q_len,) * len(held)

    def memo(self, key: Any, make: Any) -> Any:
        return make()


def tensors(held: tuple[int, ...], q_len: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Query, latents, rotary keys and the weight, in float64 rounded to ``dtype``."""
    torch.manual_seed(3)
    seqs, total = len(held), max(held) + q_len
    shapes = (
        (seqs, HEADS, q_len, OWN + SHARED),
        (seqs, 1, total, INNER),
        (seqs, 1, total, SHARED),
        (HEADS * (OWN + VALUE), INNER),
    )
    return tuple(torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)


def reference(given: tuple[Tensor, ...], held: tuple[int, ...]) -> Tensor:
    """Expanded as the model writes it, in float64."""
    q, latents, rotary, weight = (x.double() for x in given)
    whole = (latents[:, 0] @ weight.T).view(len(q), -1, HEADS, OWN + VALUE).transpose(1, 2)
    keys = torch.cat([whole[..., :OWN], rotary.expand(-1, HEADS, -1, -1)], -1)
    at = torch.tensor(held)[:, None] + torch.arange(q.shape[2])
    seen = torch.arange(keys.shape[2]) <= at[:, None, :, None]
    scores = (q @ keys.transpose(2, 3) * SCALE).masked_fill(~seen, -torch.inf)
    out: Tensor = scores.softmax(-1) @ whole[..., OWN:]
    return out.transpose(1, 2)


@pytest.mark.parametrize("attend", [attention, gpu_attention])
@pytest.mark.parametrize(("held", "q_len"), [((5, 3, 3), 1), ((0, 0), 6), ((4, 2), 3), ((700,), 1)])
def test_absorbed_and_expanded_are_the_models_attention(
    attend: Any, held: tuple[int, ...], q_len: int
) -> None:
    given = tensors(held, q_len, torch.float32)
    q, latents, rotary, weight = given
    group: Any = Rows(held, q_len)
    expand = (TiledLinear((8, 32)), weight)
    found = attend(q, latents, rotary, None, SCALE, 0, group, latent=expand)
    torch.testing.assert_close(found.double(), reference(given, held), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_absorbed_in_16_bits_is_as_near_as_expanded(dtype: torch.dtype) -> None:
    """The contract: no further from the exact result than 1.5 times what the model itself is."""
    held = (40, 33, 17, 60, 2, 9, 21, 5, 11)
    given = tensors(held, 1, dtype)
    q, latents, rotary, weight = given
    group: Any = Rows(held, 1)
    exact = reference(given, held)
    absorbed = attention(
        q, latents, rotary, None, SCALE, 0, group, latent=(TiledLinear((8,)), weight)
    )
    whole = torch.nn.functional.linear(latents, weight)
    whole = whole.view(len(held), -1, HEADS, OWN + VALUE).transpose(1, 2)
    keys = torch.cat((whole[..., :OWN], rotary.expand(-1, HEADS, -1, -1)), -1)
    expanded = attention(q, keys, whole[..., OWN:], None, SCALE, 0, group)
    errors = [(x.double() - exact).pow(2).mean().sqrt() for x in (absorbed, expanded)]
    assert errors[0] <= 1.5 * errors[1]


def test_products_of_16_bits_have_few_numbers_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.bmm

    def counted(x: Tensor, y: Tensor) -> Tensor:
        seen.append(x.shape[1])
        return real(x, y)

    monkeypatch.setattr(torch, "bmm", counted)
    product = TiledLinear((4, 16))
    for rows in range(1, 40):
        x = torch.randn(2, rows, 8).bfloat16()
        made = product.batched(x, torch.ones(2, 8, 3).bfloat16())
        torch.testing.assert_close(made, real(x, torch.ones(2, 8, 3).bfloat16()))
    assert set(seen) == {4, 16}


def latent_op(body: Body) -> tuple[Op, Any]:
    task = next(t for t in body.tasks if any("latent" in op.kwargs for op in t.ops))
    return next(op for op in task.ops if "latent" in op.kwargs), {w.fqn: w for w in task.weights}


def test_deepseek_reads_latents_and_others_stay_as_they_are() -> None:
    body = captured("deepseek_v2").body(1)
    op, weights = latent_op(body)
    (stored,) = [t.writes for t in body.tasks if t.kv is not None]
    assert op.args[1:3] == tuple(Ref(name) for name in stored)
    assert with_latent_attention(body) is body
    costs = op_costs(op, body.values, weights)
    assert [c.kind for c in costs if c.runs(1)] == ["gemm", "copy", "attention"]
    near, far = ({"seqs": 2, "q_len": 1, "past": past} for past in (50, 500))
    decode, prompt = (next(c for c in costs if c.kind == "gemm" and c.runs(n)) for n in (1, 2))
    # To absorb is as much work as to expand one token, however many there are.
    assert evaluate(decode.flops, **near) == evaluate(decode.flops, **far)
    assert evaluate(prompt.flops, seqs=2, q_len=1, past=0) == evaluate(decode.flops, **near)
    attended = next(c for c in costs if c.kind == "attention" and c.runs(1))
    assert body.kv is not None
    assert evaluate(attended.bytes, **near) == 2 * 51 * body.kv.bytes_per_token
    plain = captured("olmoe").body(0)
    assert with_latent_attention(plain) is plain
