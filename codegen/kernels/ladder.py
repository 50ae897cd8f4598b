"""The ladder of a kernel: its binary where that is sure to be right, else its source.

A binary saves compiling, which stalls a server for seconds; but it is right for one architecture,
one compiler and one text only. So each is held against its manifest, against the text that this
version emits and against its own parameter list, and where anything differs the kernel is compiled
from its source, which is said.
"""

import ctypes
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.codegen.kernels.arch import ARCHS
from dovetail.codegen.kernels.driver import Driver
from dovetail.codegen.kernels.emit import emit_kernel, source_digest
from dovetail.codegen.kernels.gemm_rows import ALIGNED
from dovetail.codegen.kernels.interface import grid_text, interface_of, interface_problems
from dovetail.codegen.kernels.launch import Kernel, source_kernel
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.kernel_binary import Argument, KernelBinary
from dovetail.ir.kernel_layer import KernelReference
from dovetail.ir.kernel_spec import KernelSpec

DRIVERS: Mapping[tuple[int, int], int] = {(51, 7): 12000, (65, 8): 13000}
"""The oldest CUDA version of a driver that loads each ELF version of a cubin."""
_POINTED = {
    "bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "i32": torch.int32,
    "i64": torch.int64, "u8": torch.uint8, "i8": torch.int8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Here:
    """Where kernels are to run: the GPU's architecture, the compiler that is installed ("" for
    none), and the CUDA version of the driver (0: not known)."""

    arch: str
    compiler: str
    driver: int


@dataclass(frozen=True, slots=True)
class Decision:
    """The rung that a kernel runs from, and why not from its binary where it does not."""

    rung: Literal["binary", "source"]
    reasons: tuple[str, ...] = ()


def decide(reference: KernelReference, folder: Path, top_k: int, here: Here) -> Decision:
    """Whether a kernel's binaries in ``folder`` may run; every function of it must have one."""
    interface = interface_of(reference.spec, emit_kernel(reference.spec))
    binaries = {binary.function: binary for binary in reference.binaries}
    if not binaries:
        return Decision("source", ("it has no binary",))
    if set(binaries) != set(interface.functions):
        return Decision("source", (f"its binaries are of {', '.join(binaries)} alone",))
    reasons = [
        f"{binary.file}: {reason}"
        for binary in reference.binaries
        for reason in problems(reference, binary, folder, top_k, here)
    ]
    return Decision("source", tuple(reasons)) if reasons else Decision("binary")


def binary_file(reference: KernelReference, function: str) -> str:
    """The file of a function's binary, beside its source."""
    return f"{reference.file.removesuffix('.py')}.{function}.cubin"


def problems(
    reference: KernelReference, binary: KernelBinary, folder: Path, top_k: int, here: Here
) -> list[str]:
    """Everything that keeps a binary from being launched here; empty when it may be."""
    found, spec = [], reference.spec
    if binary.file != binary_file(reference, binary.function):
        return [f"it belongs in {binary_file(reference, binary.function)}"]
    text = emit_kernel(spec)
    interface = interface_of(spec, text)
    if binary.arch != here.arch:
        found.append(f"it is for {binary.arch}, this GPU is {here.arch}")
    if here.compiler and binary.compiler != here.compiler:
        found.append(f"it was compiled by {binary.compiler}, {here.compiler} is installed")
    if binary.source_digest != source_digest(text):
        found.append("it was compiled from another source than this version emits")
    oldest = DRIVERS.get(binary.elf)
    if oldest is None:
        found.append(f"drivers for its ELF version {binary.elf} are not known")
    elif here.driver and here.driver < oldest:
        found.append(f"its ELF version needs CUDA {oldest // 1000}, the driver has {here.driver}")
    said = binary.arguments, dict(binary.constants), dict(binary.options), binary.grid
    own = (
        interface.functions.get(binary.function), interface.constants, interface.options,
        grid_text(spec, top_k, binary.function),
    )  # fmt: skip
    for name, one, other in zip(
        ("arguments", "constants", "options", "grid"), said, own, strict=True
    ):
        if one != other:
            found.append(f"its manifest's {name} are not those of its source")
    arch = ARCHS.get(binary.arch)
    if arch is None or arch.backend != "cuda":
        found.append("binaries are launched on NVIDIA GPUs only")
    elif not 0 <= binary.shared_bytes <= arch.shared_program:
        found.append(f"{binary.shared_bytes} bytes of shared memory, {arch.name} has less")
    try:
        content = (folder / binary.file).read_bytes()
    except OSError as error:
        return [*found, f"it cannot be read: {error.strerror}"]
    if hashlib.sha256(content).hexdigest() != binary.digest:
        return [*found, "the file was altered"]
    return found + interface_problems(binary, content)


class BinaryKernel:
    """A kernel launched from its binaries, which were held against their manifest before."""

    def __init__(self, reference: KernelReference, folder: Path, driver: Driver) -> None:
        self._binaries = {binary.function: binary for binary in reference.binaries}
        self._name, self._folder, self._driver = reference.spec.name, folder, driver
        self._loaded: dict[tuple[int, str], Any] = {}

    def __call__(
        self, grid: tuple[int, ...], values: Mapping[str, Any], function: str = ""
    ) -> None:
        """Launch; see ``Kernel``. Raises InputError for a value that the binary does not take."""
        binary = self._binaries[function or self._name]
        if 0 in grid:
            return
        key = self._driver.device(), binary.function
        if key not in self._loaded:
            content = (self._folder / binary.file).read_bytes()
            if hashlib.sha256(content).hexdigest() != binary.digest:
                raise PlanError(
                    f"{self._folder / binary.file}: the file was altered since it was checked"
                )
            self._loaded[key] = self._driver.load(content, binary.function, binary.shared_bytes)
        arguments = [packed(argument, values[argument.name]) for argument in binary.arguments]
        arguments += [ctypes.c_void_p() for _ in range(binary.scratch)]
        x, y, z = (*grid, 1, 1)[:3]
        self._driver.launch(
            self._loaded[key], (x, y, z), binary.threads, binary.shared_bytes, arguments
        )


def packed(argument: Argument, value: Any) -> Any:
    """A value as a binary takes it. Raises InputError for another type, a number that does not fit
    or a tensor that is not where the binary was compiled for."""
    if argument.type == "i32":
        if not isinstance(value, int) or not -(1 << 31) <= value < 1 << 31:
            raise InputError(f"argument {argument.name}: {value!r} is no 32-bit number")
        return ctypes.c_int32(value)
    dtype = _POINTED.get(argument.type.removeprefix("*"))
    if not isinstance(value, Tensor) or value.dtype != dtype:
        found = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"argument {argument.name}: found {found}, expected a tensor of {dtype}")
    if value.data_ptr() % ALIGNED:
        raise InputError(
            f"argument {argument.name}: it lies at {value.data_ptr():#x}, the binary was compiled "
            f"for multiples of {ALIGNED} bytes"
        )
    return ctypes.c_void_p(value.data_ptr())


def ladder_loader(
    references: Sequence[KernelReference],
    binaries: Path,
    top_k: int,
    here: Here,
    driver: Driver | None,
    note: Callable[[str], None],
) -> Callable[[KernelSpec, Path], Kernel]:
    """What gives runners their kernels: from the binary in the folder ``binaries`` where it passes,
    else from the source, with a note that says why."""
    known = {reference.spec: reference for reference in references}

    def load(spec: KernelSpec, folder: Path) -> Kernel:
        reference = known.get(spec)
        if reference is None:
            decision = Decision("source", ("the manifest does not have it",))
        else:
            decision = decide(reference, binaries, top_k, here)
        if decision.rung == "binary" and driver is not None and reference is not None:
            return BinaryKernel(reference, binaries, driver)
        why = decision.reasons or ("no driver launches binaries here",)
        if not here.compiler:
            raise InputError(
                f"kernel {spec.name} cannot run: its binary is not taken ({why[0]}), and Triton, "
                "which would compile its source, is not installed"
            )
        note(f"kernel {spec.name} is compiled from its source: {'; '.join(why)}")
        return source_kernel(spec, folder)

    return load
