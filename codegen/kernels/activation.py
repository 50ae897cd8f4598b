"""Which activation a task graph's operators compute, found by evaluating them.

A model may write its activation in many ways that are equal (silu as x·sigmoid(x), halves as a
chunk or two slices), so the operators are run on a few rows and compared with every activation that
kernels have.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dovetail.ir.errors import InputError
from dovetail.ir.kernel_parts import GATED, PLAIN, Activation
from dovetail.ir.task_graph import Arg, Const, Op, Ref, Size

Array = npt.NDArray[Any]
_ROWS = 3
_LARGEST = 1000.0
"""Numbers above this are sizes."""
_LAYOUTS: tuple[Literal["halves", "interleaved"], ...] = ("halves", "interleaved")
_erf = np.vectorize(math.erf)


def recognise(ops: Sequence[Op], inter: int, gated: bool, split: bool) -> Activation:
    """The activation that ``ops`` compute into ``a`` [rows, inter] from ``h`` [rows, 2·inter], from
    ``g`` and ``u`` [rows, inter] where ``split``, or not ``gated`` from ``h`` [rows, inter].

    Raises InputError where it is none of the kernels', with what the operators are.
    """
    width = 2 * inter if gated else inter
    # Values past every limit, in an order without pattern: multiples of the golden ratio, modulo 1.
    most = max([6.0, *_floats(ops)]) * 1.5
    h: Array = (np.arange(_ROWS * width) * 0.6180339887498949 % 1.0 * 2 - 1).reshape(_ROWS, width)
    h = h * most
    values: dict[str, Any] = {"h": h}
    if split:
        values |= {"g": h[:, :inter], "u": h[:, inter:]}
    found = evaluate(ops, values)
    for act in _candidates(ops, gated):
        expected = apply(act, h)
        if found.shape == expected.shape and np.allclose(found, expected, 1e-6, 1e-6):
            return act
    names = ", ".join(dict.fromkeys(op.target for op in ops))
    raise InputError(f"no kernel computes the experts' activation, which is made of {names}")


def apply(act: Activation, h: Array) -> Array:
    """An activation of [rows, outputs], in float64."""
    if not act.gated:
        return _FUNCTIONS[act.function](h)
    if act.pairs == "interleaved":
        gate, up = h[:, 0::2], h[:, 1::2]
    else:
        gate, up = h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]
    if act.function == "clamped":
        gate, up = np.minimum(gate, act.limit), np.clip(up, -act.limit, act.limit)
        clamped: Array = gate * _sigmoid(act.alpha * gate) * (up + 1)
        return clamped
    product: Array = _FUNCTIONS[_GATES[act.function]](gate) * up
    return product


def evaluate(ops: Sequence[Op], values: Mapping[str, Any]) -> Array:
    """The value ``a`` after the operators. Raises InputError for one that is not known here."""
    known = dict(values)
    for op in ops:
        target = op.target.removeprefix("aten.").split(".")[0]
        if target not in _OPS:
            raise InputError(f"no kernel computes the operator {op.target} of an activation")
        keywords = {key: _value(arg, known) for key, arg in op.kwargs.items()}
        try:
            made = _OPS[target](*(_value(arg, known) for arg in op.args), **keywords)
        except (TypeError, ValueError, IndexError) as error:
            raise InputError(
                f"the operator {op.target} of an activation is not understood: {error}"
            ) from None
        made = made if len(op.outs) > 1 else (made,)
        known |= dict(zip(op.outs, made, strict=False))
    found = known.get("a")
    if not isinstance(found, np.ndarray):
        raise InputError("the operators of an activation do not lead to its result")
    return found


def _candidates(ops: Sequence[Op], gated: bool) -> Iterator[Activation]:
    if not gated:
        yield from (Activation(function) for function in PLAIN)
        return
    floats = _floats(ops)
    for pairs in _LAYOUTS:
        yield from (Activation(function, pairs) for function in GATED if function in _GATES)
        for alpha, limit in itertools.product(floats, floats):
            yield Activation("clamped", pairs, alpha, limit)


def _floats(ops: Sequence[Op]) -> list[float]:
    """The numbers in the operators that may be an activation's parameters."""
    found = {abs(float(x)) for op in ops for x in _numbers((*op.args, *op.kwargs.values()))}
    return sorted(x for x in found if 0 < x <= _LARGEST)


