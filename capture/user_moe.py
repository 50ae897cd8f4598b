"""A user's own Mixture-of-Experts block, recognised by what it computes and not by how it is
written.

Such a block loops over an ``nn.ModuleList`` with ``torch.where`` and ``index_add_`` or the like,
which no tracer gets through. Whatever the loop, its result is linear in what the experts return: so
experts that return unit vectors show the routing weights, and the weights tell the router's rule.
The rule is taken only if the block then computes the same as the loop.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dovetail.ir.errors import CaptureError

_TOKENS = 37
Scores = Literal["softmax", "sigmoid"]
ExpertsOp = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Computes ``sum_k w[t, k] * expert[idx[t, k]](x[t])`` from ``x [tokens, hidden]``, ``idx`` and ``w
[tokens, top_k]``."""


@dataclass(frozen=True, slots=True)
class UserMoe:
    """A recognised block at ``path``: ``scale`` times the ``top_k`` largest ``scores`` of the
    linear layer ``router``, made to add up to one if ``normalised``, weigh the modules in
    ``experts``. ``shared`` (may be "") is added for every token; the router's outputs are returned
    too if ``gives_logits``."""

    path: str
    experts: str
    router: str
    count: int
    top_k: int
    scores: Scores
    normalised: bool
    scale: float
    shared: str = ""
    gives_logits: bool = False


def find_user_moe(model: nn.Module) -> tuple[list[UserMoe], list[str]]:
    """The blocks of ``model`` that are recognised, and for those that only look like one what was
    found and why it was not taken. Needs weights with data; leaves the model as it was."""
    found: list[UserMoe] = []
    notes: list[str] = []
    for path, block in model.named_modules():
        parts = _parts(block)
        if parts is None:
            continue
        known = recognise(block, path)
        if isinstance(known, UserMoe):
            found.append(known)
        else:
            kind = type(block).__name__
            notes.append(
                f"{path or 'the model'} ({kind}) has {parts.count} experts of one shape in "
                f"{parts.experts!r} and a router {parts.router!r}, but runs as it is, as one task: "
                f"{known}"
            )
    return found, notes


@dataclass(frozen=True, slots=True)
class _Parts:
    experts: str
    router: str
    count: int
    width: int


def _parts(block: nn.Module) -> _Parts | None:
    """A list of modules of one shape, and a linear layer with an output for each."""
    for name, experts in block.named_children():
        if not isinstance(experts, nn.ModuleList) or len(experts) < 2:
            continue
        if len({_shape(expert) for expert in experts}) != 1:
            continue
        for other, router in block.named_children():
            if isinstance(router, nn.Linear) and router.out_features == len(experts):
                return _Parts(name, other, len(experts), router.in_features)
    return None


