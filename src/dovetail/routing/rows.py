"""The rows of a routing record: `records as they were written -> a trace's rows`."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.errors import InputError
from dovetail.ir.placement import experts_of
from dovetail.ir.routing_trace import MOST_EXPERTS, RoutingTrace, make_trace
from dovetail.ir.task_graph import TaskGraph

Lengths = Mapping[int, int]
"""Rows of every finished prompt: its tokens and the new ones but the last, which is not fed
back."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a record's rows are about: the layers with routed experts, and their choices."""

    model: str
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    model_layers: int

    @classmethod
    def of(cls, graph: TaskGraph) -> "Geometry":
        """That of a model. Raises InputError if it has no routed experts or layers that differ."""
        specs = {i: s for i in range(len(graph.layers)) if (s := experts_of(graph, i))}
        shapes = sorted({(spec.count, spec.top_k) for spec in specs.values()})
        if len(shapes) != 1 or shapes[0][0] > MOST_EXPERTS:
            raise InputError(
                f"--record-routing: found layers with (experts, choices) {shapes or 'none'}, "
                f"expected one such pair of at most {MOST_EXPERTS} experts; leave the option out"
            )
        name = str(graph.model.get("model_type", ""))
        return cls(name, *shapes[0], tuple(specs), len(graph.layers))


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of finished prompts, prompt by prompt: ``experts [rows, layers, top_k]`` with -1
    where nothing was recorded."""

    done: Lengths
    experts: NDArray[np.int16]
    step: NDArray[np.int64]
    decode: NDArray[np.bool_]

    @classmethod
    def empty(cls, geometry: Geometry, done: Lengths) -> "Rows":
        """Rows of which nothing is known yet."""
        count = sum(done.values())
        shape = (count, len(geometry.layers), geometry.top_k)
        return cls(
            done, np.full(shape, -1, np.int16), np.zeros(count, np.int64), np.zeros(count, np.bool_)
        )

    def read(self, file: BinaryIO, geometry: Geometry) -> int:
        """Take the rows from a record; returns the offset behind its last whole entry."""
        starts = np.cumsum([0, *self.done.values()])[:-1].tolist()
        first = dict(zip(self.done, starts, strict=True))
        place, base, last, end = _Place.none(), 0, 0, 0
        for entry, choices in entries(file, geometry):
            end = file.tell()
            if choices is not None:
                self.experts[place.rows, entry["layer"]] = choices[place.kept]
            elif "step" in entry:
                last = base + entry["step"]
                place = _Place.of(entry["groups"], first, self.done)
                self.step[place.rows], self.decode[place.rows] = last, place.decode
            else:
                # Steps count from 1 again in a run that continues another.
                base = last
        return end

    def trace(self, geometry: Geometry) -> RoutingTrace:
        """The rows in the order of their steps."""
        order = self.step.argsort(kind="stable")
        lengths = list(self.done.values())
        prompt = np.repeat(list(self.done), lengths)
        position = np.concatenate([np.arange(length) for length in lengths])
        _, step = np.unique(self.step[order], return_inverse=True)
        return make_trace(
            self.experts[order],
            geometry.num_experts,
            prompt=prompt[order],
            position=position[order],
            step=step,
            decode=self.decode[order],
            layers=geometry.layers,
            model_layers=geometry.model_layers,
            model=geometry.model,
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the tokens of a list of groups go: ``kept`` are those of finished prompts, ``rows``
    their rows."""

    kept: NDArray[np.int64]
    rows: NDArray[np.int64]
    decode: NDArray[np.bool_]

    @classmethod
    def none(cls) -> "_Place":
        empty = np.zeros(0, np.int64)
        return cls(empty, empty, empty.astype(np.bool_))

    @classmethod
    def of(cls, groups: Sequence[Any], starts: Mapping[int, int], done: Lengths) -> "_Place":
        kept, rows, decode, at = [], [], [], 0
        for fed_back, members in groups:
            for prompt, held, tokens in members:
                # A run that a kill cut off may have gone further than the one that finished.
                count = max(0, min(tokens, done.get(prompt, 0) - held))
                if count:
                    kept.append(np.arange(at, at + count))
                    first = starts[prompt] + held
                    rows.append(np.arange(first, first + count))
                    decode.append(np.full(count, fed_back))
                at += tokens
        if not kept:
            return cls.none()
        return cls(np.concatenate(kept), np.concatenate(rows), np.concatenate(decode))


def entries(
    file: BinaryIO, geometry: Geometry
) -> Iterator[tuple[dict[str, Any], NDArray[np.int16] | None]]:
    """The records after the header: a step's groups, or a layer with its choices. What a kill has
    torn at the end is left out."""
    file.seek(0)
    file.readline()
    while True:
        line = file.readline()
        if not line.endswith(b"\n"):
            return
        entry = json.loads(line)
        if "tokens" not in entry:
            yield entry, None
            continue
        size = entry["tokens"] * geometry.top_k * 2
        data = file.read(size)
        if len(data) < size:
            return
        yield entry, np.frombuffer(data, "<i2").reshape(-1, geometry.top_k)
