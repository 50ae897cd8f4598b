"""The launch interface of emitted kernels, read from their text, and of binaries, read from ELF.

What a manifest says of a binary is held against both: the text that this version emits, and the
parameters that the binary itself lists.
"""

import ast
from dataclasses import dataclass

from dovetail.codegen.gate.binary import Parameter, cuda_interface
from dovetail.codegen.kernels.launch_bounds import SORT_PART
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_binary import Argument, KernelBinary
from dovetail.ir.kernel_spec import (
    ActivateSpec,
    GemmSpec,
    KernelSpec,
    ReduceSpec,
    RouteSpec,
    SortSpec,
)

_STORED = {"fp8": "u8", "int8": "i8", "int4": "u8"}
POINTER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Interface:
    """What an emitted module's text says: arguments of each function, constants, options."""

    functions: dict[str, tuple[Argument, ...]]
    constants: dict[str, int | float]
    options: dict[str, int | bool]


def interface_of(spec: KernelSpec, text: str) -> Interface:
    """The interface of the module that ``text``, emitted from ``spec``, is; nothing is run."""
    functions: dict[str, tuple[Argument, ...]] = {}
    constants: dict[str, int | float] = {}
    options: dict[str, int | bool] = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            types = signature_of(spec, [arg.arg for arg in node.args.args])
            functions[node.name] = tuple(Argument(*item) for item in types.items())
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, value = node.targets[0].id, node.value
            if name == "OPTIONS":
                options = ast.literal_eval(value)
            elif isinstance(value, ast.Call):
                constants[name] = ast.literal_eval(value.args[0])
    return Interface(functions, constants, options)


def signature_of(spec: KernelSpec, names: list[str]) -> dict[str, str]:
    """Triton's type of each of a kernel's arguments."""
    types = {name: "*i32" for name in names if name.endswith("_ptr")}
    types |= {name: "i32" for name in names if not name.endswith("_ptr")}
    types |= {"scale_ptr": "*fp32", "routed_weight_ptr": "*fp32", "weight_ptr": "*fp32"}
    types |= {"part_ptr": "*fp32", "gate_ptr": "*fp32", "bias_ptr": "*fp32"}
    types |= {"expert_at_ptr": "*i64"}
    match spec:
        case GemmSpec():
            stored = _STORED.get(spec.weights.format, spec.x)
            block = f"[{spec.tile_rows}, {spec.tile.k}]"
            types |= {"x_ptr": f"*{spec.x}", "w_ptr": f"*{stored}", "y_ptr": f"*{spec.out}"}
            types |= {"w_desc": f"tensordesc<{stored}{block}>", "bias_ptr": f"*{spec.x}"}
        case ReduceSpec():
            part = "fp32" if spec.split_k > 1 else spec.x
            types |= {"part_ptr": f"*{part}", "shared_ptr": f"*{spec.x}", "y_ptr": f"*{spec.out}"}
        case ActivateSpec():
            types |= {"y_ptr": f"*{spec.out}"}
        case RouteSpec():
            types |= {"logits_ptr": "*fp32"}
        case SortSpec():
            pass
    return {name: types[name] for name in names}


def grid_text(spec: KernelSpec, top_k: int, function: str) -> str:
    """The launch grid as an expression in ``tokens``, rounding up as -(-a // b)."""

    def over(text: str, by: int) -> str:
        return text if by == 1 else f"-(-{text} // {by})"

    slots = "tokens" if top_k == 1 else f"(tokens * {top_k})"
    match spec:
        case RouteSpec():
            return f"({over('tokens', spec.tokens)},)"
        case SortSpec():
            parts = f"max(1, {over(slots, SORT_PART)})"
            if function != spec.name:
                return f"({parts},)"
            return f"({spec.experts},)" if spec.one_launch else f"({spec.experts}, {parts})"
        case GemmSpec(rows="dense", tile=tile):
            return f"({over('tokens', tile.m)} * {over(str(spec.n), tile.n)}, {tile.split_k})"
        case GemmSpec(tile=tile, experts=experts):
            slots = "tokens" if spec.top_k == 1 else f"(tokens * {spec.top_k})"
            # The most row tiles of any routing: one slot for every expert but one.
            tiles = f"min({slots}, {experts - 1} + {over(f'({slots} - {experts - 1})', tile.m)})"
            return f"(max(1, {tiles}) * {-(-spec.n // tile.n)}, {tile.split_k})"
        case ActivateSpec() | ReduceSpec():
            return f"(tokens, {-(-spec.n // spec.block)})"


def interface_problems(binary: KernelBinary, content: bytes) -> list[str]:
    """How a CUDA binary's own parameters differ from what the manifest says of it."""
    try:
        found = cuda_interface(content, binary.function)
    except ValueError as error:
        return [str(error)]
    expected, at = [], 0
    for argument in (*binary.arguments, *[Argument("", "*")] * binary.scratch):
        size = argument_bytes(argument)
        at = -(-at // size) * size
        expected.append(Parameter(at, size))
        at += size
    problems = []
    if list(found.parameters) != expected:
        problems.append(
            f"its parameters are {_sizes(found.parameters)} bytes, the manifest says "
            f"{_sizes(expected)}"
        )
    if found.threads != binary.threads:
        problems.append(f"it wants {found.threads} threads, the manifest says {binary.threads}")
    if found.arch != binary.arch:
        problems.append(f"it is for {found.arch}, the manifest says {binary.arch}")
    if found.elf != binary.elf:
        problems.append(f"its ELF version is {found.elf}, the manifest says {binary.elf}")
    return problems


def argument_bytes(argument: Argument) -> int:
    """Bytes of an argument in a launch. Raises InputError for a type that is none of a launch."""
    if argument.type.startswith("*"):
        return POINTER_BYTES
    if argument.type == "i32":
        return 4
    raise InputError(f"argument {argument.name}: {argument.type} cannot be passed to a binary")


def _sizes(parameters: list[Parameter] | tuple[Parameter, ...]) -> str:
    return ", ".join(str(parameter.size) for parameter in parameters) or "none"
