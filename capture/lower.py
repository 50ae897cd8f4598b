"""Traced fx nodes to the operators of the task graph."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from dovetail.capture.clean import module_path, name_of
from dovetail.capture.export import Symbols
from dovetail.ir.errors import CaptureError
from dovetail.ir.expr import PAST, Expr
from dovetail.ir.task_graph import Arg, Const, Op, Ref, Size, Value

MODULE = "dovetail.module"
_SEAM_OUTS: Mapping[str, tuple[str, ...]] = {
    "dovetail.kv_update": ("k_all", "v_all"),
    "dovetail.attention": ("attended",),
    "dovetail.experts": ("expert_out",),
}
_SEAM_INS: Mapping[str, tuple[str | None, ...]] = {
    "dovetail.kv_update": ("k", "v"),
    "dovetail.attention": ("q",),
    "dovetail.experts": ("x", "expert_idx", "expert_w"),
}
_NAMED_BY_MODULE = frozenset({"aten.linear.default", "aten.embedding.default"})
_LISTS = (list, tuple)


class Lowering:
    """Lowers the nodes of one body; ``values`` collects shape and dtype of every name.

    ``names`` gives the names of nodes from outside the body: weights, constants, inputs;
    ``modules`` the path and the weights of modules that stay whole.
    """

    def __init__(
        self,
        symbols: Symbols,
        names: Mapping[fx.Node, str],
        modules: Mapping[fx.Node, tuple[str, tuple[str, ...]]] | None = None,
    ) -> None:
        self._symbols = symbols
        self._modules = dict(modules or {})
        self._names: dict[fx.Node, str] = dict(names)
        self._taken = set(names.values())
        self._outs: dict[fx.Node, tuple[str, ...]] = {}
        self._wanted: dict[fx.Node, tuple[int, ...]] = {}
        self.values: dict[str, Value] = {}

    def name(self, node: fx.Node) -> str:
        """The name under which ``node``'s value is known."""
        return self._names[node]

    def declare(self, node: fx.Node, name: str) -> None:
        """Give ``node`` the name ``name`` (made unique), and record its shape and dtype."""
        self._names[node] = self._unique(name)
        self.values[self._names[node]] = self._value(node.meta["val"])

    def lower(self, nodes: Iterable[fx.Node]) -> dict[fx.Node, Op]:
        """The operators of ``nodes``, in their order; what only computes sizes is left out."""
        kept = [n for n in nodes if is_tensor_op(n)]
        self._declare_seams(kept)
        calls = [n for n in kept if not is_getitem(n)]
        norms = {module_path(n): n for n in calls if "norm" in _leaf(n)}
        for node in calls:
            is_result = norms.get(module_path(node)) is node
            self._declare_outs(node, _leaf(node) if is_result else _base_name(node))
        return {n: self._op(n) for n in calls}

    def _declare_seams(self, nodes: list[fx.Node]) -> None:
        inside = set(nodes)
        for node in nodes:
            for arg, hint in zip(node.args, _SEAM_INS.get(seam(node) or "", ()), strict=False):
                if isinstance(arg, fx.Node) and arg in inside and arg not in self._names and hint:
                    self.declare(arg, hint)

    def _declare_outs(self, node: fx.Node, base: str) -> None:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            if node not in self._names:
                self.declare(node, base)
            self._outs[node] = (self._names[node],)
            return
        hints = _SEAM_OUTS.get(seam(node) or "", (base,) * len(value))
        if seam(node) == MODULE:
            self._declare_used(node, base)
            return
        parts: dict[int, fx.Node] = {}
        for user in node.users:
            first = parts.setdefault(user.args[1], user)  # type: ignore[arg-type]
            if first not in self._names:
                self.declare(first, hints[user.args[1]])  # type: ignore[index]
            self._names[user] = self._names[first]
        self._outs[node] = tuple(
            self._names[parts[i]] if i in parts else self._spare(item, hints[i])
            for i, item in enumerate(value)
        )

    def _declare_used(self, node: fx.Node, base: str) -> None:
        """Of a module that stays whole, only the results that are read count."""
        picks = {user: user.args[1] for user in node.users}
        self._wanted[node] = tuple(sorted(set(picks.values())))  # type: ignore[arg-type]
        names: dict[Any, str] = {}
        for user, index in picks.items():
            if index not in names:
                if user not in self._names:
                    self.declare(user, base)
                names[index] = self._names[user]
            self._names[user] = names[index]
        self._outs[node] = tuple(names[index] for index in self._wanted[node])

    def _spare(self, item: Tensor, hint: str) -> str:
        name = self._unique(hint)
        self.values[name] = self._value(item)
        return name

    def _value(self, tensor: Tensor) -> Value:
        return Value(self._symbols.shape(tensor), str(tensor.dtype).removeprefix("torch."))

    def _unique(self, base: str) -> str:
        name, count = base, 0
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name

    def _op(self, node: fx.Node) -> Op:
        kind = seam(node)
        if name_of(node).startswith("aten.arange"):
            self._check_positions(node)
        if kind == MODULE:
            return self._module(node)
        args = node.args
        if kind == "dovetail.kv_update":
            args = args[:2]
        elif kind == "dovetail.experts":
            args = args[:3]
        return Op(
            kind or name_of(node),
            tuple(self._arg(a, node) for a in args),
            self._outs[node],
            {k: self._arg(a, node) for k, a in node.kwargs.items() if a is not None},
        )

    def _check_positions(self, node: fx.Node) -> None:
        """Positions must come from position_ids: sequences of a batch hold different numbers of
        tokens, while ``past`` is that of the longest."""
        sizes = [a for a in map(self._size_of, node.args) if a is not None]
        if any(PAST in size.free_symbols for size in sizes):
            raise CaptureError(
                f"{module_path(node) or 'the model'} counts positions from the cache's length "
                f"({name_of(node)}); expected them from position_ids, since sequences that run "
                "together hold different numbers of tokens: this family needs an adapter in "
                "capture/adapters"
            )

    def _size_of(self, arg: Any) -> Expr | None:
        value = arg.meta["val"] if isinstance(arg, fx.Node) else arg
        return self._symbols.size(value) if isinstance(value, int | torch.SymInt) else None

    def _module(self, node: fx.Node) -> Op:
        inputs, _, text = node.args

        def given(value: Any) -> Arg:
            if isinstance(value, dict) and "mapping" in value:
                pairs = tuple((key, given(item)) for key, item in value["mapping"].items())
                return (Const("mapping"), *pairs)
            if isinstance(value, dict):
                special = value.get("special")
                return Const(special) if special else self._arg(inputs[value["tensor"]], node)  # type: ignore[index]
            return tuple(given(item) for item in value) if isinstance(value, list) else value

        path, weights = self._modules[node]
        call = json.loads(str(text))["call"]
        return Op(
            MODULE,
            (path, tuple(Ref(name) for name in weights), self._places(node, str(text))),
            self._outs[node],
            {name: given(value) for name, value in call.items()},
        )

    def _places(self, node: fx.Node, text: str) -> tuple[int, ...]:
        """Where the wanted results are among all that the module returns."""
        places = json.loads(text)["places"]
        return tuple(places[index] for index in self._wanted[node])

    def _arg(self, arg: Any, node: fx.Node) -> Arg:
        if isinstance(arg, fx.Node):
            return self._node_arg(arg, node)
        if isinstance(arg, _LISTS):
            return tuple(self._arg(a, node) for a in arg)
        if isinstance(arg, torch.dtype | torch.layout | torch.memory_format):
            return Const(str(arg))
        if isinstance(arg, torch.device):
            return Const("cpu")
        if isinstance(arg, float) and arg in (float("inf"), float("-inf")):
            return Const(str(arg))  # JSON has no infinity
        if arg is None or isinstance(arg, bool | int | float | str):
            return arg
        raise CaptureError(
            f"{module_path(node)}: {name_of(node)} has an argument of type {type(arg).__name__}, "
            "which the task graph cannot hold"
        )

    def _node_arg(self, arg: fx.Node, node: fx.Node) -> Arg:
        value = arg.meta["val"]
        if isinstance(value, int | torch.SymInt):
            size = self._symbols.size(value)
            return int(size) if size.is_Integer else Size(size)
        if not isinstance(value, Tensor) or arg not in self._names:
            raise CaptureError(
                f"{module_path(node)}: {name_of(node)} reads {arg.name} "
                f"({type(value).__name__} from {module_path(arg) or 'the model'}), which is not "
                "available in its part of the graph"
            )
        return Ref(self._names[arg])


