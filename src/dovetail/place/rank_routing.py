"""What tokens chose on the ranks of a run: `each rank's part -> one routing trace`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dovetail.ir.routing_trace import RoutingTrace, make_trace
from dovetail.ir.task_graph import TaskGraph

Ints = NDArray[np.int64]


class RankRouting:
    """One rank's part: tokens of a layer as they pass, from which ``step`` on they count."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        """``lengths`` are those of the prompts: later positions are fed back."""
        self.step, self._lengths = 0, np.array(lengths)
        self._rows: list[Ints] = []

    def add(self, layer: int, prompt: Ints, position: Ints, experts: Tensor) -> None:
        """Take a layer's tokens: ``prompt`` and ``position [n]``, ``experts [n, top_k]``."""
        fixed = np.stack([np.full_like(prompt, layer), np.full_like(prompt, self.step)], axis=1)
        token = np.stack([prompt, position, position >= self._lengths[prompt]], axis=1)
        self._rows.append(np.concatenate([fixed, token, experts.numpy()], axis=1))

    def save(self, path: Path) -> None:
        """Write the part."""
        np.savez(path, rows=np.concatenate(self._rows))


def merged(paths: Sequence[Path], graph: TaskGraph) -> RoutingTrace:
    """The trace of all ranks' parts; a token may have passed its layers on several of them."""
    parts = []
    for path in paths:
        with np.load(path, allow_pickle=False) as file:
            parts.append(file["rows"])
    rows = np.concatenate(parts)
    layers, column = np.unique(rows[:, 0], return_inverse=True)
    tokens, token = np.unique(rows[:, 1:5], axis=0, return_inverse=True)
    experts = np.full((len(tokens), len(layers), rows.shape[1] - 5), -1, np.int64)
    experts[token, column] = rows[:, 5:]
    specs = [task.experts for body in graph.bodies if (task := body.experts) is not None]
    assert specs[0] is not None
    return make_trace(
        experts,
        specs[0].count,
        step=tokens[:, 0],
        prompt=tokens[:, 1],
        position=tokens[:, 2],
        decode=tokens[:, 3],
        layers=layers.tolist(),
        model_layers=len(graph.layers),
        model=str(graph.model.get("model_type", "")),
    )
