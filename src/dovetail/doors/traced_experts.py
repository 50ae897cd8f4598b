"""Routed experts in a graph that Dynamo traced, found by data flow.

`sort tokens by expert -> product -> activation -> product -> weigh, put back, add up` is what
transformers' grouped experts become, whatever the model.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

_PRODUCTS = ("grouped_mm_fallback", "_grouped_mm", "grouped_mm")


@dataclass(frozen=True, slots=True)
class Matched:
    """A region: its inputs ``x [tokens, hidden]``, ``ids`` and ``shares [tokens * top_k]``, its
    products and weights ``[experts, in, out]``, its result, and all nodes in between."""

    x: fx.Node
    ids: fx.Node
    shares: fx.Node
    top_k: int
    up: fx.Node
    down: fx.Node
    up_bias: fx.Node | None
    down_bias: fx.Node | None
    result: fx.Node
    nodes: tuple[fx.Node, ...]
    activation: tuple[fx.Node, ...]

    @property
    def up_weight(self) -> fx.Node:
        """Weights of the first product."""
        return node_of(self.up.args[1])

    @property
    def down_weight(self) -> fx.Node:
        """Weights of the second product."""
        return node_of(self.down.args[1])


class _Mismatch(Exception):
    """A graph that is not what the matcher looks for; the message says where it differs."""


def match_experts(graph: fx.Graph) -> tuple[list[Matched], list[str]]:
    """The routed experts of a graph, and what has grouped products but is not understood."""
    found: list[Matched] = []
    notes: list[str] = []
    taken: set[fx.Node] = set()
    for node in graph.nodes:
        if not _is_product(node) or node in taken:
            continue
        try:
            matched = _match(node)
        except _Mismatch as why:
            notes.append(f"the grouped product {node.name} is not in a region I know: {why}")
            continue
        taken |= {matched.up, matched.down}
        found.append(matched)
    return found, notes


def _is_product(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    name = getattr(node.target, "__name__", str(node.target))
    return any(part in (name, str(node.target).rpartition(".")[2]) for part in _PRODUCTS)


def _match(up: fx.Node) -> Matched:
    gathered = strip_casts(node_of(up.args[0]))
    x, places = _indexed(gathered, "the first product's rows")
    perm, top_k = _floordiv(places)
    sort = _item(perm, 1, "sort")
    ids = node_of(sort.args[0])
    after_sort = _descendants(sort)
    inside = _descendants(up)
    down = next((n for n in inside if _is_product(n) and n is not up), None)
    if down is None:
        raise _Mismatch("no second product follows")
    shares, result = _weighed(down, perm, after_sort)
    nodes = _between(result, {x, ids, shares}, after_sort)
    up_bias, bias_nodes = _bias(up, sort)
    down_bias, _ = _bias(down, sort)
    activation = _activation(up, down, after_sort, bias_nodes)
    for node in nodes:
        outside = [u for u in node.users if u not in nodes and node is not result]
        if outside:
            raise _Mismatch(f"{node.name} is also read by {outside[0].name}")
    return Matched(x, ids, shares, top_k, up, down, up_bias, down_bias, result, nodes, activation)


def node_of(value: object) -> fx.Node:
    """``value`` if it is a node."""
    if not isinstance(value, fx.Node):
        raise _Mismatch(f"found {value!r}, expected a value of the graph")
    return value


def strip_casts(node: fx.Node) -> fx.Node:
    """What ``node`` is a cast of; itself if it is none."""
    while node.op == "call_method" and node.target == "to":
        node = node_of(node.args[0])
    return node


def _indexed(node: fx.Node, what: str) -> tuple[fx.Node, fx.Node]:
    """``a`` and ``b`` of ``a[b]``."""
    if node.target is not operator.getitem or not isinstance(node.args[1], fx.Node):
        raise _Mismatch(f"{what} are not gathered ({node.name})")
    return node_of(node.args[0]), node.args[1]


def _floordiv(node: fx.Node) -> tuple[fx.Node, int]:
    if node.target is not operator.floordiv or type(node.args[1]) is not int:
        raise _Mismatch(f"{node.name} does not say whose token a place is")
    return node_of(node.args[0]), node.args[1]


def _item(node: fx.Node, index: int, name: str) -> fx.Node:
    if node.target is not operator.getitem or node.args[1] != index:
        raise _Mismatch(f"{node.name} is not result {index} of {name}")
    owner = node_of(node.args[0])
    if name not in getattr(owner.target, "__name__", str(owner.target)):
        raise _Mismatch(f"{owner.name} is not {name}")
    return owner


def _descendants(node: fx.Node) -> dict[fx.Node, None]:
    """All that follows from ``node``, in the graph's order; it included."""
    found: dict[fx.Node, None] = {node: None}
    for other in _following(node):
        if any(source in found for source in other.all_input_nodes):
            found[other] = None
    return found


