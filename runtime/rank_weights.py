"""What one rank of an expert-parallel model holds: all that is not a routed expert, and the experts
that a placement gives it; and the emitted code of every layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.ir.errors import PlanError
from dovetail.ir.expert_placement import ExpertPlacement
from dovetail.ir.placement import experts_of
from dovetail.ir.program import Program, Run, unroll
from dovetail.ir.task_graph import TaskGraph
from dovetail.runtime.direct_io import Reader
from dovetail.runtime.kv_store import anonymous
from dovetail.runtime.safetensors_index import CheckpointIndex
from dovetail.runtime.weight_store import Tensors, WeightStore

Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class LayerCode:
    """A layer's emitted functions: before its experts, one expert, after them (dense layers have
    only the first)."""

    before: tuple[Function, ...]
    expert: Function | None
    after: tuple[Function, ...]


def layer_codes(
    graph: TaskGraph, program: Program, functions: Mapping[str, Any]
) -> tuple[LayerCode, ...]:
    """The functions of every layer, from the program's order of segments."""
    runs = [item for item in unroll(program.engines["cpu0"]) if isinstance(item, Run)]
    codes = []
    for layer in range(len(graph.layers)):
        names = list(dict.fromkeys(run.segment for run in runs if run.layer == layer))
        at = next((i for i, n in enumerate(names) if program.segment(n).over == "experts"), None)
        made = [functions[name] for name in names]
        if at is None:
            codes.append(LayerCode(tuple(made), None, ()))
        else:
            codes.append(LayerCode(tuple(made[:at]), made[at], tuple(made[at + 1 :])))
    return tuple(codes)


class RankWeights:
    """The weights in this rank's memory; ``experts[layer]`` maps an expert to its tensors.

    Raises PlanError if the placement is of another model or number of ranks.
    """

    def __init__(
        self,
        graph: TaskGraph,
        index: CheckpointIndex,
        placement: ExpertPlacement,
        rank: int,
        ranks: int,
    ) -> None:
        self.columns = expert_columns(graph, placement, ranks)
        with Reader() as reader:
            store = WeightStore(graph, index, reader)
            self.embed = _read(store, "embed")
            self.head = _read(store, "head")
            self.dense = [_read(store, "dense", layer) for layer in range(len(graph.layers))]
            self.experts: dict[int, dict[int, Tensors]] = {
                layer: {
                    expert: _read(store, "experts", layer, range(expert, expert + 1))
                    for expert in sorted(set(placement.layers[column].experts[rank]))
                }
                for layer, column in self.columns.items()
            }


def expert_columns(graph: TaskGraph, placement: ExpertPlacement, ranks: int) -> dict[int, int]:
    """Which of the placement's layers each layer with experts is. Raises PlanError if the
    placement does not fit the model and the ranks."""
    layers = [layer for layer in range(len(graph.layers)) if experts_of(graph, layer)]
    counts = {spec.count for layer in layers if (spec := experts_of(graph, layer))}
    found = (len(placement.layers), placement.experts, placement.devices)
    if found != (len(layers), *counts, ranks):
        raise PlanError(
            f"the placement is for {found[0]} layers of {found[1]} experts on {found[2]} devices; "
            f"found {len(layers)} layers of {sorted(counts)} experts and {ranks} processes: place "
            "again for these"
        )
    return {layer: column for column, layer in enumerate(layers)}


def _read(store: WeightStore, kind: str, layer: int = -1, experts: range = range(0)) -> Tensors:
    unit = store.unit(kind, layer, experts)
    if not unit.nbytes:
        return {}
    return store.read(unit, anonymous(unit.nbytes), streamed=False)[0]
