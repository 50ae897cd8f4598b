"""A kernel compiled ahead of time: its file, and all that whoever launches it must know."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Argument:
    """An argument of a launch, by name and compiler's type: ``*bf16`` is a pointer, ``i32`` a
    number. Pointers must be multiples of 16 bytes: the binary was compiled for such."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class KernelBinary:
    """One function of a kernel's module, compiled for ``arch``, and its launch interface.

    ``arguments`` in order, then ``scratch`` null pointers that the compiler adds; ``constants`` and
    ``options`` are those of the source that it was compiled from (``source_digest``); ``grid`` is
    an expression in ``tokens``, ``threads`` and ``shared_bytes`` are each program's. ``elf`` is the
    (OS ABI, ABI version) of the file, which says what drivers load it. ``digest`` is the file's
    sha256.
    """

    file: str
    function: str
    arch: str
    arguments: tuple[Argument, ...]
    scratch: int
    constants: Mapping[str, int | float]
    options: Mapping[str, int | bool]
    grid: str
    threads: int
    shared_bytes: int
    compiler: str
    elf: tuple[int, int]
    source_digest: str
    digest: str
