"""Routing traces: which experts each token chose, in every layer, as one ``.npz`` file.

A file holds these arrays (numpy's own format; nothing in it is code, and nothing is pickled):

    format        text, ``dovetail routing trace``
    version       int, 1
    model         text, the model's name
    num_experts   int, the routed experts of a layer
    layers        int32 [layers], which layers of the model have routed experts
    model_layers  int, the layers of the model, those without experts included
    experts       int16 [tokens, layers, top_k], the experts that a token chose, none of them twice
    prompt        int32 [tokens], the prompt that a token belongs to
    position      int32 [tokens], its place in its sequence, from 0
    step          int32 [tokens], the pass through the model that it was in, never falling
    decode        bool [tokens], it was fed back, rather than part of a prompt
"""

import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.errors import InputError, OutputError
from dovetail.ir.routing_trace import RoutingTrace, make_trace

__all__ = ["FORMAT", "VERSION", "RoutingTrace", "load_trace", "make_trace", "save_trace"]

FORMAT, VERSION = "dovetail routing trace", 1

_BROKEN = (
    ValueError,
    KeyError,
    EOFError,
    MemoryError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
"""What reading a damaged archive raises."""


def save_trace(trace: RoutingTrace, path: Path) -> None:
    """Write the file; a file of this name is replaced whole or not at all.

    Raises OutputError if it cannot be written.
    """
    partial = path.with_name(path.name + ".tmp")
    try:
        with partial.open("wb") as file:
            np.savez_compressed(file, **trace_arrays(trace))  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OutputError(
            f"the routing trace {path} cannot be written: {error.strerror}; name another place"
        ) from error


def trace_arrays(trace: RoutingTrace) -> dict[str, NDArray[Any]]:
    """The arrays of a trace's file, by name."""
    return {
        "format": np.array(FORMAT),
        "version": np.array(VERSION),
        "model": np.array(trace.model),
        "num_experts": np.array(trace.num_experts),
        "layers": np.array(trace.layers, np.int32),
        "model_layers": np.array(trace.model_layers),
        "experts": trace.experts,
        "prompt": trace.prompt,
        "position": trace.position,
        "step": trace.step,
        "decode": trace.decode,
    }


def load_trace(path: Path) -> RoutingTrace:
    """Read a routing trace. Raises InputError, naming the file, for anything that is not one."""
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise ValueError("one array")
            arrays = {name: loaded[name] for name in loaded.files}
    except OSError as error:
        raise InputError(
            f"the routing trace {path} cannot be read: {error.strerror or error}; give the path "
            "of a file that `dovetail run --record-routing` wrote"
        ) from error
    except _BROKEN as error:
        raise InputError(
            f"{path} is not a routing trace: found {str(error) or 'a broken file'}, expected an "
            ".npz archive; record one with `dovetail run --record-routing`"
        ) from error
    try:
        return _trace_from(arrays)
    except InputError as error:
        raise InputError(f"{path} is not a routing trace: {error}") from None


_FIELDS: dict[str, tuple[str, int]] = {
    "version": ("iu", 0),
    "model": ("U", 0),
    "num_experts": ("iu", 0),
    "layers": ("iu", 1),
    "model_layers": ("iu", 0),
    "experts": ("iu", 3),
    "prompt": ("iu", 1),
    "position": ("iu", 1),
    "step": ("iu", 1),
    "decode": ("b", 1),
}
"""The kind of type and the number of axes of every array."""


def _trace_from(arrays: dict[str, NDArray[Any]]) -> RoutingTrace:
    found = arrays.get("format")
    if found is None or found.dtype.kind != "U" or str(found) != FORMAT:
        raise InputError(
            f"found the arrays {', '.join(sorted(arrays)) or 'none'}, expected one named format "
            f"that says {FORMAT!r}; record one with `dovetail run --record-routing`"
        )
    for name, (kinds, axes) in _FIELDS.items():
        if name not in arrays:
            raise InputError(f"the array {name!r} is missing; record the trace again")
        array = arrays[name]
        if array.dtype.kind not in kinds or array.ndim != axes:
            raise InputError(
                f"{name} is {array.dtype} with {array.ndim} axes, expected {_kind(kinds)} with "
                f"{axes}; record the trace again"
            )
    if int(arrays["version"]) != VERSION:
        raise InputError(
            f"found version {int(arrays['version'])}, expected {VERSION}: read it with the "
            "dovetail that wrote it"
        )
    return make_trace(
        arrays["experts"],
        int(arrays["num_experts"]),
        prompt=arrays["prompt"],
        position=arrays["position"],
        step=arrays["step"],
        decode=arrays["decode"],
        layers=[int(layer) for layer in arrays["layers"]],
        model_layers=int(arrays["model_layers"]),
        model=str(arrays["model"]),
    )


def _kind(kinds: str) -> str:
    return {"iu": "whole numbers", "U": "text", "b": "truth values"}[kinds]
