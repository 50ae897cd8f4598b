"""The program: a lowered schedule, one ordered instruction list per engine, run once per step.

Streamed weights go through **rings** of recycled buffers. An engine that loads waits for room,
loads, and signals that the load is ready; an engine that computes waits for it, runs, and frees it.
Loads of a ring have one order, that of the waits for them, whoever makes them (see load_order).
A load's room and its signal are on the engine that makes it. ``Signal`` and ``Wait`` on a
**phase** order the compute workers among each other: a wait passes once every worker has signalled.

``layer`` and ``chunk`` of an instruction count from the variable of the loop around it, or from
zero outside of loops.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from dovetail.ir.batching import Admission


@dataclass(frozen=True, slots=True)
class Wait:
    """Block until the ring has room (``room``), its next load is there (``ready``), or every
    worker has signalled the phase (``phase``)."""

    what: Literal["room", "ready", "phase"]
    name: str


@dataclass(frozen=True, slots=True)
class Signal:
    """Announce that the ring's next load is there (``ready``) or that this worker has reached the
    phase (``phase``)."""

    what: Literal["ready", "phase"]
    name: str


@dataclass(frozen=True, slots=True)
class Load:
    """Read a unit from disk into the next buffer of its ring; for experts, chunk ``chunk``."""

    ring: str
    layer: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Free:
    """Give this worker's claim on the unit's buffer back to the ring."""

    ring: str
    layer: int
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Run:
    """Run a segment on this worker's share of the step.

    ``unit`` is where its weights are: ``ram``, a ring's name, or "" for none. For experts,
    ``chunk`` is the streamed chunk, or -1 for the layer's resident experts.
    """

    segment: str
    layer: int
    unit: str = ""
    chunk: int = 0


@dataclass(frozen=True, slots=True)
class Loop:
    """Repeat ``body`` for ``variable`` in ``range(start, stop, step)``."""

    variable: Literal["layer", "chunk"]
    start: int
    stop: int
    step: int
    body: tuple["Instruction", ...]


Instruction = Wait | Signal | Load | Free | Run | Loop
Flat = Wait | Signal | Load | Free | Run


@dataclass(frozen=True, slots=True)
class Ring:
    """Recycled buffers of one size for streamed units of one kind; ``consumers`` workers free
    each load."""

    name: str
    slots: int
    slot_bytes: int
    consumers: int


@dataclass(frozen=True, slots=True)
class Segment:
    """Tasks of a body that run together. ``over`` is what a worker's share is made of: ``groups``
    of sequences, ``experts``, or ``seqs`` (the sequences that get a token)."""

    name: str
    body: str
    tasks: tuple[str, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    over: Literal["groups", "experts", "seqs"]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the executor needs beside the instructions. ``experts_resident[i]`` experts of layer i
    are in ram and ``chunk`` make one streamed load; ``expert_rows`` and ``head_rows`` bound the
    rows of one GEMM; ``step_tokens`` is the most new tokens of a step; ``block`` the bytes of one
    disk read; ``threads`` the threads of one worker; ``buckets`` the tile sizes of
    16-bit products; experts in turn with at most ``pack`` rows together run as one (0: none do),
    their products in one call where they are ``grouped``."""

    admission: Admission
    experts_resident: tuple[int, ...]
    chunk: int
    expert_rows: int
    head_rows: int
    step_tokens: int
    block: int
    threads: int
    buckets: tuple[int, ...]
    pack: int = 0
    grouped: bool = False

    def chunk_experts(self, layer: int, chunk: int) -> range:
        """The experts of streamed chunk ``chunk``, or the resident ones for -1."""
        resident = self.experts_resident[layer]
        if chunk < 0:
            return range(resident)
        return range(resident + chunk * self.chunk, resident + (chunk + 1) * self.chunk)


@dataclass(frozen=True, slots=True)
class Program:
    """What every engine does in one step. ``resident`` lists the units that are in memory before
    the first step, as (kind, layer, experts): layer -1 for embed and head."""

    engines: Mapping[str, tuple[Instruction, ...]]
    rings: tuple[Ring, ...]
    segments: tuple[Segment, ...]
    resident: tuple[tuple[str, int, int], ...]
    capacity: Mapping[str, int]
    reserved: Mapping[str, int]
    settings: Settings

    @property
    def workers(self) -> tuple[str, ...]:
        """The compute engines."""
        return tuple(name for name in self.engines if name.startswith("cpu"))

    def segment(self, name: str) -> Segment:
        """The segment called ``name``."""
        return next(s for s in self.segments if s.name == name)

    def ring(self, name: str) -> Ring:
        """The ring called ``name``."""
        return next(r for r in self.rings if r.name == name)


def unroll(instructions: tuple[Instruction, ...], layer: int = 0, chunk: int = 0) -> Iterator[Flat]:
    """The instructions with loops expanded and absolute layer and chunk numbers."""
    for item in instructions:
        if isinstance(item, Loop):
            for value in range(item.start, item.stop, item.step):
                if item.variable == "layer":
                    yield from unroll(item.body, value, chunk)
                else:
                    yield from unroll(item.body, layer, value)
        elif isinstance(item, Wait | Signal):
            yield item
        elif isinstance(item, Run) and item.chunk < 0:
            yield replace(item, layer=item.layer + layer)
        else:
            yield replace(item, layer=item.layer + layer, chunk=item.chunk + chunk)


def tally(
    instructions: tuple[Instruction, ...], layer: int = 0
) -> Iterator[tuple[Load | Run, int]]:
    """The loads and runs with how often they are made; of the chunks of a layer, which are all
    alike, the first stands for all."""
    for item in instructions:
        if isinstance(item, Loop):
            values = range(item.start, item.stop, item.step)
            if item.variable == "layer":
                for value in values:
                    yield from tally(item.body, value)
            else:
                for found, count in tally(item.body, layer):
                    yield found, count * len(values)
        elif isinstance(item, Load | Run):
            yield replace(item, layer=item.layer + layer), 1
