"""Which slot of its layer a node belongs to: by data flow, module paths only break ties."""

from collections.abc import Callable, Iterable
from enum import IntEnum

from torch import fx

from dovetail.capture.clean import module_path, name_of
from dovetail.capture.lower import MODULE, seam
from dovetail.ir.errors import CaptureError
from dovetail.ir.task_graph import Role


class Slot(IntEnum):
    """The consecutive parts of a layer; each becomes at most one task."""

    NORM = 0
    BEFORE_KV = 1
    KV = 2
    AFTER_KV = 3
    SECOND_NORM = 4
    ROUTER = 5
    SHARED = 6
    EXPERTS = 7
    COMBINE = 8
    MLP = 9


SLOT_ROLES = {
    Slot.NORM: Role.NORM,
    Slot.BEFORE_KV: Role.ATTENTION,
    Slot.KV: Role.KV,
    Slot.AFTER_KV: Role.ATTENTION,
    Slot.SECOND_NORM: Role.NORM,
    Slot.ROUTER: Role.ROUTER,
    Slot.SHARED: Role.SHARED_EXPERT,
    Slot.EXPERTS: Role.EXPERTS,
    Slot.COMBINE: Role.OTHER,
    Slot.MLP: Role.MLP,
}
_MATMULS = ("aten.linear", "aten.mm", "aten.addmm", "aten.matmul", "aten.bmm", "aten.baddbmm")
Nodes = set[fx.Node]


def layer_slots(nodes: list[fx.Node], layer_path: str) -> dict[fx.Node, Slot]:
    """The slot of every node of one layer; raises CaptureError when the layer has another form."""
    layer = _Layer(nodes, layer_path)
    slots = {node: layer.slot(node) for node in nodes}
    if layer.after_kv:
        _split_second_norm(nodes, slots, layer)
    _settle(nodes, slots, layer_path)
    return slots


class _Layer:
    """Reachability in one layer, and the modules around its seams."""

    def __init__(self, nodes: list[fx.Node], path: str) -> None:
        self.path = path
        self.kv = _at_most_one(nodes, "dovetail.kv_update", path)
        self.attention = _at_most_one(nodes, "dovetail.attention", path)
        if (self.kv is None) != (self.attention is None):
            raise CaptureError(
                f"{path} calls {'attention' if self.kv is None else 'the KV cache'} alone, "
                "expected both or neither: dovetail knows layers whose attention reads their own KV"
            )
        whole = next((n for n in nodes if seam(n) == MODULE), None)
        anchor = self.attention or whole
        self.attention_path = module_path(anchor) if anchor else "no module"
        experts = [n for n in nodes if seam(n) == "dovetail.experts"]
        if len(experts) > 1:
            raise CaptureError(f"{path} has {len(experts)} groups of experts, expected one")
        inside = set(nodes)
        self.experts = set(experts)
        self.feeds_experts = _reach(experts, inside, lambda n: n.all_input_nodes)
        self.uses_experts = _reach(experts, inside, lambda n: n.users) - self.experts
        mixed = [n for n in (self.kv, anchor) if n is not None]
        self.after_kv = _reach(mixed, inside, lambda n: n.users)
        attention = {n for n in nodes if self.in_attention(n)}
        self.feeds_attention = _reach(attention, inside, lambda n: n.all_input_nodes) - attention
        self._blocks = self._forward_blocks(nodes)
        self._feeds_blocks = _reach(
            [n for n in nodes if self._in_block(n)], inside, lambda n: n.all_input_nodes
        )

    def in_attention(self, node: fx.Node) -> bool:
        path = module_path(node)
        return path == self.attention_path or path.startswith(f"{self.attention_path}.")

    def child(self, node: fx.Node) -> str:
        """The direct child module of the layer that ``node`` ran in; '' for the layer itself."""
        return module_path(node).removeprefix(self.path).strip(".").split(".")[0]

    def _forward_blocks(self, nodes: list[fx.Node]) -> set[str]:
        """Children besides attention that multiply matrices or hold experts."""
        return {
            self.child(n)
            for n in nodes
            if not self.in_attention(n) and (n in self.experts or name_of(n).startswith(_MATMULS))
        } - {""}

    def _in_block(self, node: fx.Node) -> bool:
        return self.child(node) in self._blocks and not self.in_attention(node)

    def slot(self, node: fx.Node) -> Slot:
        if node is self.kv:
            return Slot.KV
        if self.in_attention(node):
            return Slot.AFTER_KV if node in self.after_kv else Slot.BEFORE_KV
        if node not in self.after_kv and node in self.feeds_attention:
            return Slot.NORM
        if not self._in_block(node) and node in self._feeds_blocks:
            return Slot.SECOND_NORM
        if not self.experts:
            return Slot.MLP
        if node in self.experts:
            return Slot.EXPERTS
        if node in self.uses_experts:
            return Slot.COMBINE
        return Slot.ROUTER if node in self.feeds_experts else Slot.SHARED


def _split_second_norm(nodes: list[fx.Node], slots: dict[fx.Node, Slot], layer: _Layer) -> None:
    """Everything up to the residual add after attention belongs to the attention task."""
    between = [n for n in nodes if slots[n] is Slot.SECOND_NORM]
    residual = [i for i, n in enumerate(between) if layer.child(n) == ""]
    for node in between[: residual[-1] + 1 if residual else 0]:
        slots[node] = Slot.AFTER_KV


def _at_most_one(nodes: list[fx.Node], kind: str, path: str) -> fx.Node | None:
    found = [n for n in nodes if seam(n) == kind]
    if len(found) > 1:
        raise CaptureError(
            f"{path} calls {kind.removeprefix('dovetail.')} {len(found)} times, expected once: "
            "dovetail knows decoder layers with one attention and its KV cache"
        )
    return found[0] if found else None


def _reach(
    start: Iterable[fx.Node], inside: Nodes, step: Callable[[fx.Node], Iterable[fx.Node]]
) -> Nodes:
    seen: Nodes = set()
    pending = list(start)
    while pending:
        node = pending.pop()
        if node in inside and node not in seen:
            seen.add(node)
            pending.extend(step(node))
    return seen


def _settle(nodes: list[fx.Node], slots: dict[fx.Node, Slot], path: str) -> None:
    """Move what reads a later slot into that slot, or past it where a seam stands alone there."""
    for node in nodes:
        sources = [slots[n] for n in node.all_input_nodes if n in slots]
        least = max(sources, default=Slot.NORM)
        if least <= slots[node]:
            continue
        if slots[node] in (Slot.KV, Slot.EXPERTS):
            raise CaptureError(
                f"{path}: {name_of(node)} in {module_path(node)} belongs to "
                f"{slots[node].name.lower()} but reads {least.name.lower()}; the layer does not "
                "have the order attention, then experts or MLP"
            )
        slots[node] = {Slot.KV: Slot.AFTER_KV, Slot.EXPERTS: Slot.COMBINE}.get(least, least)
