"""The part of a layout that concerns a GPU: what lies in its memory, and what the CPU computes.

`device, move -> device`; the rest of the layout is in ``apply_moves``.
"""

from dataclasses import dataclass, replace

from dovetail.ir.errors import VerifyError
from dovetail.ir.moves import Assign, Place
from dovetail.ir.placement import experts_of
from dovetail.ir.task_graph import TaskGraph


@dataclass(frozen=True, slots=True)
class Device:
    """``dense[i]`` and ``experts[i]`` say what of layer i is in hbm. ``kv_percent`` of the
    sequences keep their KV in hbm, ``attention_cpu`` percent have it in ram and decode on the CPU;
    the others' KV is copied for every step. ``experts_cpu`` percent of a layer's experts run on
    the CPU, the same ones always or, ``by_load``, those that a step needs least; so do the columns
    of ``linears_cpu`` percent of what is copied. ``which[i]`` names the experts of layer i in hbm
    where a placement chose them."""

    embed: bool
    head: bool
    dense: tuple[bool, ...]
    experts: tuple[int, ...]
    kv_percent: int = 0
    attention_cpu: int = 0
    experts_cpu: int = 0
    by_load: bool = False
    linears_cpu: int = 0
    which: tuple[tuple[int, ...], ...] = ()


def empty(graph: TaskGraph) -> Device:
    """Everything computed on the GPU, nothing in its memory."""
    layers = len(graph.layers)
    return Device(
        embed=False,
        head=False,
        dense=(False,) * layers,
        experts=(0,) * layers,
        which=((),) * layers,
    )


def place(device: Device, graph: TaskGraph, move: Place) -> Device:
    """``device`` with a unit in hbm. Raises VerifyError where the layer has not so much."""
    match move.unit:
        case "embed":
            return replace(device, embed=True)
        case "head":
            return replace(device, head=True)
        case "kv":
            return replace(device, kv_percent=_percent(move, move.count))
        case "dense":
            dense = list(device.dense)
            for layer in move.layers:
                dense[layer] = True
            return replace(device, dense=tuple(dense))
    experts, which = list(device.experts), list(device.which)
    for layer in move.layers:
        spec = experts_of(graph, layer)
        most = spec.count if spec else 0
        if not 0 <= move.count <= most:
            raise VerifyError(f"place experts: layer {layer} has {most}, found count {move.count}")
        check_which(move, most)
        experts[layer], which[layer] = move.count, move.which
    return replace(device, experts=tuple(experts), which=tuple(which))


def check_which(move: Place, experts: int) -> None:
    """Raises VerifyError unless the experts that a move names are as many as it counts, of one
    layer, and among its ``experts``."""
    named = set(move.which)
    if move.which and (
        len(move.layers) != 1
        or len(named) != len(move.which)
        or move.count != len(named)
        or not named <= set(range(experts))
    ):
        raise VerifyError(
            f"place experts: found which={move.which} of layers {move.layers} with count "
            f"{move.count}; expected distinct experts from 0 to {experts - 1} of one layer, as "
            "many as the count"
        )


def assign(device: Device, move: Assign) -> Device:
    """``device`` with a share of a role on the CPU."""
    if move.engine != "cpu" or move.role == "all":
        raise VerifyError(
            f"assign {move.role} to {move.engine}: after assign(all, gpu, 100) only attention, "
            "experts or linears can go to the cpu"
        )
    percent = _percent(move, move.percent)
    if move.by == "load" and move.role != "experts":
        raise VerifyError(f"assign {move.role} by load: only experts have loads; leave it out")
    if move.role == "attention":
        return replace(device, attention_cpu=percent)
    if move.role == "linears":
        return replace(device, linears_cpu=percent)
    return replace(device, experts_cpu=percent, by_load=move.by == "load")


def check(device: Device) -> None:
    """Raises VerifyError for shares of the sequences that do not add up."""
    if device.kv_percent + device.attention_cpu > 100:
        raise VerifyError(
            f"{device.kv_percent} % of the sequences have their KV in hbm and "
            f"{device.attention_cpu} % decode on the cpu: together more than 100 %"
        )


def _percent(move: Place | Assign, value: int) -> int:
    if not 0 <= value <= 100:
        raise VerifyError(f"{move}: expected a percentage from 0 to 100, found {value}")
    return value
