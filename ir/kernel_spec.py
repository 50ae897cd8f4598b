"""What a fused MoE kernel is: frozen records that decide its source text, character for character.

A mixture-of-experts layer on a GPU is a chain of kernels around one contract, shared by every
fused implementation: **slots** are (token, choice) pairs, numbered token·top_k + choice; a sort
brings the slots of one expert together and pads every expert's run to whole **row tiles**; each row
tile then belongs to one expert, and all counts stay on the device.
"""

from dataclasses import dataclass, field
from typing import Literal

from dovetail.ir import codec
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_parts import Activation, Dtype, Place, Tile, Weights


@dataclass(frozen=True, slots=True)
class GemmSpec:
    """One grouped GEMM: y[store(row)] = epilogue(x[rows(row)] · W[expert(row)]ᵀ).

    ``n`` counts the outputs that are stored (half the rows of W under a gated activation).
    ``rows``: "gather" reads the token of each slot, "sorted" the row itself, "dense" is one expert
    for all rows (a shared expert). ``store``: "row" keeps the sorted order, "slot" scatters to the
    slot's own row, "add" adds into the token's row (float32 atomics: order, so bits, vary).
    ``bucket`` is the range of token counts that the tile was chosen for.
    """

    name: str
    experts: int
    n: int
    k: int
    top_k: int
    x: Dtype
    tile: Tile
    weights: Weights = field(default_factory=Weights)
    rows: Literal["gather", "sorted", "dense"] = "sorted"
    store: Literal["row", "slot", "add"] = "row"
    activation: Activation | None = None
    bias: bool = False
    routed_weight: bool = False
    swap_ab: bool = False
    loads: Literal["pointer", "tma"] = "pointer"
    out: Dtype = "bf16"
    bucket: tuple[int, int] = (1, 1 << 20)
    place: Place | None = field(default=None, metadata=codec.LATER)
    """Where experts lie that are not stacked in one tensor."""

    @property
    def gated(self) -> bool:
        """Whether pairs of outputs become one."""
        return self.activation is not None and self.activation.gated

    @property
    def outputs(self) -> int:
        """Rows of one expert's matrix: 2·n under a gated activation."""
        return 2 * self.n if self.gated else self.n

    @property
    def tile_rows(self) -> int:
        """Rows of W that one load brings: interleaved pairs are loaded together."""
        return 2 * self.tile.n if self.interleaved else self.tile.n

    @property
    def interleaved(self) -> bool:
        """Whether the outputs of a pair are neighbours."""
        act = self.activation
        return act is not None and act.gated and act.pairs == "interleaved"

    @property
    def k_steps(self) -> int:
        """Elements of the k axis that the main loop walks: half of them for int4."""
        return self.k // self.weights.per_byte

    def __post_init__(self) -> None:
        _check_name(self.name)
        for found, problem in (
            (self.k % self.weights.per_byte, "int4 needs an even k"),
            (
                self.weights.scale_k and self.weights.scale_k % self.tile.k,
                "tile k must divide scale_k",
            ),
            (
                self.weights.scale_k and self.k_steps % self.tile.k,
                "tile k must divide k with scale_k",
            ),
            (
                self.tile.split_k > 1 and self.k_steps % (self.tile.k * self.tile.split_k),
                "split_k needs k in whole tiles",
            ),
            (self.tile.split_k > 1 and self.activation, "split_k leaves sums: activate afterwards"),
            (
                self.tile.split_k > 1 and (self.out != "fp32" or self.store == "add"),
                "split_k stores float32 sums",
            ),
            (self.store == "add" and self.out != "fp32", "store add needs out fp32"),
            (self.routed_weight and self.rows == "dense", "dense rows have no routing weight"),
            (
                self.rows == "dense" and (self.experts != 1 or self.store != "row"),
                "dense rows are one expert's, stored in order",
            ),
            (self.loads == "tma" and self.weights.order != "nk", "tma loads need order nk"),
            (self.loads == "tma" and self.place, "tma loads need experts stacked in one tensor"),
            *_misplaced(self),
            (self.loads == "tma" and self.k_steps % 16, "tma loads need rows of whole 16 bytes"),
            (
                self.experts * self.outputs >= 1 << 31 or self.outputs * self.k >= 1 << 31,
                "an expert's matrix has over 2^31 elements",
            ),
        ):
            if found:
                raise InputError(f"kernel {self.name}: {problem} ({self.k=}, {self.tile})")