def seam(node: fx.Node) -> str | None:
    """The name of the seam that ``node`` calls, without its overload."""
    name = name_of(node).removesuffix(".default") if node.op == "call_function" else ""
    return name if name in _SEAM_OUTS or name == MODULE else None


def is_getitem(node: fx.Node) -> bool:
    """Whether ``node`` picks one result of an operator that gives several."""
    return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"


def is_tensor_op(node: fx.Node) -> bool:
    """Whether ``node`` computes tensors (and not a size)."""
    value = node.meta.get("val")
    many = isinstance(value, _LISTS) and all(isinstance(v, Tensor) for v in value)
    if isinstance(value, Tensor) or many:
        return True
    if isinstance(value, int | torch.SymInt):
        return False
    raise CaptureError(
        f"{module_path(node) or 'the model'}: {name_of(node)} gives {type(value).__name__}; the "
        "task graph holds tensors and sizes only"
    )


def _leaf(node: fx.Node) -> str:
    return module_path(node).rsplit(".", 1)[-1]


def _base_name(node: fx.Node) -> str:
    outs = _SEAM_OUTS.get(seam(node) or "")
    if outs:
        return outs[0]
    if seam(node) == MODULE:
        return _leaf(node) if not _leaf(node).isdigit() else "module"
    if name_of(node) in _NAMED_BY_MODULE and module_path(node):
        return _leaf(node)
    return re.sub(r"_?\d*$", "", name_of(node).split(".")[1]).strip("_") or node.name
