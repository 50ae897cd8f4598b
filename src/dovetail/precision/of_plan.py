"""Where a plan's weights are: the checkpoint, or beside it its experts in fewer bits."""

from collections.abc import Iterable

from dovetail.checkpoint import ModelFolder
from dovetail.ir import codec
from dovetail.ir.moves import ExpertFormat, Move, precision_of
from dovetail.ir.task_graph import TaskGraph
from dovetail.precision.folder import open_converted
from dovetail.runtime.safetensors_index import CheckpointIndex


def check_converted(folder: ModelFolder, allow: Iterable[ExpertFormat]) -> None:
    """Say before planning which experts are still to be converted. Raises CheckpointError."""
    for form in allow:
        open_converted(folder, form)


def plan_index(folder: ModelFolder, graph: TaskGraph, moves: Iterable[Move]) -> CheckpointIndex:
    """The tensors that a schedule of ``graph`` reads. Raises CheckpointError."""
    form = precision_of(moves)
    if form is None:
        return folder.index
    return open_converted(folder, form, graph=codec.digest(graph))
