"""What every kernel must compute, in float64 and in the plainest way."""

from collections.abc import Callable

import torch
from torch import Tensor

from dovetail.ir.kernel_parts import Activation
from dovetail.ir.kernel_spec import ActivateSpec, GemmSpec, ReduceSpec, RouteSpec


def activate(act: Activation, outputs: Tensor) -> Tensor:
    """A gated activation of [rows, 2n] float64 outputs, or one without a gate of [rows, n]: [rows,
    n]."""
    if not act.gated:
        return _PLAIN[act.function](outputs)
    if act.pairs == "interleaved":
        gate, up = outputs[:, 0::2], outputs[:, 1::2]
    else:
        gate, up = outputs.chunk(2, dim=1)
    functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "swiglu": lambda g, u: torch.nn.functional.silu(g) * u,
        "geglu": lambda g, u: torch.nn.functional.gelu(g) * u,
        "geglu_tanh": lambda g, u: torch.nn.functional.gelu(g, approximate="tanh") * u,
        "reglu": lambda g, u: g.relu() * u,
        "clamped": lambda g, u: _clamped(g, u, act.alpha, act.limit),
    }
    return functions[act.function](gate, up)


_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu2": lambda h: h.relu().square(),
    "relu": torch.relu,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda h: torch.nn.functional.gelu(h, approximate="tanh"),
}


def _clamped(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def sort(ids: Tensor, experts: int, tile_m: int) -> tuple[list[int], list[int], list[int]]:
    """(slots with padding, expert of each row tile, count of each expert) for ids [slots]."""
    flat = ids.tolist()
    slots: list[int] = []
    owners: list[int] = []
    counts: list[int] = []
    for expert in range(experts):
        mine = [slot for slot, id in enumerate(flat) if id == expert]
        padding = -len(mine) % tile_m
        slots += mine + [len(flat)] * padding
        owners += [expert] * ((len(mine) + padding) // tile_m)
        counts.append(len(mine))
    return slots, owners, counts


def gemm(spec: GemmSpec, x: Tensor, w: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """Outputs [rows, n] of rows x [rows, k] under w [experts, outputs, k] (both float64), each row
    with the expert given, activation applied."""
    y = torch.zeros(x.shape[0], spec.outputs, dtype=torch.float64, device=x.device)
    for expert in range(spec.experts):
        mine = experts == expert
        y[mine] = x[mine] @ w[expert].T
        if bias is not None:
            y[mine] += bias[expert].double()
    return activate(spec.activation, y) if spec.activation else y


def route(spec: RouteSpec, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(ids, weights) [tokens, top_k] of float64 logits [tokens, experts]."""
    score = logits.sigmoid() if spec.score == "sigmoid" else logits.softmax(-1)
    choice = score if bias is None else score + bias.double()
    if spec.groups > 1:
        grouped = choice.reshape(len(logits), spec.groups, -1)
        best = grouped.topk(1 if spec.group_score == "max" else 2, dim=-1).values.sum(-1)
        kept = torch.zeros_like(best, dtype=torch.bool)
        kept.scatter_(1, best.topk(spec.top_groups, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept[..., None], -torch.inf).reshape(choice.shape)
    ids = choice.topk(spec.top_k, dim=-1).indices
    weights = score.gather(1, ids)
    if spec.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights * spec.scale


def reduce(
    spec: ReduceSpec, part: Tensor, ids: Tensor, shared: Tensor | None, gate: Tensor | None
) -> Tensor:
    """y [tokens, n] of part [split_k, tokens · top_k, n]."""
    local = ((ids >= 0) & (ids < spec.experts)).reshape(-1)
    summed = torch.where(local[None, :, None], part.double(), 0.0).sum(0)
    y = summed.reshape(-1, spec.top_k, spec.n).sum(1)
    if shared is not None:
        factor = 1.0 if gate is None else gate.double().sigmoid()[:, None]
        y = y + shared.double() * factor
    return y


def activate_sums(spec: ActivateSpec, part: Tensor) -> Tensor:
    """h [rows, n] of part [split_k, rows, 2n]."""
    return activate(spec.activation, part.double().sum(0))
