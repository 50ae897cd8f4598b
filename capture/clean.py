"""Rewrites of the traced graph, in place: no writes into tensors, no operators without effect."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from dovetail.ir.errors import CaptureError

_ASSERTS = frozenset(
    {
        "aten._assert_tensor_metadata.default",
        "aten._assert_scalar.default",
        "aten.sym_constrain_range_for_size.default",
        "aten.sym_constrain_range.default",
    }
)
_FRESH = frozenset(
    {"aten.new_empty.default", "aten.empty.memory_format", "aten.empty_like.default"}
)
_SAME_LAYOUT = frozenset(
    {
        "aten.to.dtype",
        "aten.to.device",
        "aten.to.dtype_layout",
        "aten.to.other",
        "aten.type_as.default",
        "aten.contiguous.default",
        "aten.slice.Tensor",
        "aten.view.default",
        "aten.reshape.default",
        "aten.expand.default",
    }
)
_IDENTITIES = frozenset(
    {
        "aten.alias.default",
        "aten.detach.default",
        "aten.lift_fresh_copy.default",
        "aten.detach_.default",
    }
)


def clean(graph: fx.Graph) -> None:
    """Apply every rewrite; raises CaptureError when a write cannot be expressed as a value."""
    _assembled_to_cat(graph)
    _writes_to_values(graph)
    _drop_identities(graph)
    # fx cannot know that our operators have no effect besides their results
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def name_of(node: fx.Node) -> str:
    """The operator's name, such as ``aten.linear.default``."""
    return str(node.target)


def _assembled_to_cat(graph: fx.Graph) -> None:
    """``e = empty(..); e[..,:n].copy_(a); e[..,n:].copy_(b)  ->  e = cat([a, b], -1)``"""
    for node in list(graph.nodes):
        if node.op != "call_function" or name_of(node) not in _FRESH:
            continue
        slices = [u for u in node.users if name_of(u) == "aten.slice.Tensor"]
        copies = [u for s in slices for u in s.users if name_of(u) == "aten.copy_.default"]
        if not slices or len(copies) != len(slices) or any(len(s.users) != 1 for s in slices):
            continue
        axis = _tiled_axis(node, slices)
        if axis is None or any(_shape(c.args[1]) != _shape(c.args[0]) for c in copies):
            continue
        with graph.inserting_after(copies[-1]):
            whole = graph.call_function(
                torch.ops.aten.cat.default, ([c.args[1] for c in copies], axis)
            )
        whole.meta = dict(copies[-1].meta) | {"val": node.meta["val"]}
        node.replace_all_uses_with(whole, delete_user_cb=lambda user, s=slices: user not in s)
        for written in (*copies, *slices, node):
            graph.erase_node(written)


def _tiled_axis(node: fx.Node, slices: list[fx.Node]) -> int | None:
    """The axis along which ``slices``, in order, cover ``node`` without gaps."""
    axes = {s.args[1] if len(s.args) > 1 else 0 for s in slices}
    if len(axes) != 1 or any(len(s.args) > 4 for s in slices):
        return None
    axis = axes.pop()
    assert isinstance(axis, int)
    size, reached = node.meta["val"].shape[axis], 0
    for s in slices:
        start, stop = (*s.args[2:4], None, None)[:2]
        if (start or 0) != reached or not isinstance(size, int):
            return None
        reached = size if not isinstance(stop, int) else min(stop, size)
    return axis if reached == size else None


def _shape(node: Any) -> tuple[str, ...]:
    return tuple(str(s) for s in node.meta["val"].shape)


def _writes_to_values(graph: fx.Graph) -> None:
    """``x.op_(..)``, later uses of x  ->  ``y = op(x, ..)``, later uses of y"""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target = node.target
        if not isinstance(target, OpOverload) or not target._schema.is_mutable:
            continue
        functional, base = _functional(node, target), node.args[0]
        assert isinstance(base, fx.Node)
        later = [u for u in base.users if order.get(u, -1) > order[node]]
        _check_unshared(node, base, order)
        node.target = functional
        base.replace_all_uses_with(node, delete_user_cb=set(later).__contains__)


def _check_unshared(node: fx.Node, base: fx.Node, order: dict[fx.Node, int]) -> None:
    views = [u for u in base.users if _is_view(u) and order.get(u, -1) < order[node]]
    read_later = [v for v in views if any(order.get(u, -1) > order[node] for u in v.users)]
    if base.op == "placeholder" or _is_view(base) or read_later:
        raise CaptureError(
            f"{module_path(node) or 'the model'} writes into a tensor that is seen from elsewhere "
            f"({name_of(node)} on {base.name}); dovetail's graph holds values only"
        )


def _is_view(node: fx.Node) -> bool:
    source: Any = node
    while getattr(source.target, "__name__", "") == "getitem":
        source = source.args[0]
    if not isinstance(source.target, OpOverload):
        return False
    returns = source.target._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _functional(node: fx.Node, target: OpOverload) -> OpOverload:
    namespace, _, name = target._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    overload = target._overloadname or "default"
    if packet is None or not name.endswith("_") or overload not in packet.overloads():
        raise CaptureError(
            f"{module_path(node) or 'the model'} calls {name_of(node)}, which writes into its "
            "argument and has no form that returns a value"
        )
    found: OpOverload = getattr(packet, overload)
    return found


def _drop_identities(graph: fx.Graph) -> None:
    """``y = to(x, dtype of x)``, uses of y  ->  uses of x; asserts and eval-mode dropout go too"""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if name_of(node) in _ASSERTS:
            graph.erase_node(node)
        elif _is_identity(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _is_identity(node: fx.Node) -> bool:
    name = name_of(node)
    if name in _IDENTITIES or (name.startswith("aten.dropout") and node.args[2] is False):
        return True
    if name not in _SAME_LAYOUT or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]
    return (
        isinstance(before, Tensor)
        and before.dtype == after.dtype
        and [str(s) for s in before.shape] == [str(s) for s in after.shape]
        and [str(s) for s in before.stride()] == [str(s) for s in after.stride()]
    )


def module_path(node: fx.Node) -> str:
    """The name of the module that ran when ``node`` was traced, without repeat marks; may be ''."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path = list(stack.values())[-1][0].split("@")[0]
    return "" if path.startswith("_empty") else path.removeprefix("lm").removeprefix(".")
