"""The kernels of one mixture-of-experts layer: what the layer is, and what was chosen for it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from dovetail.ir import codec
from dovetail.ir.kernel_binary import KernelBinary
from dovetail.ir.kernel_parts import Activation, Dtype, Place, Weights
from dovetail.ir.kernel_spec import (
    ActivateSpec,
    GemmSpec,
    KernelSpec,
    ReduceSpec,
    RouteSpec,
    SortSpec,
)


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A mixture-of-experts layer as kernels see it.

    ``inter`` is the width between an expert's two matrices, ``shared`` that of the shared expert
    (0: none), ``shared_gate`` whether a logit per token scales it (Qwen2-MoE). ``up`` and ``down``
    say how the experts' matrices are stored, ``up_place`` and ``down_place`` where, if not stacked
    in one tensor each; the shared expert's are plain, in the same order. ``route`` is None where
    routing is computed elsewhere.
    """

    name: str
    experts: int
    hidden: int
    inter: int
    top_k: int
    route: RouteSpec | None
    x: Dtype = "bf16"
    up: Weights = field(default_factory=Weights)
    down: Weights = field(default_factory=Weights)
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    shared: int = 0
    shared_gate: bool = False
    up_place: Place | None = field(default=None, metadata=codec.LATER)
    down_place: Place | None = field(default=None, metadata=codec.LATER)


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """The kernels that run a layer on ``arch`` for token counts of ``bucket`` (first, last)."""

    arch: str
    bucket: tuple[int, int]
    route: RouteSpec | None
    sort: SortSpec
    up: GemmSpec
    activate: ActivateSpec | None
    down: GemmSpec
    reduce: ReduceSpec
    shared_up: GemmSpec | None = None
    shared_down: GemmSpec | None = None

    def specs(self) -> Iterator[KernelSpec]:
        """Every kernel, in the order of launches."""
        for spec in (
            self.route,
            self.sort,
            self.up,
            self.activate,
            self.down,
            self.shared_up,
            self.shared_down,
            self.reduce,
        ):
            if spec is not None:
                yield spec


@dataclass(frozen=True, slots=True)
class RungEvidence:
    """What a measurement found of a rung's kernels on the GPU that ``environment`` names: their
    time over that of the cost model's choice, the typical one of ``pairs`` runs in turn, between
    ``low`` and ``high`` with the confidence that ``tuning_db.winners`` asks for; median seconds of
    both, and the largest difference of their outputs as a share of the largest output.

    ``trials`` kernels were timed, and ``refused`` points of the space were not compiled.
    """

    ratio: float
    low: float
    high: float
    pairs: int
    seconds: float
    default_seconds: float
    max_error: float
    trials: int
    refused: int
    environment: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KernelRung:
    """The kernels for token counts of ``bucket`` (first, last): files of a plan's references by
    what they do (sort, up, down, reduce). ``measured`` is there where a measurement chose them, not
    the cost model."""

    bucket: tuple[int, int]
    files: Mapping[str, str]
    measured: RungEvidence | None = field(default=None, metadata=codec.LATER)


@dataclass(frozen=True, slots=True)
class KernelLadder:
    """Which of a plan's kernels run ``layer``, the experts of the task graph's ``bodies``, on one
    GPU of ``arch``; rungs rise, and a batch takes the first that holds its tokens."""

    layer: LayerSpec
    bodies: tuple[str, ...]
    arch: str
    rungs: tuple[KernelRung, ...]


@dataclass(frozen=True, slots=True)
class KernelReference:
    """A kernel in a plan: its spec, the file with its source beside the plan, and digests of both.

    ``spec_digest`` says which kernel was chosen, ``source_digest`` that the text is what this
    version of dovetail emits from it; ``registers`` and ``shared_bytes`` are what the gate read
    from the binary that ``compiler`` made for ``arch``.
    """

    file: str
    arch: str
    spec: KernelSpec
    spec_digest: str
    source_digest: str
    compiler: str = ""
    registers: int = 0
    shared_bytes: int = 0
    binaries: tuple[KernelBinary, ...] = field(default=(), metadata=codec.LATER)
    """One for each function of the source, where they were asked for."""
