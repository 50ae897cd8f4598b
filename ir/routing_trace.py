"""Routing traces: which experts each token chose, in every layer.

Shapes: ``experts`` is ``[tokens, layers, top_k]``; prompt, position, step and decode are
``[tokens]``. ``layers`` are the layers of the model that have routed experts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dovetail.ir.errors import InputError

PHASES = ("prefill", "decode")
MOST_EXPERTS = 1 << 15
"""Expert ids are int16."""

Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class RoutingTrace:
    """The experts that tokens chose, and where each token stood; rows are in the order of steps.

    ``prompt`` is the prompt that a token belongs to, ``position`` its place in its sequence from 0,
    ``step`` the pass through the model it was in, and ``decode`` says that it was fed back rather
    than part of a prompt. No token chooses an expert twice. ``model_layers`` counts the layers
    without experts too. Raises InputError where the arrays do not fit together.
    """

    experts: NDArray[np.int16]
    num_experts: int
    prompt: NDArray[np.int32]
    position: NDArray[np.int32]
    step: NDArray[np.int32]
    decode: Mask
    layers: tuple[int, ...]
    model_layers: int
    model: str = ""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def tokens(self) -> int:
        """How many tokens went through the model."""
        return int(self.experts.shape[0])

    @property
    def top_k(self) -> int:
        """How many experts a token chooses in a layer."""
        return int(self.experts.shape[2])

    @property
    def steps(self) -> int:
        """How many passes through the model there were."""
        return len(np.unique(self.step))

    def loads(self) -> Ints:
        """How many tokens chose each expert, ``[layers, experts]``."""
        return _counts(self.experts, self.num_experts)

    def transitions(self) -> Ints:
        """How often a token chose expert i in one layer and j in the next, ``[layers - 1, i, j]``.

        A token counts once for each pair of its choices: ``top_k ** 2`` times per layer. This is
        what affinity placement is made from (ExFlow, arXiv 2401.08383).
        """
        size, pairs = self.num_experts, []
        for before, after in zip(self.experts[:, :-1].swapaxes(0, 1), self._next(), strict=True):
            codes = before[:, :, None].astype(np.int64) * size + after[:, None, :]
            counts = np.bincount(codes.reshape(-1), minlength=size * size)
            pairs.append(counts.reshape(size, size))
        return np.stack(pairs) if pairs else np.zeros((0, size, size), np.int64)

    def _next(self) -> NDArray[np.int16]:
        return self.experts[:, 1:].swapaxes(0, 1)

    def step_loads(self) -> Iterator[Ints]:
        """The tokens of each expert in one step after the other, each ``[layers, experts]``."""
        for rows in self._steps():
            yield _counts(self.experts[rows], self.num_experts)

    def batch_loads(self, tokens: int) -> Iterator[Ints]:
        """The tokens of each expert in batches of ``tokens`` rows (the last may hold fewer), each
        ``[layers, experts]``."""
        for start in range(0, self.tokens, tokens):
            yield _counts(self.experts[start : start + tokens], self.num_experts)

    def _steps(self) -> Iterator[slice]:
        cuts = np.flatnonzero(np.diff(self.step)) + 1
        bounds = [0, *cuts.tolist(), self.tokens]
        for start, stop in pairwise(bounds):
            yield slice(start, stop)

    def select(self, rows: Mask | Ints | slice) -> "RoutingTrace":
        """The trace of some of the rows. Raises InputError if there are none."""
        return RoutingTrace(
            self.experts[rows],
            self.num_experts,
            self.prompt[rows],
            self.position[rows],
            self.step[rows],
            self.decode[rows],
            self.layers,
            self.model_layers,
            self.model,
        )

    def by_phase(self) -> dict[str, "RoutingTrace"]:
        """The tokens of prompts and the tokens fed back as traces of their own, where there are
        any: ``prefill`` and ``decode``."""
        masks = dict(zip(PHASES, (~self.decode, self.decode), strict=True))
        return {name: self.select(mask) for name, mask in masks.items() if mask.any()}

    def by_prompts(self, parts: int) -> list["RoutingTrace"]:
        """The trace cut into ``parts`` of about equally many prompts, in the order of prompts.

        One part plans and another tests, or each is a scenario. Raises InputError if there are
        fewer prompts than parts.
        """
        prompts = np.unique(self.prompt)
        if not 1 <= parts <= len(prompts):
            raise InputError(
                f"the trace has {len(prompts)} prompts, which cannot be cut into {parts} parts; "
                "ask for fewer"
            )
        return [self.select(np.isin(self.prompt, part)) for part in np.array_split(prompts, parts)]


def make_trace(
    experts: NDArray[Any],
    num_experts: int,
    *,
    prompt: NDArray[Any] | None = None,
    position: NDArray[Any] | None = None,
    step: NDArray[Any] | None = None,
    decode: NDArray[Any] | None = None,
    layers: Sequence[int] | None = None,
    model_layers: int = 0,
    model: str = "",
) -> RoutingTrace:
    """A trace from whole numbers of any width, such as another system's ids.

    What is left out is filled in: one prompt, positions by row, one step, all prefill, the first
    layers of a model of as many layers. Raises InputError where something does not fit.
    """
    if experts.ndim != 3:
        raise InputError(
            f"experts has {experts.ndim} axes, expected 3: [tokens, layers, top_k]; reshape it"
        )
    tokens, count, _ = experts.shape
    _check_ids(experts, num_experts)
    zeros = np.zeros(tokens, np.int64)
    numbers = tuple(range(count)) if layers is None else tuple(layers)
    return RoutingTrace(
        experts=np.ascontiguousarray(experts, np.int16),
        num_experts=num_experts,
        prompt=_int32("prompt", zeros if prompt is None else prompt),
        position=_int32("position", np.arange(tokens) if position is None else position),
        step=_int32("step", zeros if step is None else step),
        decode=zeros.astype(np.bool_) if decode is None else decode.astype(np.bool_),
        layers=numbers,
        model_layers=model_layers or max(numbers, default=-1) + 1,
        model=model,
    )


def _int32(name: str, values: NDArray[Any]) -> NDArray[np.int32]:
    if values.size and (values.min() < 0 or values.max() >= 1 << 31):
        raise InputError(
            f"{name} holds {int(values.min())} to {int(values.max())}, expected 0 to {2**31 - 1}"
        )
    return np.ascontiguousarray(values, np.int32)


def _counts(experts: NDArray[np.int16], size: int) -> Ints:
    """Tokens by layer and expert, ``[layers, experts]``."""
    layers = experts.shape[1]
    codes = experts + (np.arange(layers, dtype=np.int64) * size)[:, None]
    return np.bincount(codes.reshape(-1), minlength=layers * size).reshape(layers, size)


def _check_ids(experts: NDArray[Any], num_experts: int) -> None:
    if not 1 <= num_experts <= MOST_EXPERTS:
        raise InputError(f"found {num_experts} experts, expected 1 to {MOST_EXPERTS}")
    if 0 in experts.shape:
        raise InputError(
            f"experts has the shape {list(experts.shape)}, expected at least one token, layer and "
            "choice; record a run that does something"
        )
    if experts.min() < 0 or experts.max() >= num_experts:
        off = int(experts.min()) if experts.min() < 0 else int(experts.max())
        raise InputError(
            f"found expert {off}, expected 0 to {num_experts - 1}: tokens without an expert do not "
            "belong in a trace"
        )


def _check(trace: RoutingTrace) -> None:
    """Raise InputError where the arrays of a trace do not fit together."""
    _check_ids(trace.experts, trace.num_experts)
    tokens, layers, top_k = trace.experts.shape
    for name in ("prompt", "position", "step", "decode"):
        length = len(getattr(trace, name))
        if length != tokens:
            raise InputError(f"{name} has {length} rows and experts {tokens}, expected as many")
    numbers = trace.layers
    if len(numbers) != layers:
        raise InputError(f"{len(numbers)} layers have numbers and {layers} have experts")
    rising = all(a < b for a, b in pairwise(numbers))
    if not rising or numbers[0] < 0 or numbers[-1] >= trace.model_layers:
        raise InputError(
            f"layers {list(numbers)} of {trace.model_layers}: expected rising numbers below it"
        )
    if np.any(np.diff(trace.step) < 0):
        raise InputError("the rows are not in the order of their steps; sort them")
    if top_k > 1:
        ordered = np.sort(trace.experts, axis=2)
        if np.any(ordered[:, :, 1:] == ordered[:, :, :-1]):
            raise InputError("a token chose the same expert twice in a layer, expected it once")
