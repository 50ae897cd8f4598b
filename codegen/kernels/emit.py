"""Emit a kernel: `spec -> readable Triton module`, a pure function."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from dovetail.codegen.kernels.combine import emit_activate, emit_reduce
from dovetail.codegen.kernels.gemm import emit_gemm
from dovetail.codegen.kernels.routing import emit_route, emit_sort
from dovetail.ir.kernel_spec import (
    ActivateSpec,
    GemmSpec,
    KernelSpec,
    ReduceSpec,
    RouteSpec,
    SortSpec,
    spec_digest,
)


def emit_kernel(spec: KernelSpec) -> str:
    """The module's source text; the same spec gives the same text."""
    match spec:
        case GemmSpec():
            return emit_gemm(spec)
        case RouteSpec():
            return emit_route(spec)
        case SortSpec():
            return emit_sort(spec)
        case ActivateSpec():
            return emit_activate(spec)
        case ReduceSpec():
            return emit_reduce(spec)


def file_name(spec: KernelSpec) -> str:
    """``<name>_<first digits of the spec's digest>.py``: equal specs share a file."""
    return f"{spec.name}_{spec_digest(spec)[:10]}.py"


def source_digest(text: str) -> str:
    """Hex sha256 of a source text."""
    return hashlib.sha256(text.encode()).hexdigest()


def load_source(text: str, folder: Path, name: str) -> ModuleType:
    """Write ``text`` to ``folder/name`` and import it.

    Triton reads a kernel's source from its file, and so do tracebacks. Importing runs the text:
    give this only what was emitted here.
    """
    path = folder / name
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    module_name = f"dovetail_kernel_{source_digest(str(path) + text)[:16]}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    found = importlib.util.spec_from_file_location(module_name, path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[module_name] = module
    found.loader.exec_module(module)
    return module