def _shape(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple((n, tuple(p.shape)) for n, p in module.named_parameters())


@dataclass(slots=True)
class _Run:
    """What one run of the block showed."""

    result: Tensor
    extra: tuple[Any, ...]
    logits: Tensor


def recognise(block: nn.Module, path: str = "") -> UserMoe | str:
    """The block's rule, or why it has none that is known."""
    parts = _parts(block)
    if parts is None:
        return "expected a ModuleList of experts of one shape and a linear router over them"
    example = next(block.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, _TOKENS, parts.width, generator=generator).to(example)
    training, why = block.training, ""
    try:
        with torch.no_grad():
            block.train(False)
            # Some blocks take sequences of tokens, some take tokens.
            for tokens in (x, x[0]):
                try:
                    return _recognise(block, parts, tokens, path)
                except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
                    text = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                    why = why or f"it does not run on {list(tokens.shape)}: {text}"
    finally:
        block.train(training)
    return why


def _recognise(block: nn.Module, parts: _Parts, x: Tensor, path: str) -> UserMoe | str:
    real = _run(block, parts, x)
    if real.result.shape[-1] != parts.width or real.result.numel() != x.numel():
        return f"it returns {list(real.result.shape)}, expected the shape of its input"
    rest = _run(block, parts, x, lambda _, z: torch.zeros_like(z))
    weights = _routing(block, parts, x, rest.result)
    chosen = (weights != 0).sum(-1)
    top_k = int(chosen.max())
    if top_k == 0 or bool((chosen != top_k).any()):
        return (
            f"its tokens go to {int(chosen.min())} to {top_k} experts, expected the same number "
            "for each"
        )
    rule = _rule(weights, real.logits.float(), top_k)
    if rule is None:
        return (
            "its routing weights are neither the softmax nor the sigmoid of the router's outputs "
            "at the largest of them, with or without dividing by their sum"
        )
    shared = _shared(block, parts, x, rest.result)
    if shared is None:
        return "it adds something to the experts that is not the output of one of its modules"
    gives = len(real.extra) == 1 and _same(real.extra[0], real.logits)
    if real.extra and not gives:
        return "it returns more than the hidden states and the router's outputs"
    moe = UserMoe(
        path, parts.experts, parts.router, parts.count, top_k, *rule, shared, gives_logits=gives
    )
    again = routed_forward(block, moe, looped_experts(block, moe))(x)
    if not _same((again[0] if gives else again).reshape(real.result.shape), real.result):
        return "its experts see something else than the tokens as they come in"
    return moe


def _same(a: Any, b: Tensor) -> bool:
    if not isinstance(a, Tensor) or a.numel() != b.numel():
        return False
    a, b = a.reshape(b.shape).double(), b.double()
    allowed = 64 * torch.finfo(b.dtype if b.dtype != torch.float64 else torch.float32).eps
    limit = max(allowed, 1e-5) * float(b.abs().max().clamp(min=1e-6))
    return float((a - b).abs().max()) <= limit


def _run(
    block: nn.Module,
    parts: _Parts,
    x: Tensor,
    stand_in: Callable[[int, Tensor], Tensor] | None = None,
) -> _Run:
    """Run the block, its experts replaced by ``stand_in(number, input)`` if that is given."""
    logits: list[Tensor] = []
    router = block.get_submodule(parts.router)
    hook = router.register_forward_hook(lambda _m, _a, out: logits.append(out))
    try:
        with _replaced(block.get_submodule(parts.experts), stand_in):
            out = block(x)
    finally:
        hook.remove()
    if len(logits) != 1:
        raise ValueError(f"the router ran {len(logits)} times, expected once")
    first, *extra = out if isinstance(out, tuple) else (out,)
    return _Run(first, tuple(extra), logits[0].reshape(-1, parts.count))


@contextmanager
def _replaced(
    experts: nn.Module, stand_in: Callable[[int, Tensor], Tensor] | None
) -> Iterator[None]:
    modules = list(experts.children()) if stand_in is not None else []
    for number, expert in enumerate(modules):
        expert.forward = lambda z, n=number: stand_in(n, z)  # type: ignore[misc]
    try:
        yield
    finally:
        for expert in modules:
            del expert.forward


def _routing(block: nn.Module, parts: _Parts, x: Tensor, rest: Tensor) -> Tensor:
    """The weight of every expert for every token, ``[tokens, experts]``: expert n stands for the
    n-th unit vector, as many at a time as the hidden state is wide."""
    found = []
    for first in range(0, parts.count, parts.width):
        here = range(first, min(first + parts.width, parts.count))

        def unit(number: int, z: Tensor, here: range = here) -> Tensor:
            out = torch.zeros_like(z)
            if number in here:
                out[..., number - here.start] = 1.0
            return out

        part = (_run(block, parts, x, unit).result - rest).reshape(-1, parts.width)
        found.append(part[:, : len(here)].float())
    weights = torch.cat(found, -1)
    return torch.where(weights.abs() < 1e-7, 0.0, weights)


def _rule(weights: Tensor, logits: Tensor, top_k: int) -> tuple[Scores, bool, float] | None:
    """Scores, whether they are normalised, and the factor that give ``weights``."""
    rules: tuple[Scores, ...] = ("softmax", "sigmoid")
    for scores in rules:
        for normalised in (False, True):
            value, index = _top(logits, top_k, scores, normalised)
            expected = torch.zeros_like(weights).scatter_(-1, index, value)
            scale = float(weights.sum() / expected.sum())
            if _same(expected * scale, weights):
                return scores, normalised, 1.0 if abs(scale - 1) < 1e-3 else scale
    return None


def _top(logits: Tensor, top_k: int, scores: Scores, normalised: bool) -> tuple[Tensor, Tensor]:
    all_scores = logits.softmax(-1) if scores == "softmax" else logits.sigmoid()
    value, index = all_scores.topk(top_k, -1)
    return (value / value.sum(-1, keepdim=True) if normalised else value), index


def _shared(block: nn.Module, parts: _Parts, x: Tensor, rest: Tensor) -> str | None:
    """The module whose output is all that the block adds; "" where it adds nothing."""
    if not bool(rest.any()):
        return ""
    for name, child in block.named_children():
        if name in (parts.experts, parts.router):
            continue
        try:
            out = child(x)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            continue
        if _same(out, rest):
            return name
    return None


def routed_forward(block: nn.Module, moe: UserMoe, experts: ExpertsOp) -> Callable[..., Any]:
    """A forward for ``block`` without data-dependent control flow: router, one call of ``experts``,
    shared module. It can be traced if ``experts`` can."""
    router = block.get_submodule(moe.router)
    shared = block.get_submodule(moe.shared) if moe.shared else None

    def forward(hidden_states: Tensor) -> Any:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = router(x)
        weight, index = _top(logits.float(), moe.top_k, moe.scores, moe.normalised)
        y = experts(x, index, (weight * moe.scale).to(x.dtype)).view(hidden_states.shape)
        y = y if shared is None else y + shared(hidden_states)
        return (y, logits) if moe.gives_logits else y

    return forward


def looped_experts(block: nn.Module, moe: UserMoe) -> ExpertsOp:
    """The experts by running each module once over all of its tokens."""
    modules = list(block.get_submodule(moe.experts).children())

    def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for number in torch.unique(index).tolist():
            token, place = torch.where(index == number)
            y.index_add_(0, token, modules[number](x[token]) * weight[token, place, None])
        return y

    return run


def opaque_experts(moe: UserMoe) -> ExpertsOp:
    """The experts as the one operator that a traced graph shows, ``dovetail::experts``."""
    name = f"{moe.path}.{moe.experts}".removeprefix(".")

    def run(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = torch.ops.dovetail.experts(x, index, weight, name)
        return y

    return run


@contextmanager
def as_experts_tasks(model: nn.Module, blocks: list[UserMoe]) -> Iterator[None]:
    """Within the block the recognised parts of ``model`` are one experts operator each; raises
    CaptureError when hooks sit on their experts, which would not run."""
    for moe in blocks:
        for name, inner in model.get_submodule(moe.path).named_modules():
            if inner._forward_hooks or inner._forward_pre_hooks:
                raise CaptureError(
                    f"module {moe.path}.{name} ({type(inner).__name__}) has forward hooks, which "
                    "would not run when its experts are one task: remove the hooks, or compile "
                    "the model without this block"
                )
    try:
        for moe in blocks:
            block = model.get_submodule(moe.path)
            block.forward = routed_forward(block, moe, opaque_experts(moe))
        yield
    finally:
        for moe in blocks:
            vars(model.get_submodule(moe.path)).pop("forward", None)
