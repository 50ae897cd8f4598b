"""A layer's kernels as files: readable sources and a manifest of what each one is.

The manifest holds specs and digests, no code: `check_kernels` emits every spec anew and compares,
so that a source that was changed by hand, or by another version, is noticed before it is imported.
"""

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import LADDER, choose_ladder
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source, source_digest
from dovetail.ir import codec
from dovetail.ir.errors import InputError, PlanError
from dovetail.ir.kernel_layer import KernelReference, LayerKernels, LayerSpec
from dovetail.ir.kernel_spec import KernelSpec, spec_digest

MANIFEST = "kernels.json"


@dataclass(frozen=True, slots=True)
class KernelSet:
    """The kernels of one layer on one architecture, one entry of ``ladder`` per bucket of token
    counts, one reference per source file."""

    layer: LayerSpec
    arch: str
    ladder: tuple[LayerKernels, ...]
    kernels: tuple[KernelReference, ...]


def write_kernels(
    layer: LayerSpec, arch: Arch, folder: Path, ladder: Sequence[int] = LADDER, gate: bool = False
) -> KernelSet:
    """Choose, emit and write a layer's kernels and their manifest to ``folder``.

    With ``gate`` every kernel is compiled ahead of time and held against its budget; registers and
    shared memory go into the references. Raises InputError for a kernel that does not pass, or
    where Triton is not installed.
    """
    if gate and importlib.util.find_spec("triton") is None:
        raise InputError("the gate compiles kernels with Triton, which is not installed here")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = choose_ladder(layer, arch, ladder)
    specs = dict.fromkeys(spec for kernels in chosen for spec in kernels.specs())
    references = tuple(_write(spec, arch, folder, gate) for spec in specs)
    found = KernelSet(layer, arch.name, chosen, references)
    text = json.dumps(codec.encode(found), indent=1, ensure_ascii=False) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    return found


def _write(spec: KernelSpec, arch: Arch, folder: Path, gate: bool) -> KernelReference:
    text, name = emit_kernel(spec), file_name(spec)
    (folder / name).write_text(text, encoding="utf-8")
    reference = KernelReference(name, arch.name, spec, spec_digest(spec), source_digest(text))
    return _gated(reference, arch, folder, text) if gate else reference


def _gated(reference: KernelReference, arch: Arch, folder: Path, text: str) -> KernelReference:
    from dovetail.codegen.gate.compile import compile_kernel, triton_version
    from dovetail.codegen.gate.judge import problems

    module = load_source(text, folder, reference.file)
    for compiled in compile_kernel(module, reference.spec, arch):
        found = problems(reference.spec, arch, compiled)
        if found:
            raise InputError(
                f"{reference.file} does not pass the gate for {arch.name}: {'; '.join(found)}; "
                "choose another ladder of token counts"
            )
        reference = replace(
            reference,
            compiler=f"triton {triton_version()}",
            registers=compiled.facts.registers,
            shared_bytes=compiled.facts.shared_bytes,
        )
    return reference


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
        _check(reference, folder)
    return found


def _check(reference: KernelReference, folder: Path) -> None:
    path = folder / reference.file
    advice = "write the kernels again with `dovetail kernels make`"
    if reference.file != file_name(reference.spec):
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