def _following(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node


def _weighed(
    down: fx.Node, perm: fx.Node, after_sort: dict[fx.Node, None]
) -> tuple[fx.Node, fx.Node]:
    """The weights of tokens' experts, and the sum over each token's experts."""
    following = _descendants(down)
    for node in following:
        if node.target is not operator.mul:
            continue
        for factor in node.all_input_nodes:
            if factor in following or factor not in after_sort:
                continue
            inner = node_of(factor.args[0]) if factor.target == "unsqueeze" else factor
            shares, by = _indexed(inner, "the weights")
            if by is not perm:
                raise _Mismatch(f"{inner.name} is not sorted as the tokens are")
            return shares, _summed(node)
    raise _Mismatch("nothing weighs the experts' outputs")


def _summed(node: fx.Node) -> fx.Node:
    for follower in _descendants(node):
        if follower.op == "call_method" and follower.target == "sum":
            if follower.kwargs.get("dim") != 1:
                break
            return follower
    raise _Mismatch("the experts' outputs are not added up by token")


def _in_place(node: fx.Node) -> bool:
    if node.target is operator.setitem:
        return True
    return node.op == "call_method" and str(node.target).endswith("_") and node.target != "_"


def _between(
    result: fx.Node, inputs: set[fx.Node], after_sort: dict[fx.Node, None]
) -> tuple[fx.Node, ...]:
    """What lies between the inputs and the result, in order; writes into such values included."""
    found: set[fx.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop()
        if node in found or node in inputs or node not in after_sort:
            continue
        found.add(node)
        pending += node.all_input_nodes
        pending += [u for u in node.users if _in_place(u) and u.args[0] is node]
    return tuple(node for node in after_sort if node in found)


def _bias(product: fx.Node, sort: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The biases ``[experts, out]`` that are added to a product, and the nodes that add them."""
    for user in product.users:
        if user.op == "call_method" and user.target == "add_" and user.args[0] is product:
            stacked, by = _indexed(node_of(user.args[1]), "the biases")
            if _item(by, 0, "sort") is not sort:
                raise _Mismatch(f"{user.name} adds biases in another order")
            return stacked, [user, node_of(user.args[1])]
    return None, []


def _activation(
    up: fx.Node, down: fx.Node, after_sort: dict[fx.Node, None], biases: list[fx.Node]
) -> tuple[fx.Node, ...]:
    """The nodes from the first product to what the second one reads."""
    wanted = strip_casts(node_of(down.args[0]))
    inside = [n for n in _descendants(up) if n is not up and n not in biases]
    needed: set[fx.Node] = set()
    pending = [wanted]
    while pending:
        node = pending.pop()
        if node is up or node in needed:
            continue
        if node not in inside:
            if node in after_sort:
                raise _Mismatch(f"the activation reads {node.name}")
            continue
        needed.add(node)
        pending += node.all_input_nodes
        pending += [u for u in node.users if _in_place(u) and u in inside]
    return tuple(node for node in inside if node in needed)
