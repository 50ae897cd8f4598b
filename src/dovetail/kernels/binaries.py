"""Binaries of kernels: compiled into files beside their sources, held against their manifest."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dovetail.codegen.gate.compile import Compiled, compile_kernel, triton_version
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.driver import CudaDriver
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.codegen.kernels.interface import grid_text, interface_of, interface_problems
from dovetail.codegen.kernels.ladder import Here, binary_file, ladder_loader, problems
from dovetail.codegen.kernels.launch import Kernel
from dovetail.ir.errors import ModelError, PlanError
from dovetail.ir.kernel_binary import KernelBinary
from dovetail.ir.kernel_layer import KernelReference
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec
from dovetail.kernels.files import check_kernels

_SCRATCH = 2
"""Null pointers that Triton appends to a kernel's parameters (global and profiling memory); the
binary's own list shows whether it does."""


def add_binaries(
    reference: KernelReference, arch: Arch, folder: Path, top_k: int
) -> KernelReference:
    """Compile a kernel's functions into files in ``folder``; the reference with their manifest.
    Kernels that load by TMA come back as they are. Raises PlanError where the compiler's parameters
    are not those of the source."""
    spec = reference.spec
    if isinstance(spec, GemmSpec) and spec.loads == "tma":
        return reference
    module = load_source(emit_kernel(spec), folder / Path(reference.file).parent, file_name(spec))
    made = []
    for compiled in compile_kernel(module, spec, arch):
        binary = _manifest(reference, compiled, top_k)
        if compiled.scratch_bytes or interface_problems(binary, compiled.binary):
            wrong = interface_problems(binary, compiled.binary) or ["it needs memory of its own"]
            raise PlanError(
                f"{binary.file}: {wrong[0]}; this version of Triton launches otherwise than "
                "dovetail: make kernels without --binaries"
            )
        (folder / binary.file).write_bytes(compiled.binary)
        made.append(binary)
    return replace(reference, binaries=tuple(made))


def _manifest(reference: KernelReference, compiled: Compiled, top_k: int) -> KernelBinary:
    spec, text = reference.spec, emit_kernel(reference.spec)
    interface = interface_of(spec, text)
    return KernelBinary(
        file=binary_file(reference, compiled.function),
        function=compiled.function,
        arch=reference.arch,
        arguments=interface.functions[compiled.function],
        scratch=_SCRATCH,
        constants=interface.constants,
        options=interface.options,
        grid=grid_text(spec, top_k, compiled.function),
        threads=compiled.threads,
        shared_bytes=compiled.facts.shared_bytes,
        compiler=f"triton {triton_version()}",
        elf=compiled.elf_version,
        source_digest=reference.source_digest,
        digest=hashlib.sha256(compiled.binary).hexdigest(),
    )


def check_binaries(reference: KernelReference, folder: Path, top_k: int) -> None:
    """Hold a kernel's binaries against manifest, source and their own parameters, whatever GPU is
    here. Raises PlanError with the first that differs."""
    for binary in reference.binaries:
        own = Here(reference.arch, binary.compiler, 0)
        wrong = problems(reference, binary, folder, top_k, own)
        if wrong:
            raise PlanError(f"{folder / binary.file}: {wrong[0]}; make the kernels again")


def here() -> tuple[Here, CudaDriver | None]:
    """What there is to run kernels on, and the driver where binaries can be launched. Raises
    ModelError where torch finds no GPU."""
    import torch

    if not torch.cuda.is_available():
        raise ModelError("torch finds no GPU here: kernels run on one only")
    try:
        compiler = f"triton {triton_version()}"
    except ImportError:
        compiler = ""
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(0).gcnArchName.split(":")[0]
        return Here(name, compiler, 0), None
    major, minor = torch.cuda.get_device_capability()
    driver = CudaDriver()
    return Here(f"sm_{major}{minor}", compiler, driver.version()), driver


def load_from(folder: Path, note: Callable[[str], None]) -> Callable[[KernelSpec, Path], Kernel]:
    """What gives runners the kernels that ``dovetail kernels make`` left in ``folder``, from their
    binaries where those pass on this GPU. Raises PlanError for an altered folder."""
    found = check_kernels(folder)
    place, driver = here()
    return ladder_loader(found.kernels, folder, found.layer.top_k, place, driver, note)
