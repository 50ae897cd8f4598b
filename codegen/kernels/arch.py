"""GPU architectures that kernels are emitted and checked for: limits per program and peak rates."""

from dataclasses import dataclass, replace
from typing import Literal

from dovetail.ir.kernel_spec import GemmSpec
from dovetail.ir.machine import Accelerator

Matrix = Literal["mma.sync", "wgmma", "tcgen05", "mfma", "fma"]
"""Matrix instruction families; "fma" is no matrix instruction (exact float32)."""


@dataclass(frozen=True, slots=True)
class Arch:
    """One architecture. Shared memory in bytes (most that one program may take, and per
    multiprocessor), rates of the usual part in bytes/s and FLOP/s (16-bit, dense).

    Limits: CUDA C++ programming guide, table of compute capabilities; CDNA3 ISA guide. Rates: data
    sheets of A100 80GB, RTX A5000, RTX 4090, H100 SXM, B200 and MI300X. ``l2_bandwidth`` is about
    twice to three times that of device memory on most of them, five times on Ada.
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
        Arch("sm_86", "cuda", 86, 32, 101376, 102400, 65536, 48, 64, 0.768e12, 2e12, 111e12, False),
        Arch(
            "sm_89", "cuda", 89, 32, 101376, 102400, 65536, 48, 128, 1.008e12, 5e12, 165e12, False
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


MATRIX_SHARE: dict[Matrix, float] = {
    "wgmma": 0.75, "tcgen05": 0.7, "mma.sync": 0.5, "mfma": 0.55, "fma": 0.05
}  # fmt: skip
"""Share of the peak that a tile's inner loop can reach. mma.sync reads operands through registers
(its peak on Hopper is about 60 % of wgmma's); "fma" is exact float32 without matrix units."""
_BEST: dict[str, Matrix] = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


def arch_of(gpu: Accelerator) -> Arch | None:
    """The architecture of a machine's GPU with the rates of its part: the bandwidth that it
    reaches, and the matrix rate at which the best instruction reaches that of its products. None
    where kernels are not emitted for it."""
    arch = ARCHS.get(gpu.arch.split(":")[0])  # AMD's names go on with features
    if arch is None:
        return None
    processors = gpu.processors or arch.processors
    share = processors / arch.processors
    best = _BEST.get(arch.name, "mma.sync")
    half = [curve.peak for dtype, curve in gpu.gemm.items() if dtype in ("bfloat16", "float16")]
    return replace(
        arch,
        processors=processors,
        bandwidth=gpu.hbm_bandwidth,
        l2_bandwidth=arch.l2_bandwidth * share,
        flops=max(half) / MATRIX_SHARE[best] if half else arch.flops * share,
    )


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
    if rows >= 64 and spec.tile.warps % 4 == 0:
        return _BEST.get(arch.name, "mma.sync")
    return "mma.sync"
