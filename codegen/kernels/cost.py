"""What a grouped GEMM's tile takes and how long it should run, before anything is compiled.

Shared memory: an operand that the matrix unit reads from shared memory while loads run ahead needs
one buffer per stage, an operand that passes through registers one less; so it is counted here,
and the gate holds it against every compiled kernel. Registers: the accumulator's share per thread;
above 128 of 255 the compiler spills. Time: a roofline over device memory, L2 and the matrix unit,
with the bytes that programs keep in flight and with whole waves of programs.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import sympy

from dovetail.codegen.kernels.arch import MATRIX_SHARE, Arch, Matrix, matrix_instruction
from dovetail.ir.kernel_parts import DTYPE_BYTES, Weights
from dovetail.ir.kernel_spec import GemmSpec

M, N, K, STAGES, WARPS, SPLIT, TOKENS, X, W, OUT = sympy.symbols(
    "BLOCK_M BLOCK_N BLOCK_K num_stages num_warps SPLIT_K tokens x_bytes w_bytes out_bytes",
    positive=True,
)
EXPERTS, TOP_K, WIDTH, DEPTH, SIDES, LANES = sympy.symbols(
    "EXPERTS TOP_K N K sides lanes", positive=True
)
_SYMBOLS = (M, N, K, STAGES, WARPS, SPLIT, TOKENS, X, W, OUT, EXPERTS, TOP_K, WIDTH, DEPTH, SIDES)

ACCUMULATOR_LIMIT: dict[Matrix, int] = {
    "wgmma": 128, "tcgen05": 128, "mma.sync": 96, "mfma": 256, "fma": 96
}  # fmt: skip
"""Accumulator registers per thread above which the compiler spills: on CUDA seen in every case
above 128, and from 97 on where operands pass through registers too; on AMD half of a lane's 512."""
OPERAND_LIMIT = 40
"""Registers per thread, beyond the accumulators' limit, that decoded weights may take."""
LEAST_N, LEAST_K = 64, 32
"""Outputs and depth of the smallest tile."""
_TMA_GAIN = 0.05
"""Addresses of asynchronous copies take registers and issue slots (255 against 170 registers for
the 128 × 128 tile of a gated GEMM on sm_90); what that costs in time is not measured yet."""
_LATENCY = 0.8e-6
"""From asking for a line of device memory to having it, under load."""
_STEP = 0.05e-6
"""Barriers and issue of one step along k."""
_HIDDEN = 0.85
"""Share of the shorter resources' time that the longest one hides."""
_LAUNCH = 3e-6


@dataclass(frozen=True, slots=True)
class Fit:
    """What one program takes: shared memory in bytes, the most that the compiler may add to it
    (barriers, prefetched scales), registers per thread for accumulators and for operands on their
    way, programs per processor."""

    shared: int
    slack: int
    accumulator: int
    operands: int
    programs: int


def shared_bytes(matrix: Matrix, weights: Weights, swap_ab: bool) -> sympy.Expr:
    """Bytes of shared memory of one program, in tile sizes and stages."""
    ahead = matrix in ("wgmma", "tcgen05")
    # Sums that are scaled block by block are waited for: Blackwell's loads do not run ahead then.
    buffers = STAGES if ahead and not (matrix == "tcgen05" and weights.scale_k) else STAGES - 1
    tile_x, tile_w = weights.per_byte * M * K * X, SIDES * N * K * W
    if weights.format == "plain":
        return buffers * (tile_x + tile_w)
    total = buffers * tile_x + (STAGES - 1) * tile_w
    if ahead and not swap_ab:
        # Decoded weights go back to shared memory as the matrix unit's right operand.
        total += N * K * X * (SIDES * weights.per_byte if matrix == "tcgen05" else 1)
    return total


def accumulator_registers(weights: Weights) -> sympy.Expr:
    """Accumulator registers per thread: both sides of a gated pair, and the unscaled sum of a block
    where scales change along k."""
    sums = SIDES + (1 if weights.scale_k else 0)
    return sums * M * N / (LANES * WARPS)


def operand_registers(matrix: Matrix, weights: Weights) -> sympy.Expr:
    """Registers per thread for weights on their way to the matrix unit: as loaded and decoded, both
    halves of int4. Plain weights go from shared memory, or through few registers at a time."""
    if weights.format == "plain" or (matrix == "tcgen05" and weights.per_byte == 1):
        return sympy.Integer(0)
    return N * K * (W + weights.per_byte * X) / (4 * LANES * WARPS)


def row_tiles() -> sympy.Expr:
    """Expected row tiles under uniform routing: experts that are hit, each with its padding."""
    hit = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** TOKENS)
    return hit * sympy.Max(1, TOKENS * TOP_K / hit / M + sympy.Rational(1, 2))


@functools.lru_cache
def _fit_functions(
    matrix: Matrix, weights: Weights, swap_ab: bool
) -> tuple[Callable[..., float], ...]:
    """Shared memory, accumulator and operand registers as functions of ``_SYMBOLS`` and lanes."""
    parts = (
        shared_bytes(matrix, weights, swap_ab),
        accumulator_registers(weights),
        operand_registers(matrix, weights),
    )
    return tuple(sympy.lambdify((*_SYMBOLS, LANES), part, "math") for part in parts)


