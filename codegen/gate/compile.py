"""Compile emitted kernels ahead of time for a GPU that is not here, and read the binary's facts."""

import re
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dovetail.codegen.gate.binary import BinaryFacts, amd_facts, cuda_facts
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.interface import signature_of
from dovetail.ir.kernel_spec import KernelSpec


@dataclass(frozen=True, slots=True)
class Compiled:
    """One kernel for one architecture: its binary, facts and launch interface."""

    function: str
    binary: bytes
    facts: BinaryFacts
    signature: dict[str, str]
    scratch_bytes: int
    threads: int
    elf_version: tuple[int, int]
    """(OS ABI, ABI version) of the ELF header: which drivers load it."""


def functions_of(module: ModuleType, spec: KernelSpec) -> list[Any]:
    """The module's jitted functions: the spec's own, and its helper where there is one."""
    names = (f"{spec.name}_count", spec.name)
    return [getattr(module, name) for name in names if hasattr(module, name)]


def compile_kernel(module: ModuleType, spec: KernelSpec, arch: Arch) -> list[Compiled]:
    """Compile every function of an emitted module for ``arch``.

    Pointers are taken as 16-byte aligned, as torch's allocator gives them; sizes that depend on the
    batch are not specialised. Raises what Triton's compiler raises.
    """
    return [_compile(function, module, spec, arch) for function in functions_of(module, spec)]


def _compile(function: Any, module: ModuleType, spec: KernelSpec, arch: Arch) -> Compiled:
    import triton  # type: ignore[import-untyped]
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
    from triton.compiler import ASTSource  # type: ignore[import-untyped]

    signature = signature_of(spec, list(function.arg_names))
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(signature)
        if name.endswith("_ptr")
    }
    built = triton.compile(
        ASTSource(function, signature, constexprs={}, attrs=aligned),
        target=GPUTarget(arch.backend, arch.target, arch.lanes),
        options=dict(module.OPTIONS),
    )
    shared, name = built.metadata.shared, function.__name__
    scratch = int(getattr(built.metadata, "global_scratch_size", 0) or 0)
    if arch.backend == "hip":
        binary = built.asm["hsaco"]
        facts = amd_facts(built.asm["amdgcn"], shared)
    else:
        binary = built.asm["cubin"]
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        facts = cuda_facts(binary, shared, tools / "nvdisasm")
    threads = int(module.OPTIONS["num_warps"]) * arch.lanes
    return Compiled(name, binary, facts, signature, scratch, threads, (binary[7], binary[8]))


def triton_version() -> str:
    """Version of the installed compiler, without a local suffix."""
    import triton

    return re.split(r"[+-]", triton.__version__)[0]