def _numbers(args: Sequence[Arg]) -> Iterator[float]:
    for arg in args:
        if isinstance(arg, tuple):
            yield from _numbers(arg)
        elif isinstance(arg, int | float) and not isinstance(arg, bool):
            yield arg


def _value(arg: Arg, known: Mapping[str, Any]) -> Any:
    match arg:
        case Ref(name):
            return known[name]
        case Size(expr):
            return int(expr) if expr.is_number else _ROWS
        case Const(name):
            return {"inf": math.inf, "-inf": -math.inf}.get(name, name)
        case tuple():
            return [_value(item, known) for item in arg]
    return arg


def _sigmoid(x: Array) -> Array:
    half: Array = 0.5 * np.tanh(0.5 * x) + 0.5
    return half


def _gelu(x: Array, approximate: str = "none") -> Array:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    found: Array = np.tanh(inner) if approximate == "tanh" else _erf(x / math.sqrt(2))
    gelu: Array = 0.5 * x * (1 + found)
    return gelu


def _clamp(x: Array, low: float | None = None, high: float | None = None, **named: float) -> Array:
    low, high = named.get("min", low), named.get("max", high)
    return np.clip(x, -math.inf if low is None else low, math.inf if high is None else high)


def _slice(
    x: Array, dim: int = 0, start: int | None = None, stop: int | None = None, step: int = 1
) -> Array:
    at = [slice(None)] * x.ndim
    at[dim] = slice(start, stop, step)
    cut: Array = x[tuple(at)]
    return cut


def _split(x: Array, size: int | list[int], dim: int = 0) -> list[Array]:
    cuts = list(np.cumsum(size)[:-1]) if isinstance(size, list) else range(size, x.shape[dim], size)
    return np.split(x, list(cuts), dim)


_FUNCTIONS: dict[str, Callable[..., Array]] = {
    "silu": lambda x: x * _sigmoid(x),
    "gelu": _gelu,
    "gelu_tanh": lambda x: _gelu(x, "tanh"),
    "relu": lambda x: np.maximum(x, 0.0),
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
}
_GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh", "reglu": "relu"}
_OPS: dict[str, Callable[..., Any]] = {
    "silu": _FUNCTIONS["silu"],
    "gelu": _gelu,
    "relu": _FUNCTIONS["relu"],
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "erf": _erf,
    "mul": np.multiply,
    "add": lambda x, y, alpha=1: x + alpha * y,
    "sub": lambda x, y, alpha=1: x - alpha * y,
    "div": np.divide,
    "pow": np.power,
    "square": np.square,
    "neg": np.negative,
    "clamp": _clamp,
    "clamp_min": lambda x, low: _clamp(x, low),
    "clamp_max": lambda x, high: _clamp(x, None, high),
    "minimum": np.minimum,
    "maximum": np.maximum,
    "slice": _slice,
    "select": lambda x, dim, index: np.take(x, index, dim),
    "chunk": lambda x, count, dim=0: np.split(x, count, dim),
    "split": _split,
    "split_with_sizes": _split,
    "view": lambda x, shape: x.reshape(shape),
    "reshape": lambda x, shape: x.reshape(shape),
    "transpose": np.swapaxes,
    "flatten": lambda x, first=0, last=-1: x.reshape(*x.shape[: first % x.ndim], -1),
    "unbind": lambda x, dim=0: [np.take(x, i, dim) for i in range(x.shape[dim])],
    "getitem": lambda x, index: x[index],
    "to": lambda x, *_: x,
    "_to_copy": lambda x, **_: x,
    "clone": lambda x, **_: x,
    "contiguous": lambda x, **_: x,
}
