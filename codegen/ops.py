"""One operator of a task graph as one line of Python that a person can read.

Common ATen overloads print as the torch call a person would write, with the same kernel behind it;
every other one prints as ``aten.name.overload(...)``.
"""

from collections.abc import Callable

import sympy
from sympy.printing.pycode import PythonCodePrinter

from dovetail.ir.expr import Expr
from dovetail.ir.task_graph import Arg, Const, Op, Ref, Size

Names = Callable[[str], str]
"""How a value, weight or constant is spelled in the emitted source."""

_BINARY = {
    "aten.add.Tensor": "+",
    "aten.mul.Tensor": "*",
    "aten.sub.Tensor": "-",
    "aten.div.Tensor": "/",
    "aten.add.Scalar": "+",
    "aten.mul.Scalar": "*",
}
_METHODS = {
    "aten.view.default": "view",
    "aten.reshape.default": "reshape",
    "aten.transpose.int": "transpose",
    "aten.permute.default": "permute",
    "aten.unsqueeze.default": "unsqueeze",
    "aten.expand.default": "expand",
    "aten.contiguous.default": "contiguous",
    "aten.mean.dim": "mean",
    "aten.rsqrt.default": "rsqrt",
    "aten.pow.Tensor_Scalar": "pow",
    "aten.neg.default": "neg",
    "aten.cos.default": "cos",
    "aten.sin.default": "sin",
    "aten.sigmoid.default": "sigmoid",
    "aten.to.dtype": "to",
    "aten.clamp.default": "clamp",
    "aten.topk.default": "topk",
    "aten.softmax.int": "softmax",
    "aten.gather.default": "gather",
    "aten.chunk.default": "chunk",
    "aten.matmul.default": "matmul",
}
_FUNCTIONS = {
    "aten.linear.default": "linear",
    "aten.silu.default": "F.silu",
    "aten.cat.default": "torch.cat",
}


class _Printer(PythonCodePrinter):  # type: ignore[misc]  # sympy has no types
    """Sizes are whole numbers: ``floor(a / b)`` is ``a // b``."""

    def _print_floor(self, expr: sympy.floor) -> str:
        top, bottom = expr.args[0].as_numer_denom()
        return f"(({self._print(top)}) // ({self._print(bottom)}))"


_PRINTER = _Printer({"fully_qualified_modules": False})


def size_text(expr: Expr) -> str:
    """A size as Python source over ``seqs``, ``q_len`` and ``past``."""
    return str(_PRINTER.doprint(expr))


def arg_text(arg: Arg, names: Names) -> str:
    """An operator's argument as Python source."""
    match arg:
        case Ref(name):
            return names(name)
        case Size(expr):
            return size_text(expr)
        case Const("inf" | "-inf" | "nan" as name):
            return f'float("{name}")'
        case Const(name):
            return name if name.startswith("torch.") else repr(name)
        case tuple():
            inner = ", ".join(arg_text(item, names) for item in arg)
            return f"[{inner}]"
    return repr(arg)


def op_text(op: Op, names: Names) -> str:
    """The call, without what it is assigned to."""
    args = [arg_text(arg, names) for arg in op.args]
    keywords = [f"{key}={arg_text(arg, names)}" for key, arg in op.kwargs.items()]
    if op.target == "getitem":
        return f"{args[0]}[{args[1]}]"
    if op.target in _BINARY and not keywords and len(args) == 2:
        return f"{args[0]} {_BINARY[op.target]} {args[1]}"
    if op.target == "aten.slice.Tensor":
        return _slice_text(op, args)
    call = ", ".join([*args, *keywords])
    if op.target in _FUNCTIONS:
        return f"{_FUNCTIONS[op.target]}({call})"
    if op.target in _METHODS and isinstance(op.args[0], Ref):
        rest = [_flat(op, i, text) for i, text in enumerate(args) if i]
        return f"{args[0]}.{_METHODS[op.target]}({', '.join([*rest, *keywords])})"
    return f"{op.target}({call})"


def _flat(op: Op, index: int, text: str) -> str:
    """A shape argument of a method without its brackets."""
    shapes = ("view", "reshape", "expand", "permute")
    if _METHODS[op.target] in shapes and index == 1 and text.startswith("["):
        return text[1:-1]
    return text


def _slice_text(op: Op, args: list[str]) -> str:
    dim = op.args[1] if len(op.args) > 1 else 0
    start = args[2] if len(args) > 2 and op.args[2] is not None else "0"
    stop = args[3] if len(args) > 3 and op.args[3] not in (None, 2**63 - 1) else ""
    step = f":{args[4]}" if len(args) > 4 and op.args[4] != 1 else ""
    before = "..., " if dim == -1 else ":, " * int(str(dim)) if str(dim).isdigit() else None
    if before is None:
        return f"{op.target}({', '.join(args)})"
    return f"{args[0]}[{before}{start}:{stop}{step}]"