@functools.lru_cache(maxsize=1)
def _functions() -> dict[str, Callable[..., float]]:
    """Costs as functions of ``_SYMBOLS``: programs, bytes of device memory and L2, FLOPs."""
    hit = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** TOKENS)
    slots, programs = TOKENS * TOP_K, row_tiles() * sympy.ceiling(WIDTH / N) * SPLIT
    costs = {
        "programs": programs,
        "memory": hit * SIDES * WIDTH * DEPTH * W
        + slots * (DEPTH * X + WIDTH * (2 * SPLIT - 1) * OUT),
        "l2": programs * DEPTH / SPLIT * (M * X + SIDES * N * W),
        "flops": programs * 2 * DEPTH / SPLIT * SIDES * M * N,
        "in_flight": (STAGES - 1) * (M * K * X + SIDES * N * K * W),
    }
    return {name: sympy.lambdify(_SYMBOLS, expr, "math") for name, expr in costs.items()}


def fit(spec: GemmSpec, arch: Arch) -> Fit:
    """What a program of this spec takes on this architecture."""
    functions = _fit_functions(matrix_instruction(spec, arch), spec.weights, spec.swap_ab)
    values = (*_values(spec, 1), arch.lanes)
    shared, accumulator, operands = (math.ceil(part(*values)) for part in functions)
    slack = 128
    if spec.weights.format != "plain":
        # Prefetched scales; decoded tiles that change their layout on the way to mma.sync.
        slack += spec.tile.n * (4 * spec.tile.stages + 2 * spec.tile.k * DTYPE_BYTES[spec.x])
    threads = spec.tile.warps * arch.lanes
    registers = min(255, accumulator + operands + 64) * threads
    programs = min(
        arch.shared_processor // (shared + 1024),
        arch.registers // registers,
        arch.warps // spec.tile.warps,
    )
    return Fit(shared, slack, accumulator, operands, programs)


def refusal(spec: GemmSpec, arch: Arch) -> str:
    """Why this tile need not be compiled for this architecture; empty if it should."""
    taken = fit(spec, arch)
    if taken.shared > arch.shared_program:
        return f"{taken.shared} bytes of shared memory, {arch.name} has {arch.shared_program}"
    limit = ACCUMULATOR_LIMIT[matrix_instruction(spec, arch)]
    if taken.accumulator > limit:
        return f"{taken.accumulator} accumulator registers per thread, above {limit} spills"
    total = taken.accumulator + taken.operands
    if total > limit + OPERAND_LIMIT:
        return (
            f"{total} registers per thread before addresses, above {limit + OPERAND_LIMIT} spills"
        )
    if spec.loads == "tma" and not arch.tma:
        return f"{arch.name} has no TMA"
    small = spec.loads == "pointer"  # masks cover what is less than the smallest tile
    if spec.tile.n > max(LEAST_N * small, 2 * spec.n) or spec.tile.k > max(
        LEAST_K * small, spec.k_steps
    ):
        return "the tile is larger than the matrix"
    return ""


def predicted_seconds(spec: GemmSpec, arch: Arch, tokens: int) -> float:
    """Expected time of one launch for ``tokens`` tokens under uniform routing."""
    values = _values(spec, tokens)
    cost = {name: float(function(*values)) for name, function in _functions().items()}
    at_once = max(1, fit(spec, arch).programs) * arch.processors
    waves = math.ceil(cost["programs"] / at_once)
    full = cost["programs"] / (waves * at_once)
    flying = min(cost["programs"], at_once) * cost["in_flight"]
    bandwidth = arch.bandwidth * min(1.0, flying / (_LATENCY * arch.bandwidth))
    efficiency = MATRIX_SHARE[matrix_instruction(spec, arch)]
    if spec.loads == "tma" and spec.tile.m >= 64:
        efficiency += _TMA_GAIN
    compute = cost["flops"] / (arch.flops * efficiency)
    steps = math.ceil(spec.k_steps / spec.tile.split_k / spec.tile.k)
    parts = (
        cost["memory"] / bandwidth,
        cost["l2"] / arch.l2_bandwidth,
        compute / max(full, 0.05),
        waves * steps * max(_STEP, _LATENCY / (spec.tile.stages - 1)),
    )
    longest = max(parts)
    return _LAUNCH + longest + (1 - _HIDDEN) * (sum(parts) - longest)


def _values(spec: GemmSpec, tokens: int) -> tuple[float, ...]:
    """Values of ``_SYMBOLS``."""
    tile = spec.tile
    # Per element of the walked axis: one stored element holds two int4 weights.
    w_bytes = spec.weights.bits(spec.x) * spec.weights.per_byte / 8
    sizes = (tile.m, tile.n, tile.k, tile.stages, tile.warps, tile.split_k, tokens)
    widths = (DTYPE_BYTES[spec.x], w_bytes, DTYPE_BYTES[spec.out])
    layer = (spec.experts, spec.top_k, spec.n, spec.k_steps, spec.outputs // spec.n)
    return (*sizes, *widths, *layer)
