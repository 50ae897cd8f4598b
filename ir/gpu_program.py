"""The program of a step with a GPU: one ordered instruction list per engine, run once per step.

Engines are streams of the GPU (``gpu0``, ``gpu1``, ``h2d``, ``d2h``) and threads of the host
(``disk``, ``cpu``). Each takes its instructions in order; ``Wait`` orders it after an operation of
another engine, by the event that the other engine records behind it. Buffers come from pools of
fixed sizes: ``Take`` says whose buffer an operation takes over, so no memory is given out or given
back while a step runs.

An operation belongs to a layer, -1 for what precedes the first and the number of layers for what
follows the last. ``layer`` of an instruction counts from the variable of the loop around it, or
from zero outside of loops.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

HOST_ENGINES = ("cpu", "disk")
"""Engines that are threads of the host; all others are streams of the GPU."""
ENGINES = ("gpu0", "gpu1", "h2d", "d2h", *HOST_ENGINES)
"""All engines that a program may have."""
Ref = tuple[str, int]
"""An operation and how many layers earlier it is; a negative number is a layer to come."""
Instance = tuple[str, int]
"""An operation and its layer."""


@dataclass(frozen=True, slots=True)
class GpuOp:
    """An operation of a layer's body, and what it does to memory.

    It ``reads`` what other operations wrote and comes ``after`` others whose results it does not
    read (a barrier). What it writes, ``nbytes`` where that is known, is in a buffer of the pool
    ``takes``, or, without one, in one of the operation's own output buffers. ``work`` is its class
    in a timeline, as in ``run:experts``.
    """

    name: str
    engine: str
    work: str
    reads: tuple[Ref, ...]
    after: tuple[Ref, ...] = ()
    takes: str = ""
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Wait:
    """Let nothing behind this begin before the operation has ended."""

    op: str
    layer: int


@dataclass(frozen=True, slots=True)
class Take:
    """The operation's buffer is that which ``of`` of layer ``of_layer`` had, or, where ``of`` is
    "", the pool's buffer number ``slot``."""

    op: str
    layer: int
    of: str = ""
    of_layer: int = 0
    slot: int = 0


@dataclass(frozen=True, slots=True)
class Do:
    """Begin the operation when all before it in the list has ended."""

    op: str
    layer: int


@dataclass(frozen=True, slots=True)
class Record:
    """Record the event of the operation, which is the last one begun."""

    op: str
    layer: int


@dataclass(frozen=True, slots=True)
class Layers:
    """Repeat ``body`` for the loop variable in ``range(start, stop, step)``."""

    start: int
    stop: int
    step: int
    body: tuple["GpuFlat", ...]


GpuFlat = Wait | Take | Do | Record
GpuInstruction = GpuFlat | Layers


@dataclass(frozen=True, slots=True)
class Pool:
    """``slots`` buffers of ``slot_bytes`` each in a tier."""

    name: str
    tier: str
    slots: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self.slots * self.slot_bytes


@dataclass(frozen=True, slots=True)
class GpuProgram:
    """What every engine does in one step of ``kind``.

    ``bodies`` are the operations of a layer; ``layers`` says which body each layer has, beginning
    with layer -1. ``outputs`` counts the output buffers of operations that have more than one:
    layer i writes number i modulo that. ``reserved`` has the bytes of each tier beside the pools by
    what they hold, ``capacity`` what the budget allows. ``notes`` say in words where the program
    differs from the plan's moves.
    """

    kind: str
    engines: Mapping[str, tuple[GpuInstruction, ...]]
    bodies: tuple[tuple[GpuOp, ...], ...]
    layers: tuple[int, ...]
    pools: tuple[Pool, ...]
    outputs: Mapping[str, int]
    reserved: Mapping[str, Mapping[str, int]]
    capacity: Mapping[str, int]
    notes: tuple[str, ...] = field(default=())

    def body(self, layer: int) -> tuple[GpuOp, ...]:
        """The operations of a layer; of -1 and the number of layers, what surrounds the layers."""
        return self.bodies[self.layers[layer + 1]]

    def pool(self, name: str) -> Pool:
        """The pool called ``name``."""
        return next(pool for pool in self.pools if pool.name == name)

    def ops(self) -> dict[Instance, GpuOp]:
        """Every operation of a step."""
        return {
            (op.name, layer): op
            for layer in range(-1, len(self.layers) - 1)
            for op in self.body(layer)
        }

    def flat(self) -> dict[str, list[GpuFlat]]:
        """Every engine's instructions with loops expanded and absolute layers."""
        return {engine: list(unroll(items)) for engine, items in self.engines.items()}


def unroll(items: tuple[GpuInstruction, ...]) -> Iterator[GpuFlat]:
    """The instructions with loops expanded and absolute layers."""
    for item in items:
        if isinstance(item, Layers):
            for value in range(item.start, item.stop, item.step):
                yield from (shifted(each, value) for each in item.body)
        else:
            yield item


def shifted(item: GpuFlat, by: int) -> GpuFlat:
    """An instruction ``by`` layers later."""
    if isinstance(item, Take) and item.of:
        return replace(item, layer=item.layer + by, of_layer=item.of_layer + by)
    return replace(item, layer=item.layer + by)


def text_of(item: GpuFlat, variable: str = "") -> str:
    """An instruction as a call: ``wait(copy_dense[layer])``."""
    match item:
        case Take(op, layer, "", _, slot):
            return f"take({instance_text(op, layer, variable)}, buffer {slot})"
        case Take(op, layer, of, of_layer):
            taken = instance_text(of, of_layer, variable)
            return f"take({instance_text(op, layer, variable)}, {taken}'s buffer)"
        case Wait(op, layer) | Do(op, layer) | Record(op, layer):
            return f"{type(item).__name__.lower()}({instance_text(op, layer, variable)})"


def instance_text(op: str, layer: int, variable: str = "") -> str:
    """An operation of a layer as it is written: ``copy_dense[layer + 1]``."""
    return f"{op}[{layer_text(layer, variable)}]"


def layer_text(layer: int, variable: str = "") -> str:
    """A layer as it is written: ``layer - 1``, or its number outside of loops."""
    if not variable:
        return str(layer)
    if not layer:
        return variable
    return f"{variable} {'+' if layer > 0 else '-'} {abs(layer)}"