def _check_name(name: str) -> None:
    """A spec's name becomes that of a function and of a file, and specs come from plan files."""
    if not (name.isidentifier() and name.isascii()):
        raise InputError(f"kernel name {name!r}: expected letters, digits and underscores")


def _misplaced(spec: GemmSpec) -> tuple[tuple[bool, str], ...]:
    """What is wrong with where the spec says that experts lie."""
    if spec.place is None:
        return ()
    apart = len(spec.place.matrices)
    return (
        (spec.rows == "dense", "dense rows have one stacked expert"),
        (spec.weights.format != "plain", "experts at addresses of their own have plain weights"),
        (apart != 1 and not (apart == 2 and spec.gated), "one matrix, or gate's and up's"),
        (apart == 2 and spec.interleaved, "gate and up apart are not interleaved"),
        (len(spec.place.biases) != (apart if spec.bias else 0), "a bias for each matrix, or none"),
    )


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """Top-k routing from router logits [tokens, experts] to ids and weights [tokens, top_k].

    Scores are softmax or sigmoid of the logits; ``bias`` [experts] corrects the scores for the
    choice only (DeepSeek-V3). With ``groups`` > 1, the best ``top_groups`` groups of neighbouring
    experts are kept, ranked by their best score ("max", DeepSeek-V2) or their two best ("top2",
    DeepSeek-V3). Weights are the chosen scores, divided by their sum if ``renormalise``, times
    ``scale``. Ties go to the lower expert.
    """

    name: str
    experts: int
    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = False
    bias: bool = False
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["max", "top2"] = "max"
    scale: float = 1.0
    tokens: int = 4
    """Tokens per program."""
    warps: int = 4

    def __post_init__(self) -> None:
        _check_name(self.name)
        kept = self.experts // self.groups * self.top_groups
        if self.experts % self.groups or not self.top_k <= kept or self.top_groups > self.groups:
            raise InputError(
                f"kernel {self.name}: top {self.top_k} of {self.experts} experts in "
                f"{self.groups} groups, {self.top_groups} kept: that leaves {kept} to choose from"
            )


@dataclass(frozen=True, slots=True)
class SortSpec:
    """Slots in block-aligned expert order: ids [slots] to sorted slots, tile owners and counts.

    Stable, without atomics and without a host read. Ids outside 0 … experts-1 are left out (experts
    that run elsewhere). ``one_launch`` lets every program count all slots: for small batches.
    """

    name: str
    experts: int
    tile_m: int
    block: int = 1024
    one_launch: bool = True
    warps: int = 4

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True, slots=True)
class ActivateSpec:
    """Gated activation after a GEMM whose k axis was split: h[row] = f(Σ_s sums[s, row])."""

    name: str
    n: int
    split_k: int
    activation: Activation = field(default_factory=Activation)
    out: Dtype = "bf16"
    block: int = 512
    warps: int = 4

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not self.activation.gated:
            raise InputError(
                f"kernel {self.name}: {self.activation.function} has no gate; sums of a split k "
                "axis are activated in pairs"
            )


@dataclass(frozen=True, slots=True)
class ReduceSpec:
    """y[token] = Σ over the token's slots and k splits, plus the shared expert's row.

    ``shared``: "none", "plain" (added as it is) or "gated" (times sigmoid of a logit per token,
    Qwen2-MoE). Slots of experts that run elsewhere are skipped, their rows were never written.
    With ``by_address`` (experts that lie anywhere) only slots of experts whose address is not 0
    count, and the sum is added to what y has, in float32.
    """

    name: str
    experts: int
    n: int
    top_k: int
    split_k: int = 1
    shared: Literal["none", "plain", "gated"] = "none"
    x: Dtype = "bf16"
    out: Dtype = "bf16"
    block: int = 1024
    warps: int = 4
    by_address: bool = field(default=False, metadata=codec.LATER)

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.by_address and (self.out != "fp32" or self.shared != "none"):
            raise InputError(f"kernel {self.name}: sums by address are float32, of routed experts")


KernelSpec = RouteSpec | SortSpec | GemmSpec | ActivateSpec | ReduceSpec
"""Everything that decides a kernel's text: the same spec gives the same source."""


def spec_digest(spec: KernelSpec) -> str:
    """Hex sha256 of the spec."""
    return codec.digest(spec)
