"""Expert loads from files: dovetail's routing traces and what SGLang and vLLM write.

| file | from | holds |
|---|---|---|
| ``.npz`` | ``dovetail run --record-routing`` | what every token chose |
| ``.pt`` | SGLang, ``--expert-distribution-recorder-mode stat`` | ``logical_count`` |
| ``.pt`` | SGLang, ``per_pass`` and ``per_token`` | ``records``, ``last_physical_to_logical_map`` |
| ``.json`` | SGLang's ``--init-expert-location`` | ``logical_count`` |
| ``.json`` | vLLM, snapshots of the load balancer | ``snapshots`` with ``window_expert_load`` |
| ``.json`` | vLLM, load history (the ADRS benchmark's form) | ``load_history`` |
| ``.json`` | anything | numbers ``[layers][experts]`` or ``[steps][layers][experts]`` |

Files of tensors are read as tensors only: one that brings code is refused.
"""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.errors import InputError
from dovetail.ir.routing_trace import RoutingTrace
from dovetail.place.sglang_records import records_to_loads, records_to_trace
from dovetail.routing.trace import load_trace

Floats = NDArray[np.float64]
FORMS = (
    "a routing trace (.npz), SGLang's expert distribution (.pt, or .json with logical_count), "
    "vLLM's expert loads (.json with snapshots or load_history) or .json numbers [layers][experts]"
)


@dataclass(frozen=True, slots=True, eq=False)
class LoadFile:
    """How much each expert was used: ``loads [layers, experts]`` of the layers with experts, whose
    numbers in the model of ``model_layers`` layers are ``layers``; ``trace`` where tokens are
    known one by one."""

    name: str
    loads: Floats
    layers: tuple[int, ...]
    model_layers: int
    trace: RoutingTrace | None = None

    @classmethod
    def of(cls, trace: RoutingTrace, name: str) -> "LoadFile":
        """Those of a trace."""
        loads = trace.loads().astype(np.float64)
        return cls(name, loads, trace.layers, trace.model_layers, trace)


def read_loads(path: Path) -> LoadFile:
    """Read any of the files above. Raises InputError, naming the file, for everything else."""
    name = path.name.removesuffix(path.suffix)
    if path.suffix == ".npz":
        return LoadFile.of(load_trace(path), name)
    if path.suffix not in (".pt", ".json"):
        raise InputError(f"{path}: found a file that ends in {path.suffix!r}, expected {FORMS}")
    data = _tensors(path) if path.suffix == ".pt" else _json(path)
    try:
        return _from_data(data, name)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _from_data(data: object, name: str) -> LoadFile:
    match data:
        case {"logical_count": counts}:
            return _from_counts(_array(counts, "logical_count"), name)
        case {"records": [*records], "last_physical_to_logical_map": places}:
            physical = _array(places, "last_physical_to_logical_map").astype(np.int64)
            if records and all("topk_ids_of_layer" in record for record in records):
                return LoadFile.of(records_to_trace(records, physical), name)
            return _from_counts(records_to_loads(records, physical), name)
        case {"snapshots": [_, *_] as snapshots}:
            return _from_counts(np.stack(_alike([_snapshot(each) for each in snapshots])), name)
        case {"load_history": [_, *_] as history}:
            loads = [_array(_field(each, "logical_expert_load"), "load") for each in history]
            return _from_counts(np.stack(_alike(loads)), name)
        case [_, *_]:
            return _from_counts(_array(data, "loads"), name)
    keys = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
    raise InputError(f"found {keys}, expected {FORMS}")


def _from_counts(counts: Floats, name: str) -> LoadFile:
    """Loads of ``counts [layers, experts]`` or ``[steps, layers, experts]``; layers that no token
    went through have no experts."""
    total = counts.sum(axis=0) if counts.ndim == 3 else counts
    if total.ndim != 2 or 0 in total.shape:
        raise InputError(
            f"found counts of the shape {list(counts.shape)}, expected [layers, experts] or "
            "[steps, layers, experts]"
        )
    if not np.isfinite(counts).all() or counts.min() < 0:
        bad = "NaN or infinite" if not np.isfinite(counts).all() else f"{counts.min():g}"
        raise InputError(f"found a load that is {bad}, expected counts of at least 0")
    used = np.flatnonzero(total.sum(axis=1) > 0)
    if not len(used):
        raise InputError("found no load at all: no token went through any layer; record again")
    return LoadFile(name, total[used], tuple(used.tolist()), len(total))


def _snapshot(snapshot: object) -> Floats:
    """Loads of vLLM's physical slots, added up by expert."""
    loads = _array(_field(snapshot, "window_expert_load"), "window_expert_load")
    places = _array(_field(snapshot, "physical_to_logical_map"), "physical_to_logical_map")
    if loads.ndim != 2 or loads.shape != places.shape:
        raise InputError(
            f"window_expert_load has the shape {list(loads.shape)} and physical_to_logical_map "
            f"{list(places.shape)}, expected one shape [layers, slots]"
        )
    return records_to_loads([{"global_physical_count": loads}], places.astype(np.int64))


def _field(value: object, name: str) -> object:
    if not isinstance(value, Mapping) or name not in value:
        raise InputError(f"an entry has no {name!r}; write the file again")
    return value[name]


def _alike(arrays: Sequence[Floats]) -> Sequence[Floats]:
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise InputError(f"entries have the shapes {sorted(shapes)}, expected one shape")
    return arrays


def _array(value: Any, what: str) -> Floats:
    """``value`` (nested lists, or a tensor) as numbers."""
    try:
        # Tensors say numpy() themselves; bfloat16 does not.
        array = np.asarray(value.double() if hasattr(value, "double") else value)
        if array.dtype.kind not in "iuf":
            raise ValueError(f"{array.dtype}")
        return array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{what} is not a table of numbers ({error}); write it again") from None


def _json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; expected {FORMS}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}; expected {FORMS}") from error


def _tensors(path: Path) -> object:
    """What torch.save wrote, if it is tensors and plain data."""
    import torch

    if not path.is_file():
        raise InputError(f"{path} cannot be read: no such file; expected {FORMS}")
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path}: found no archive of torch.save, expected {FORMS}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, ValueError, EOFError, _unpickling_error()) as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(
            f"{path}: found a file that is not plain tensors and numbers ({first}); what brings "
            f"code is not loaded: expected {FORMS}"
        ) from None


def _unpickling_error() -> type[Exception]:
    """What torch.load raises for code; named through torch, for nothing here may unpickle."""
    import torch

    return torch.serialization.pickle.UnpicklingError  # type: ignore[attr-defined, no-any-return]
