"""The task graph: what a model computes, with repeated layers kept as body x count.

A **body** is a straight list of **tasks** over named values; the graph is a prologue (embedding,
rotary tables), one body per kind of layer, the list saying which body each layer runs, and an
epilogue (final norm, head). Sizes are expressions in the dims ``seqs``, ``q_len`` and ``past``.
Weights are named by fully qualified name with ``{layer}`` left open inside a layer body.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Literal

from dovetail.ir.codec import LATER
from dovetail.ir.expr import Expr

ITEMSIZE: Mapping[str, int] = {
    "complex128": 16,
    "complex64": 8,
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class Role(StrEnum):
    """What a task is for; the vocabulary of moves, costs and reports."""

    EMBED = "embed"
    NORM = "norm"
    ATTENTION = "attention"
    KV = "kv"
    ROUTER = "router"
    EXPERTS = "experts"
    SHARED_EXPERT = "shared_expert"
    MLP = "mlp"
    MIXER = "mixer"
    HEAD = "head"
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Ref:
    """A use of a value, weight or constant by name, as an operator's argument."""

    name: str


@dataclass(frozen=True, slots=True)
class Size:
    """A symbolic size as an operator's argument."""

    expr: Expr


@dataclass(frozen=True, slots=True)
class Const:
    """A dtype, device or memory format as an operator's argument, by its torch name; also ``inf``,
    ``-inf`` and ``nan``, which JSON has no numbers for."""

    name: str


SCALE = "_scale"
"""What the part of a quantised matrix's scales is called, after the matrix's own."""
Arg = None | bool | int | float | str | Ref | Size | Const | tuple["Arg", ...]


@dataclass(frozen=True, slots=True)
class Op:
    """One operator call: ``outs = target(*args, **kwargs)``.

    ``target`` is an ATen overload (``"aten.linear.default"``), ``"getitem"``, or one of the seams
    ``"dovetail.kv_update"``, ``"dovetail.attention"``, ``"dovetail.experts"`` and
    ``"dovetail.module"`` that the runtime provides. More than one name in ``outs`` unpacks a tuple.

    ``dovetail.module`` runs a whole module of the model, named by its first argument (its path,
    with ``{layer}``), on one sequence at a time; its weights are the second argument, the places of
    its ``outs`` among its results the third. Its own arguments are ``kwargs``: there
    ``Const("cache")`` is the sequence's state, ``Const("mask W C")`` a causal mask with a window W
    and chunks C (0: none), ``Const("carried I")`` what another module last gave as result I.
    """

    target: str
    args: tuple[Arg, ...]
    outs: tuple[str, ...]
    kwargs: Mapping[str, Arg] = field(default_factory=dict)

    def uses(self) -> Iterator[str]:
        """Names of the values, weights and constants that the call reads."""
        pending: list[Arg] = [*self.args, *self.kwargs.values()]
        while pending:
            arg = pending.pop()
            if isinstance(arg, Ref):
                yield arg.name
            elif isinstance(arg, tuple):
                pending.extend(arg)


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor between operators: its shape in dims and its dtype."""

    shape: tuple[Expr, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter or persistent buffer of the model.

    ``fqn`` is the model's name and ``key`` the checkpoint's; inside a layer body both keep
    ``{layer}``. ``shape`` and ``dtype`` are what the operators expect. A checkpoint may keep it in
    ``pieces``, keys of tensors that follow each other along its first axis; ``key`` is the first.
    """

    fqn: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[str, ...] = field(default=(), metadata=LATER)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One weight of one expert, with ``part`` of gate, up, gate_up, down or their ``_bias``;
    experts without a gate have up and down alone. In fewer bits a matrix is followed by its
    ``_scale``: int8 ``[in, out]`` by ``[out]``, or two inputs of int4 to a byte,
    ``[out, in / 2]``, by ``[out, groups]``.

    ``key`` keeps ``{layer}`` and, when every expert has a tensor of its own, ``{expert}``;
    otherwise the checkpoint stacks all experts on the first axis of ``key``, one that is theirs
    alone or that of ``shape``. ``shape`` is that of a single expert; ``transposed`` if it is
    ``[in, out]`` while that of other parts is not.
    """

    part: str
    key: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = field(default=False, metadata=LATER)

    @property
    def stacked(self) -> bool:
        """Whether all experts share one checkpoint tensor."""
        return "{expert}" not in self.key

    @property
    def nbytes(self) -> int:
        """Bytes of one expert's share."""
        return prod(self.shape) * ITEMSIZE[self.dtype]

    @property
    def parameters(self) -> int:
        """Weights that a token multiplies with; none in biases and scales."""
        if self.part.endswith(("_bias", SCALE)):
            return 0
        return prod(self.shape) * (2 if self.dtype == "uint8" else 1)


