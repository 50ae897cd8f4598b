"""GPU architectures that kernels are emitted and checked for: limits per program and peak rates."""

from dataclasses import dataclass
from typing import Literal

from dovetail.ir.kernel_spec import GemmSpec

Matrix = Literal["mma.sync", "wgmma", "tcgen05", "mfma", "fma"]
"""Matrix instruction families; "fma" is no matrix instruction (exact float32)."""


@dataclass(frozen=True, slots=True)
class Arch:
    """One architecture. Shared memory in bytes (most that one program may take, and per
    multiprocessor), rates of the usual part in bytes/s and FLOP/s (16-bit, dense).

    Limits: CUDA C++ programming guide, table of compute capabilities; CDNA3 ISA guide. Rates: data
    sheets of A100 80GB, H100 SXM, B200 and MI300X. ``l2_bandwidth`` is about twice to three times
    that of device memory on all of them.
    """

    name: str
    backend: Literal["cuda", "hip"]
    target: int | str
    lanes: int
    shared_program: int
    shared_processor: int
    registers: int
    warps: int
    processors: int
    bandwidth: float
    l2_bandwidth: float
    flops: float
    tma: bool


ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch(
            "sm_80", "cuda", 80, 32, 166912, 167936, 65536, 64, 108, 2.04e12, 4.5e12, 312e12, False
        ),
        Arch(
            "sm_90", "cuda", 90, 32, 232448, 233472, 65536, 64, 132, 3.35e12, 5.5e12, 989e12, True
        ),
        Arch("sm_100", "cuda", 100, 32, 232448, 233472, 65536, 64, 148, 8e12, 14e12, 2250e12, True),
        Arch(
            "gfx942",
            "hip",
            "gfx942",
            64,
            65536,
            65536,
            131072,
            32,
            304,
            5.3e12,
            12e12,
            1307e12,
            False,
        ),
    )
}


def matrix_instruction(spec: GemmSpec, arch: Arch) -> Matrix:
    """The matrix instruction that the spec's tile is meant to run on.

    Hopper's and Blackwell's read operands from shared memory and need at least 64 rows of the left
    operand and whole groups of four warps; below that, the compiler falls back to mma.sync. So a
    tile of 16 slots reaches them only with the weights as the left operand.
    """
    if spec.x == "fp32":
        return "fma"
    if arch.backend == "hip":
        return "mfma"
    rows = spec.tile.n if spec.swap_ab else spec.tile.m
    if rows >= 64 and spec.tile.warps % 4 == 0 and arch.name != "sm_80":
        return "wgmma" if arch.name == "sm_90" else "tcgen05"
    return "mma.sync"
