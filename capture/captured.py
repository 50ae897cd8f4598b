"""A captured model on disk: ``graph.json`` and ``constants.safetensors``. No transformers here."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from dovetail.ir.codec import canonical, decode
from dovetail.ir.errors import PlanError
from dovetail.ir.task_graph import TaskGraph

_GRAPH = "graph.json"
_CONSTANTS = "constants.safetensors"


@dataclass(frozen=True, slots=True)
class Captured:
    """A task graph, the data of its constants, and the seconds that capture took."""

    graph: TaskGraph
    constants: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0

    def save(self, directory: Path) -> None:
        """Write both files into ``directory``, made if needed; each replaces the old at once."""
        directory.mkdir(parents=True, exist_ok=True)
        constants = directory / f"{_CONSTANTS}.part"
        save_file({k: v.contiguous() for k, v in self.constants.items()}, constants)
        os.replace(constants, directory / _CONSTANTS)
        graph = directory / f"{_GRAPH}.part"
        graph.write_text(canonical(self.graph) + "\n", encoding="utf-8")
        os.replace(graph, directory / _GRAPH)


def load_captured(directory: Path) -> Captured:
    """What ``Captured.save`` wrote; raises PlanError when a file is missing or malformed."""
    try:
        data = json.loads((directory / _GRAPH).read_text(encoding="utf-8"))
        constants = load_file(directory / _CONSTANTS)
    except (OSError, ValueError) as error:
        raise PlanError(
            f"{directory} holds no readable captured model ({error}); capture the model again"
        ) from error
    graph = decode(data, TaskGraph)
    absent = sorted(set(graph.constants) - set(constants))
    if absent:
        raise PlanError(
            f"{directory / _CONSTANTS} lacks {absent[0]}, which {_GRAPH} expects; capture the "
            "model again"
        )
    return Captured(graph, constants)
