"""Routing traces as part of a workload: how often each expert was chosen, layer by layer."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dovetail.ir.errors import InputError
from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.workload import Routing, Workload
from dovetail.routing.trace import load_trace


def with_routing(workload: Workload, paths: Sequence[Path], graph: TaskGraph) -> Workload:
    """The workload with the routing of these traces, each a scenario of its own.

    Raises InputError for a file that is not a trace, or is one of another model.
    """
    return replace(workload, routing=tuple(routing_of(path, graph) for path in paths))


def routing_of(path: Path, graph: TaskGraph) -> Routing:
    """The loads of one trace, by the model's layers. Raises InputError."""
    trace = load_trace(path)
    specs = [experts_of(graph, layer) for layer in range(len(graph.layers))]
    routed = tuple(layer for layer, spec in enumerate(specs) if spec)
    counts = {spec.count for spec in specs if spec}
    if trace.layers != routed or counts != {trace.num_experts}:
        raise InputError(
            f"the routing trace {path} is of {trace.model or 'another model'} with "
            f"{trace.num_experts} experts in {len(trace.layers)} layers, found a model with "
            f"{', '.join(map(str, sorted(counts))) or 'no'} experts in {len(routed)}; record one "
            "with `dovetail run --record-routing`"
        )
    loads = dict(zip(trace.layers, trace.loads().tolist(), strict=True))
    return Routing(
        name=path.name,
        digest=hashlib.sha256(path.read_bytes()).hexdigest(),
        tokens=trace.tokens,
        loads=tuple(tuple(loads.get(layer, ())) for layer in range(len(graph.layers))),
    )
