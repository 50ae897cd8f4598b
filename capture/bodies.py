"""From the traced graph to bodies: prologue, one body per kind of layer, epilogue."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from dovetail.capture.clean import module_path, name_of
from dovetail.capture.export import Traced
from dovetail.capture.layers import Stack
from dovetail.capture.lower import MODULE, Lowering, is_tensor_op, seam
from dovetail.capture.roles import SLOT_ROLES, Slot, layer_slots
from dovetail.ir.errors import CaptureError
from dovetail.ir.expr import PAST, Q_LEN
from dovetail.ir.task_graph import (
    Body,
    Experts,
    KvSpec,
    Op,
    Role,
    StateSpec,
    Task,
    Value,
    Weight,
)

WeightOf = Callable[[str, int | None], Weight]
"""Gives the weight of a model name; the second argument is the layer it is used in."""
ExpertsOf = Callable[[fx.Node, int], Experts]
"""Gives the description of the experts that a node of a layer calls."""
ModuleWeights = Callable[[str], Iterable[str]]
"""Gives the names of all weights inside the module of a path."""

_AXES: Mapping[Role, tuple[str, ...]] = {
    Role.ATTENTION: ("seqs",),
    Role.KV: ("seqs",),
    Role.EXPERTS: ("tokens", "experts"),
}
_TOKENWISE = ("seqs", "tokens")


@dataclass(slots=True)
class Sections:
    """The nodes of the traced graph by part, and what travels between the parts."""

    prologue: list[fx.Node] = field(default_factory=list)
    layers: dict[int, list[fx.Node]] = field(default_factory=dict)
    epilogue: list[fx.Node] = field(default_factory=list)
    enters: dict[int, fx.Node] = field(default_factory=dict)
    leaves: dict[int, fx.Node] = field(default_factory=dict)
    labels: dict[fx.Node, str] = field(default_factory=dict)
    logits: fx.Node | None = None


def sections(graph: fx.Graph) -> Sections:
    """Cut ``graph`` at the marks around layers, and take the marks on other values out."""
    parts = Sections()
    current: int | None = None
    for node in list(graph.nodes):
        kind, _, text = _label(node).partition(":")
        if kind == "enter":
            current = int(text)
            parts.enters[current] = node
            parts.layers[current] = []
        elif kind == "leave":
            parts.leaves[int(text)] = node
            current = None
        elif kind == "name":
            source = node.args[0]
            assert isinstance(source, fx.Node)
            parts.labels.setdefault(source, text)
            node.replace_all_uses_with(source)
        elif node.op == "output":
            parts.logits = node.all_input_nodes[0]
        elif node.op == "call_function" and is_tensor_op(node):
            _section(parts, current, node).append(node)
    _check_chain(parts)
    return parts


def _label(node: fx.Node) -> str:
    if node.op != "call_function" or name_of(node) != "dovetail.mark.default":
        return ""
    return str(node.args[1])


def _section(parts: Sections, current: int | None, node: fx.Node) -> list[fx.Node]:
    if current is not None:
        return parts.layers[current]
    return parts.epilogue if parts.leaves else parts.prologue


def _check_chain(parts: Sections) -> None:
    previous: fx.Node | None = None
    for layer, enter in parts.enters.items():
        if previous is not None and enter.args[0] is not previous:
            raise CaptureError(
                f"layer {layer} does not take the output of the layer before it as it is; dovetail "
                "knows models whose layers follow each other directly"
            )
        previous = parts.leaves[layer]


class BodyBuilder:
    """Builds the bodies of one traced model."""

    def __init__(
        self,
        traced: Traced,
        stack: Stack,
        weight_of: WeightOf,
        experts_of: ExpertsOf,
        module_weights: ModuleWeights,
    ) -> None:
        self._traced = traced
        self._stack = stack
        self._weight_of = weight_of
        self._experts_of = experts_of
        self._module_weights = module_weights
        self._parts = sections(traced.graph)
        self._placeholders = {n.name: n for n in traced.graph.nodes if n.op == "placeholder"}
        self._check_inputs()
        self.constants: dict[str, fx.Node] = {}
        self.shared: tuple[str, ...] = ()
        self._outside: dict[fx.Node, str] = {}

    def _check_inputs(self) -> None:
        for user in self._placeholders["past"].users:
            if is_tensor_op(user):
                raise CaptureError(
                    f"{module_path(user)} reads the stand-in for past tokens with {name_of(user)}; "
                    "only its size may be used"
                )

    def prologue(self) -> Body:
        """Embedding and position tables; also settles ``shared``."""
        entry = next(iter(self._parts.enters.values())).args[0]
        assert isinstance(entry, fx.Node)
        inputs = {self._placeholders[n]: n for n in ("input_ids", "position_ids")}
        nodes = self._parts.prologue
        lowering = self._lowering(nodes, inputs, None)
        lowering.declare(entry, "hidden")
        exported = [n for n in nodes if n is not entry and self._leaves_prologue(n)]
        for node in exported:
            lowering.declare(node, self._parts.labels.get(node, "shared"))
        ops = lowering.lower(nodes)
        embeds = _ancestors(entry, nodes)
        roles = {n: Role.EMBED if n in embeds else Role.OTHER for n in ops}
        self._outside = {n: lowering.name(n) for n in exported}
        self.shared = tuple(self._outside.values())
        groups = [(role, [n for n in ops if roles[n] is role]) for role in (Role.EMBED, Role.OTHER)]
        return self._body("prologue", inputs, [entry], groups, ops, lowering, None, self.shared)

    def _leaves_prologue(self, node: fx.Node) -> bool:
        inside = set(self._parts.prologue)
        return any(
            u not in inside and u.op == "call_function" and is_tensor_op(u) for u in node.users
        )

    def layer(self, layer: int) -> Body:
        """The body that stands for layer ``layer`` and all of its kind."""
        parts = self._parts
        nodes, enter, leave = parts.layers[layer], parts.enters[layer], parts.leaves[layer]
        path = f"{self._stack.path}.{layer}"
        slots = layer_slots(nodes, path)
        inputs = {enter: "hidden"} | self._used_outside(nodes)
        lowering = self._lowering(nodes, inputs, layer)
        result = leave.args[0]
        assert isinstance(result, fx.Node)
        lowering.declare(result, "hidden_out")
        ops = lowering.lower(nodes)
        groups = [(SLOT_ROLES[s], [n for n in ops if slots[n] is s]) for s in Slot]
        for node in nodes:
            if seam(node) == "dovetail.attention":
                self._check_kv(node, path)
        kind = self._stack.kinds[layer]
        return self._body(f"layer_{kind}", inputs, [result], groups, ops, lowering, layer)

    def epilogue(self) -> Body:
        """Final norm and head."""
        parts = self._parts
        last = next(reversed(parts.leaves.values()))
        assert parts.logits is not None
        inputs = {last: "hidden"} | self._used_outside(parts.epilogue)
        lowering = self._lowering(parts.epilogue, inputs, None)
        lowering.declare(parts.logits, "logits")
        ops = lowering.lower(parts.epilogue)
        norm = [n for n in ops if self._in_norm(n)]
        groups = [(Role.NORM, norm), (Role.HEAD, [n for n in ops if n not in set(norm)])]
        return self._body("epilogue", inputs, [parts.logits], groups, ops, lowering, None)

    def _in_norm(self, node: fx.Node) -> bool:
        """Whether ``node`` comes before the first matrix product of the epilogue."""
        heads = [
            n for n in self._parts.epilogue if name_of(n).startswith(("aten.linear", "aten.mat"))
        ]
        return (
            bool(heads)
            and heads[0] is not node
            and node in _ancestors(heads[0], self._parts.epilogue)
        )

    def _used_outside(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, str]:
        used = {a for n in nodes for a in n.all_input_nodes}
        found = {n: name for n, name in self._outside.items() if n in used}
        outside = {self._placeholders[name]: name for name in ("input_ids", "position_ids")}
        return found | {node: name for node, name in outside.items() if node in used}

    def _lowering(
        self, nodes: Iterable[fx.Node], inputs: Mapping[fx.Node, str], layer: int | None
    ) -> Lowering:
        names = dict(inputs)
        for node in dict.fromkeys(a for n in nodes for a in n.all_input_nodes):
            if node.op != "placeholder" or node in names:
                continue
            if node.name in self._traced.weights:
                names[node] = self._weight_of(self._traced.weights[node.name], layer).fqn
            elif node.name in self._traced.buffers or node.name in self._traced.lifted:
                names[node] = self._traced.buffers.get(node.name, node.name)
                self.constants[names[node]] = node
        modules = {n: self._whole(n, layer) for n in nodes if seam(n) == MODULE}
        lowering = Lowering(self._traced.symbols, names, modules)
        for node, name in inputs.items():
            value: Tensor = node.meta["val"]
            dtype = str(value.dtype).removeprefix("torch.")
            lowering.values[name] = Value(self._traced.symbols.shape(value), dtype)
        return lowering

    def _whole(self, node: fx.Node, layer: int | None) -> tuple[str, tuple[str, ...]]:
        """The path of a module that stays whole, with ``{layer}``, and the names of its weights."""
        path = str(node.args[1])
        root = f"{self._stack.path}.{layer}."
        assert path.startswith(root), f"{path} is outside of its layer"
        weights = tuple(self._weight_of(w, layer).fqn for w in self._module_weights(path))
        return f"{self._stack.path}.{{layer}}.{path.removeprefix(root)}", weights

    def _check_kv(self, attention: fx.Node, path: str) -> None:
        keys = attention.args[1]
        assert isinstance(keys, fx.Node)
        length = self._traced.symbols.size(keys.meta["val"].shape[2])
        if length != PAST + Q_LEN:
            raise CaptureError(
                f"{path}: attention sees {length} keys, expected past + q_len: the layer does not "
                "go through the KV cache"
            )

    def _body(
        self,
        name: str,
        inputs: Mapping[fx.Node, str],
        results: list[fx.Node],
        groups: list[tuple[Role, list[fx.Node]]],
        ops: Mapping[fx.Node, Op],
        lowering: Lowering,
        layer: int | None,
        also_written: tuple[str, ...] = (),
    ) -> Body:
        outputs = tuple(lowering.name(n) for n in results)
        weights = {w.fqn: w for w in self._weights(ops, layer)}
        tasks: list[Task] = []
        wanted = _wanted(
            [[ops[n] for n in nodes] for _, nodes in groups], (*outputs, *also_written)
        )
        for (role, nodes), later in zip(groups, wanted, strict=True):
            if nodes:
                number = sum(t.role is role for t in tasks)
                task = _task(
                    f"{role.value}_{number}", role, [ops[n] for n in nodes], later, weights
                )
                reads = tuple(r for r in task.reads if r in lowering.values)
                experts = self._experts_of(nodes[0], layer or 0) if role is Role.EXPERTS else None
                kv = _kv_spec(nodes[0]) if role is Role.KV else None
                task = replace(task, reads=reads, experts=experts, kv=kv)
                tasks.append(self._stateful(task, nodes, number))
        return Body(name, tuple(inputs.values()), outputs, tuple(tasks), lowering.values)

    def _stateful(self, task: Task, nodes: list[fx.Node], number: int) -> Task:
        """``task`` with the state of the modules that it runs whole; a mixer if it is of one size
        whatever the length."""
        wholes = [self._traced.wholes[str(n.args[1])].state for n in nodes if seam(n) == MODULE]
        if not wholes:
            return task
        state = StateSpec(
            sum(s.bytes_per_seq for s in wholes), sum(s.bytes_per_token for s in wholes)
        )
        if task.role is Role.ATTENTION and not state.bytes_per_token:
            task = replace(task, role=Role.MIXER, name=f"{Role.MIXER.value}_{number}")
        return replace(task, state=state, axes=("seqs",))

    def _weights(self, ops: Mapping[fx.Node, Op], layer: int | None) -> Iterable[Weight]:
        for node in ops:
            for source in node.all_input_nodes:
                if source.name in self._traced.weights:
                    yield self._weight_of(self._traced.weights[source.name], layer)
            if seam(node) == MODULE:
                for name in self._module_weights(str(node.args[1])):
                    yield self._weight_of(name, layer)


def _task(
    name: str, role: Role, ops: list[Op], later: set[str], weights: Mapping[str, Weight]
) -> Task:
    """A task of ``ops``; its reads still hold every name that it does not make itself."""
    uses = dict.fromkeys(u for op in ops for u in reversed(list(op.uses())))
    made = dict.fromkeys(o for op in ops for o in op.outs)
    return Task(
        name,
        role,
        tuple(ops),
        tuple(u for u in uses if u not in made),
        tuple(o for o in made if o in later),
        tuple(weights[u] for u in uses if u in weights),
        _AXES.get(role, _TOKENWISE),
    )


def _wanted(groups: list[list[Op]], at_end: tuple[str, ...]) -> list[set[str]]:
    """For each group of operators, the names that are read after it."""
    wanted: list[set[str]] = []
    later = set(at_end)
    for ops in reversed(groups):
        wanted.append(set(later))
        later |= {use for op in ops for use in op.uses()}
    return wanted[::-1]


def _ancestors(node: fx.Node, inside: Iterable[fx.Node]) -> set[fx.Node]:
    allowed, seen, pending = set(inside), set(), [node]
    while pending:
        at = pending.pop()
        if at in allowed and at not in seen:
            seen.add(at)
            pending.extend(at.all_input_nodes)
    return seen


def _kv_spec(node: fx.Node) -> KvSpec:
    k, v = (a.meta["val"] for a in node.args[:2] if isinstance(a, fx.Node))
    dtypes = {str(t.dtype).removeprefix("torch.") for t in (k, v)}
    if len(dtypes) != 1:
        raise CaptureError(
            f"{module_path(node)} caches keys and values of different dtypes {sorted(dtypes)}; "
            "expected one dtype for both"
        )
    return KvSpec(int(k.shape[1]), int(k.shape[3]), int(v.shape[1]), int(v.shape[3]), dtypes.pop())