@dataclass(frozen=True, slots=True)
class Experts:
    """The routed experts of a layer body: ``y[t] = sum_k w[t, k] * expert[idx[t, k]](x[t])``.

    ``activation`` turns the value ``h`` (``[rows, 2 * intermediate]``, gate and up as the model
    lays them out; without a gate ``[rows, intermediate]``) into ``a`` (``[rows, intermediate]``);
    when ``split_gate`` holds it takes ``g`` and ``u`` instead, each ``[rows, intermediate]``.
    ``transposed`` weights are ``[in, out]``.
    """

    count: int
    top_k: int
    hidden: int
    intermediate: int
    tensors: tuple[ExpertTensor, ...]
    activation: tuple[Op, ...]
    split_gate: bool
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one expert."""
        return sum(t.nbytes for t in self.tensors)

    @property
    def parameters(self) -> int:
        """Weights of one expert that a token multiplies with."""
        return sum(t.parameters for t in self.tensors)

    @property
    def precision(self) -> Literal["", "int8", "int4"]:
        """The format of matrices in fewer bits than the model's, "" for its own."""
        if not any(t.part.endswith(SCALE) for t in self.tensors):
            return ""
        return "int8" if any(t.dtype == "int8" for t in self.tensors) else "int4"


@dataclass(frozen=True, slots=True)
class KvSpec:
    """What one layer appends to the KV store per token: two tensors of ``heads x dim``."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token of one sequence in this layer."""
        width = self.key_heads * self.key_dim + self.value_heads * self.value_dim
        return width * ITEMSIZE[self.dtype]


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What the modules of one task keep for each sequence between steps: ``bytes_per_seq``
    whatever its length (a state space), and ``bytes_per_token`` more for each token."""

    bytes_per_seq: int
    bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work of one layer: operators of one role.

    ``axes`` are the axes along which it may be split: ``seqs``, ``tokens`` (each new token on its
    own), and for experts also ``experts``.
    """

    name: str
    role: Role
    ops: tuple[Op, ...]
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[Weight, ...]
    axes: tuple[str, ...]
    experts: Experts | None = None
    kv: KvSpec | None = None
    state: StateSpec | None = field(default=None, metadata=LATER)


@dataclass(frozen=True, slots=True)
class Body:
    """Tasks in order. ``inputs`` come from outside (carried hidden state first), ``outputs`` are
    what the next body takes as its carried state, position by position."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tasks: tuple[Task, ...]
    values: Mapping[str, Value]

    @property
    def experts(self) -> Task | None:
        """The experts task, if the layer has one."""
        return next((t for t in self.tasks if t.experts is not None), None)

    @property
    def kv(self) -> KvSpec | None:
        """What the layer appends to the KV store, if anything."""
        return next((t.kv for t in self.tasks if t.kv is not None), None)

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """What the layer's modules keep for each sequence."""
        return tuple(t.state for t in self.tasks if t.state is not None)


@dataclass(frozen=True, slots=True)
class TaskGraph:
    """A captured model. ``shared`` are prologue values that every layer may read (rotary tables).

    ``layers[i]`` is the index in ``bodies`` of layer i. ``constants`` are small tensors that no
    checkpoint holds (rotary frequencies): their data travels in a safetensors file beside the
    graph. ``model`` holds facts for messages and guards (model_type, architecture, …).
    """

    model: Mapping[str, str | int]
    dtype: str
    hidden: int
    vocab: int
    context: int
    prologue: Body
    bodies: tuple[Body, ...]
    layers: tuple[int, ...]
    epilogue: Body
    shared: tuple[str, ...]
    constants: Mapping[str, Value]

    def body(self, layer: int) -> Body:
        """The body that layer ``layer`` runs."""
        return self.bodies[self.layers[layer]]

    @property
    def kv_bytes_per_token(self) -> int:
        """KV bytes of one token of one sequence over all layers, states that grow included."""
        bodies = [self.body(i) for i in range(len(self.layers))]
        kv = sum(body.kv.bytes_per_token for body in bodies if body.kv is not None)
        return kv + sum(state.bytes_per_token for body in bodies for state in body.states)

    @property
    def whole_prompts(self) -> bool:
        """Whether a module runs whole and keeps nothing, so that it must see a prompt at once."""
        return any(state == StateSpec(0, 0) for body in self.bodies for state in body.states)

    @property
    def state_bytes_per_seq(self) -> int:
        """Bytes of the states of one sequence over all layers, besides what grows with tokens."""
        bodies = (self.body(i) for i in range(len(self.layers)))
        return sum(state.bytes_per_seq for body in bodies for state in body.states)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, each counted once per checkpoint key."""
        seen: dict[str, int] = {}
        for body in (self.prologue, self.epilogue):
            seen |= {w.key: w.nbytes for task in body.tasks for w in task.weights}
        total = sum(seen.values())
        for index in self.layers:
            for task in self.bodies[index].tasks:
                total += sum(w.nbytes for w in task.weights)
                if task.experts is not None:
                    total += task.experts.count * task.experts.nbytes
        return total
