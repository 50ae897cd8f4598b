"""Regions of a module in memory: submodules that can be computed in more than one way.

These are the routed experts of transformers' models, and users' own blocks (a Python loop over a
ModuleList) whose routing is recognised by what they compute.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dovetail.capture.user_moe import UserMoe, find_user_moe, routed_forward
from dovetail.doors.hf_experts import experts_forward
from dovetail.runtime.routed_experts import run_expert_modules

BATCHED_TOKENS = 8
"""Above so many tokens the batched implementation, which copies every token's experts, is not
tried: it takes ten times as long as the others and that much memory."""
Implementation = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Region:
    """A submodule at ``path`` of some ``kind`` (regions of a kind share choices). ``routing`` is
    the rule of a user's own block; transformers' experts have none."""

    path: str
    kind: str
    module: nn.Module
    routing: UserMoe | None = None

    @property
    def layer(self) -> int:
        """The number of the layer that it is in, -1 outside of layers."""
        return next((int(part) for part in self.path.split(".") if part.isdigit()), -1)

    def accepts(self, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
        """Whether a call is one that other implementations know: a user's block is recognised with
        its hidden states alone, every further argument at its default."""
        return self.routing is None or (len(arguments) == 1 and not options)

    def implementations(self, tokens: int) -> Mapping[str, Implementation]:
        """Ways to compute it other than its own, by name, called as ``(module, *inputs)``."""
        if self.routing is not None:
            return {"dovetail": _routed(self.module, self.routing)}
        from transformers.integrations import moe

        config: Any = self.module.config
        own = config._experts_implementation
        found: dict[str, Implementation] = {
            "dovetail": experts_forward,
            "grouped_mm": moe.grouped_mm_experts_forward,
        }
        if tokens <= BATCHED_TOKENS:
            found["batched_mm"] = moe.batched_mm_experts_forward
        return {name: run for name, run in found.items() if name != own}


def _routed(block: nn.Module, routing: UserMoe) -> Implementation:
    """A user's block with its experts run as ``run_expert_modules``."""
    experts = list(block.get_submodule(routing.experts).children())
    forward = routed_forward(block, routing, lambda x, i, w: run_expert_modules(x, i, w, experts))
    return lambda module, hidden_states: forward(hidden_states)


def find_regions(module: nn.Module) -> tuple[list[Region], list[str]]:
    """The regions of ``module``, and for what only looks like routed experts why it is none.

    Runs the blocks that may be a user's own on a few random tokens, to see what they compute.
    """
    found = [
        Region(path, _kind(child), child)
        for path, child in module.named_modules()
        if path and hasattr(child, "_apply_gate") and hasattr(child, "is_transposed")
    ]
    if any(weight.is_meta for weight in module.parameters()):
        return found, []
    blocks, notes = find_user_moe(module)
    for block in blocks:
        own = module.get_submodule(block.path)
        rule = f"top {block.top_k} by {block.scores}{', normalised' if block.normalised else ''}"
        found.append(Region(block.path, f"{_kind(own)}, {rule}", own, block))
    return found, notes


def _kind(module: nn.Module) -> str:
    """What regions with the same choices share: class, shapes, activation."""
    shapes: dict[str, int] = {}
    for name, weight in module.named_parameters():
        text = f"{re.sub('[0-9]+', '#', name)} {list(weight.shape)}"
        shapes[text] = shapes.get(text, 0) + 1
    said = ", ".join(f"{n} x {text}" if n > 1 else text for text, n in shapes.items())
    act = getattr(module, "act_fn", None)
    return f"{type(module).__name__}({said}){f', {type(act).__name__}' if act is not None else ''}"


def circumstances(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> str:
    """What else a choice depends on: dtype and device of the inputs, and torch's threads."""
    first = next(inputs_of(arguments, options))
    dtype = str(first.dtype).removeprefix("torch.")
    return f"{dtype} on {first.device.type}, {torch.get_num_threads()} threads"


def inputs_of(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among a region's inputs."""
    yield from (value for value in (*arguments, *options.values()) if isinstance(value, Tensor))


def tokens_of(arguments: tuple[Any, ...], options: Mapping[str, Any]) -> int:
    """Rows of the region's first input."""
    first = next(inputs_of(arguments, options))
    return first.numel() // first.shape[-1]


def agrees(found: Tensor, expected: Tensor) -> str | None:
    """Why ``found`` cannot stand for ``expected``, or None if it can.

    Sums in another order differ by rounding: allowed is a few units of the dtype's precision times
    the largest value.
    """
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return (
            f"gives {found.dtype} {list(found.shape)} where eager gives {expected.dtype} "
            f"{list(expected.shape)}"
        )
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    worst = float((found.double() - expected.double()).abs().max()) if expected.numel() else 0.0
    allowed = 32 * torch.finfo(expected.dtype).eps * scale
    if not worst <= allowed:
        return f"differs from eager by up to {worst:.3g}, more than rounding ({allowed:.3g})"
    return None
