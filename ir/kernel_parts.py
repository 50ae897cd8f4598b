"""What GPU kernels are put together from: tiles, weights and where they lie, activations."""

from dataclasses import dataclass
from typing import Literal, get_args

from dovetail.ir.errors import InputError

Dtype = Literal["bf16", "fp16", "fp32"]
DTYPE_BYTES: dict[str, int] = {"bf16": 2, "fp16": 2, "fp32": 4}
WeightFormat = Literal["plain", "fp8", "int8", "int4"]


@dataclass(frozen=True, slots=True)
class Tile:
    """How one GPU program covers a grouped GEMM: ``m`` slots × ``n`` outputs, ``k`` at a time.

    ``group`` row tiles run side by side to share weight tiles in L2; ``split_k`` programs share the
    k axis of one tile and leave partial sums; ``warps`` and ``stages`` are the compiler's options.
    """

    m: int
    n: int
    k: int
    warps: int = 4
    stages: int = 3
    group: int = 8
    split_k: int = 1

    def __post_init__(self) -> None:
        for name in ("m", "n", "k", "warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise InputError(f"tile {name}={value}: expected a power of two")
        if min(self.stages, self.group, self.split_k) < 1:
            raise InputError(f"{self}: stages, group and split_k must be at least 1")


@dataclass(frozen=True, slots=True)
class Weights:
    """How the experts' matrices lie in memory.

    ``order`` "nk" is [experts, outputs, inputs] (transformers' modules), "kn" [experts, inputs,
    outputs] (gpt-oss). ``plain`` weights have the activations' dtype. The others are decoded on
    load: fp8 is e4m3 as bytes, int8 symmetric, int4 two to a byte, offset by 8: the low half of
    byte j holds input j, the high half input j + inputs/2. Scales are float32, one per output
    (``scale_k`` = 0) or one per ``scale_k`` inputs and ``scale_n`` outputs.
    """

    format: WeightFormat = "plain"
    order: Literal["nk", "kn"] = "nk"
    scale_k: int = 0
    scale_n: int = 1

    @property
    def per_byte(self) -> int:
        """Weights that share one stored element: 2 for int4."""
        return 2 if self.format == "int4" else 1

    def bits(self, dtype: Dtype) -> int:
        """Bits that one weight takes in memory."""
        return {"plain": 8 * DTYPE_BYTES[dtype], "int4": 4}.get(self.format, 8)


@dataclass(frozen=True, slots=True)
class Place:
    """Experts that lie anywhere in memory, in pool slots or resident, each in one piece.

    The kernel reads every expert's address from a table on the device; ``matrices`` are elements
    from there to its matrix, or to gate's and to up's where they are apart, ``biases`` the same.
    """

    matrices: tuple[int, ...]
    biases: tuple[int, ...] = ()


GatedFunction = Literal["swiglu", "geglu", "geglu_tanh", "reglu", "clamped"]
PlainFunction = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]
GATED: tuple[GatedFunction, ...] = get_args(GatedFunction)
PLAIN: tuple[PlainFunction, ...] = get_args(PlainFunction)


@dataclass(frozen=True, slots=True)
class Activation:
    """The activation between an expert's two matrices.

    Gated, h = f(gate) · up over two outputs of one GEMM: ``swiglu``: silu(gate)·up. ``geglu``:
    gelu(gate)·up, exact; ``geglu_tanh`` with tanh. ``reglu``: relu(gate)·up. ``clamped``: gate ≤
    limit, |up| ≤ limit, gate·sigmoid(alpha·gate)·(up + 1) (gpt-oss). ``pairs`` says where gate and
    up lie among the outputs: in two halves, or interleaved. Without a gate, h = f(up): ``relu2``
    (relu squared, Nemotron), ``relu``, ``silu``, ``gelu``, ``gelu_tanh``.
    """

    function: GatedFunction | PlainFunction = "swiglu"
    pairs: Literal["halves", "interleaved"] = "halves"
    alpha: float = 1.702
    limit: float = 7.0

    @property
    def gated(self) -> bool:
        """Whether it takes two outputs for each that is stored."""
        return self.function in GATED
