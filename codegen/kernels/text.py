"""Triton source as lines: named constants, a signature, a body, and indices printed from sympy."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
from sympy.printing.str import StrPrinter

from dovetail.ir import codec
from dovetail.ir.kernel_spec import KernelSpec

WIDTH = 98


class _Printer(StrPrinter):  # type: ignore[misc]
    """Integer arithmetic as Triton spells it, tensors before constants.

    A constant on the left of a tensor would be a constant that holds a tensor in Triton's
    interpreter, which cannot be indexed.
    """

    def _print_floor(self, expr: Any) -> str:
        over, under = sympy.fraction(expr.args[0])
        return f"{self._factor(over)} // {self._factor(under)}"

    def _print_Mul(self, expr: Any) -> str:
        return " * ".join(self._factor(item) for item in sorted(expr.args, key=_order))

    def _print_Add(self, expr: Any) -> str:
        return " + ".join(self._print(item) for item in sorted(expr.args, key=_order))

    def _factor(self, expr: Any) -> str:
        text = self._print(expr)
        return text if expr.is_Atom else f"({text})"


def _order(expr: Any) -> tuple[bool, str]:
    """Tensors, in lower case, first."""
    names = [str(symbol).lstrip("(") for symbol in expr.free_symbols]
    return not any(name[0].islower() for name in names), str(expr)


def var(name: str) -> sympy.Symbol:
    """A kernel variable or named constant inside an index; ``name`` may carry its broadcast, as in
    ``row[:, None]``."""
    return sympy.Symbol(name, integer=True, nonnegative=True)


def quotient(value: sympy.Expr, divisor: int | sympy.Expr) -> sympy.Expr:
    """``value // divisor``, folded where it is exact or the divisor is 1."""
    return sympy.floor(value / divisor)


def text_of(index: sympy.Expr) -> str:
    """The index as source."""
    return str(_Printer().doprint(index))


@dataclass(slots=True)
class Source:
    """A kernel under construction: constants, arguments and body, in order."""

    spec: KernelSpec
    title: str
    constants: dict[str, int | float] = field(default_factory=dict)
    arguments: list[str] = field(default_factory=list)
    batch_sizes: list[str] = field(default_factory=list)
    body: list[str] = field(default_factory=list)

    def const(self, **values: int | float) -> None:
        """Name constants of the module."""
        self.constants.update(values)

    def args(self, *names: str) -> None:
        """Append arguments: pointers and descriptors."""
        self.arguments.extend(names)

    def sizes(self, *names: str) -> None:
        """Append arguments that depend on the batch. The compiler must not specialise on them, or a
        new token count may compile the kernel again."""
        self.batch_sizes.extend(names)

    def line(self, *lines: str, depth: int = 1) -> None:
        """Append lines to the body."""
        self.body.extend("    " * depth + line for line in lines)

    def note(self, text: str, depth: int = 1) -> None:
        """Append a comment."""
        self.line(f"# {text}", depth=depth)


def render(source: Source, options: dict[str, int], *more: str) -> str:
    """The module: what it is, its constants, the compiler's options and its kernels."""
    return "\n\n".join((_header(source, options), kernel(source), *more))


def kernel(source: Source, name: str = "") -> str:
    """One jitted function, named after the spec unless ``name`` is given."""
    sizes = ", ".join(f'"{size}"' for size in source.batch_sizes)
    decorator = f"@triton.jit(do_not_specialize=[{sizes}])" if sizes else "@triton.jit"
    names = [*source.arguments, *source.batch_sizes]
    signature = f"def {name or source.spec.name}({', '.join(names)}):"
    if len(signature) > WIDTH:
        listed = (f"    {item}," for item in names)
        signature = "\n".join((f"def {name or source.spec.name}(", *listed, "):"))
    return "\n".join((decorator, signature, *source.body)) + "\n"


def _header(source: Source, options: dict[str, int]) -> str:
    """Docstring with the spec as JSON, imports, options and constants."""
    data = json.dumps(codec.encode(source.spec), ensure_ascii=False)
    lines = [
        f'"""{source.title}',
        "",
        "Emitted by dovetail from the spec below; the same spec gives the same text.",
        "",
        *_wrapped(data),
        '"""',
        "",
        "import triton",
        "import triton.language as tl",
        "",
        f"OPTIONS = {{{_options(options)}}}",
        *(f"{name} = tl.constexpr({value!r})" for name, value in source.constants.items()),
    ]
    return "\n".join(lines) + "\n"


def _options(options: dict[str, int]) -> str:
    """The compiler's options; multiply and add are one instruction, whatever its version has as
    default."""
    return ", ".join(f'"{k}": {v}' for k, v in (options | {"enable_fp_fusion": True}).items())


def _wrapped(text: str) -> Iterator[str]:
    """``text`` cut at spaces into lines of at most ``WIDTH``."""
    line = ""
    for word in text.split(" "):
        if line and len(line) + 1 + len(word) > WIDTH:
            yield line
            line = word
        else:
            line = f"{line} {word}" if line else word
    yield line
