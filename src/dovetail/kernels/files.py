"""A layer's kernels as files: readable sources and a manifest of what each one is.

The manifest holds specs and digests, no code: `check_kernels` emits every spec anew and compares,
so that a source that was changed by hand, or by another version, is noticed before it is imported.
"""

import importlib.util
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import LADDER, choose_ladder
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source, source_digest
from dovetail.ir import codec
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.kernel_layer import KernelReference, LayerKernels, LayerSpec
from dovetail.ir.kernel_spec import GemmSpec, KernelSpec, spec_digest

MANIFEST = "kernels.json"
Taken = tuple[int, int]
"""Registers per thread and bytes of shared memory that a binary takes."""


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The kernels of one layer on one architecture, one entry of ``ladder`` per bucket of token
    counts, one reference per source file."""

    layer: LayerSpec
    arch: str
    ladder: tuple[LayerKernels, ...]
    kernels: tuple[KernelReference, ...]


def write_kernels(
    layer: LayerSpec,
    arch: Arch,
    folder: Path,
    ladder: Sequence[int] = LADDER,
    gate: bool = False,
    binaries: bool = False,
) -> KernelSet:
    """Choose, emit and write a layer's kernels and their manifest to ``folder``.

    With ``gate`` every kernel is compiled ahead of time and held against its budget; the next best
    takes the place of a tile that does not pass, and registers and shared memory go into the
    references. With ``binaries`` each is compiled into a file beside its source; kernels that load
    by TMA are left to Triton, which makes their descriptors. Raises InputError where a kernel
    without alternatives does not pass, or Triton is not installed.
    """
    if (gate or binaries) and importlib.util.find_spec("triton") is None:
        raise InputError("kernels are compiled with Triton, which is not installed here")
    if binaries and arch.backend != "cuda":
        raise InputError(f"binaries are launched on NVIDIA GPUs only, {arch.name} is none")
    folder.mkdir(parents=True, exist_ok=True)
    taken: dict[KernelSpec, Taken] = {}
    refused: set[GemmSpec] = set()
    while True:
        chosen = choose_ladder(layer, arch, ladder, refused)
        specs = dict.fromkeys(spec for kernels in chosen for spec in kernels.specs())
        before = len(refused)
        if gate:
            refused |= _refused([spec for spec in specs if spec not in taken], arch, taken)
        if len(refused) == before:
            break
    references = tuple(_write(spec, arch, folder, taken.get(spec)) for spec in specs)
    if binaries:
        from dovetail.kernels.binaries import add_binaries

        references = tuple(add_binaries(one, arch, folder, layer.top_k) for one in references)
    found = KernelSet(layer, arch.name, chosen, references)
    text = json.dumps(codec.encode(found), indent=1, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return found


def _refused(
    specs: Sequence[KernelSpec], arch: Arch, taken: dict[KernelSpec, Taken]
) -> set[GemmSpec]:
    """Compile ``specs``: what those that pass take goes into ``taken``, the others come back."""
    from dovetail.codegen.gate.compile import compile_kernel
    from dovetail.codegen.gate.judge import problems

    refused = set()
    with tempfile.TemporaryDirectory() as scratch:
        for spec in specs:
            module = load_source(emit_kernel(spec), Path(scratch), file_name(spec))
            compiled = compile_kernel(module, spec, arch)
            found = [problem for each in compiled for problem in problems(spec, arch, each)]
            if not found:
                registers = max(each.facts.registers for each in compiled)
                taken[spec] = registers, max(each.facts.shared_bytes for each in compiled)
            elif isinstance(spec, GemmSpec):
                refused.add(spec)
            else:
                raise InputError(
                    f"kernel {spec.name} does not pass the gate for {arch.name}: {found[0]}; "
                    "no other form of it is known"
                )
    return refused


def _write(spec: KernelSpec, arch: Arch, folder: Path, taken: Taken | None) -> KernelReference:
    text, name = emit_kernel(spec), file_name(spec)
    (folder / name).write_text(text, encoding="utf-8")
    reference = KernelReference(name, arch.name, spec, spec_digest(spec), source_digest(text))
    if taken is None:
        return reference
    from dovetail.codegen.gate.compile import triton_version

    compiler = f"triton {triton_version()}"
    return replace(reference, compiler=compiler, registers=taken[0], shared_bytes=taken[1])


def check_kernels(folder: Path) -> KernelSet:
    """Read a manifest and compare every source with what its spec gives; nothing is imported.

    Raises PlanError with the first file that is missing, altered or of another version.
    """
    path = folder / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PlanError(f"{path}: not a readable manifest of kernels: {error}") from None
    found = codec.decode(data, KernelSet)
    for reference in found.kernels:
        check_reference(reference, folder)
        if reference.binaries:
            from dovetail.kernels.binaries import check_binaries

            check_binaries(reference, folder, found.layer.top_k)
    return found


def check_reference(
    reference: KernelReference,
    folder: Path,
    prefix: str = "",
    advice: str = "write the kernels again with `dovetail kernels make`",
) -> None:
    """Hold a kernel's source in ``folder`` against its spec; ``prefix`` precedes its file's name.

    Raises PlanError with ``advice`` where it is missing, altered or another version's.
    """
    path = folder / reference.file
    if reference.file != prefix + file_name(reference.spec):
        raise PlanError(f"{path}: its spec belongs in {file_name(reference.spec)}; {advice}")
    if reference.spec_digest != spec_digest(reference.spec):
        raise PlanError(f"{path}: the manifest's spec was altered; {advice}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise PlanError(f"{path}: {error.strerror}; {advice}") from None
    if text != emit_kernel(reference.spec) or source_digest(text) != reference.source_digest:
        raise PlanError(
            f"{path}: not what this version of dovetail emits from its spec: the file was altered, "
            f"or comes from another version; {advice}"
        )
