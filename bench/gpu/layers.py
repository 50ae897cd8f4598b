"""Whole layers against their rivals: seconds, shares of the measured peaks, and of the targets."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from clock import Clock, Peaks, Timing
from rivals import Experts, rivals
from slots import Slots
from torch import Tensor
from triton.errors import TritonError  # type: ignore[import-untyped]

from dovetail.codegen.gate.layer_numbers import layer_reference, random_weights
from dovetail.codegen.gate.reference import route
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import choose_ladder
from dovetail.codegen.kernels.layer import LayerRunner, LayerWeights
from dovetail.codegen.kernels.quantise import TORCH_DTYPES
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_parts import DTYPE_BYTES

BATCHES = 8
"""Different batches in one timed graph: their experts differ, so weights come from memory."""
CHECKED = 16
"""Tokens of the first batch that are compared with float64."""
ERROR_LIMIT = 0.02
"""Largest deviation over the largest value that bfloat16's four roundings explain."""
PREFILL_TARGET, DECODE_TARGET = 0.60, 0.80
"""Shares of the measured matrix rate (Mixtral's prefill) and bandwidth (decode from 16 tokens)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way to run one layer on one number of tokens. ``error`` is the largest deviation from
    float64 over the largest value; ``share`` that of the bound's resource."""

    layer: str
    tokens: int
    way: str
    timing: Timing | None
    bound: float
    resource: str
    error: float
    skipped: str = ""

    @property
    def share(self) -> float:
        """Bound over measured seconds: the share of the measured peak that was used."""
        return self.bound / self.timing.seconds if self.timing else 0.0

    def record(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self) | {"share": self.share}


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens of one forward pass."""

    x: Tensor
    logits: Tensor
    ids: Tensor
    routed: Tensor
    gate: Tensor | None


def bound(layer: LayerSpec, batches: Sequence[Batch], peaks: Peaks) -> tuple[float, str]:
    """(seconds, resource) that the routed experts' weights and products need at measured peaks."""
    tokens = len(batches[0].x)
    hit = sum(len(set(batch.ids.flatten().tolist())) for batch in batches) / len(batches)
    per_expert = 3 * layer.inter * layer.hidden
    up, down = layer.up.bits(layer.x) / 8, layer.down.bits(layer.x) / 8
    bytes_ = hit * layer.inter * layer.hidden * (2 * up + down)
    bytes_ += 3 * layer.shared * layer.hidden * DTYPE_BYTES[layer.x]
    bytes_ += 2 * tokens * layer.hidden * DTYPE_BYTES[layer.x]
    flops = 2 * tokens * (layer.top_k * per_expert + 3 * layer.shared * layer.hidden)
    memory, compute = bytes_ / peaks.bandwidth, flops / peaks.flops
    return max(memory, compute), "bandwidth" if memory >= compute else "FLOP rate"


def make_batches(layer: LayerSpec, tokens: int, weights: LayerWeights, device: str) -> list[Batch]:
    """Random tokens with uniform routing."""
    found = []
    for seed in range(BATCHES if tokens <= 1024 else 2):
        torch.manual_seed(seed)
        x = torch.randn(tokens, layer.hidden, device=device).to(TORCH_DTYPES[layer.x])
        logits = torch.randn(tokens, layer.experts, device=device)
        assert layer.route is not None
        ids, routed = route(layer.route, logits.double(), weights.route_bias)
        gate = torch.randn(tokens, device=device) if layer.shared_gate else None
        found.append(Batch(x, logits, ids.int(), routed.float(), gate))
    return found


def measure_layer(
    layer: LayerSpec, counts: Sequence[int], arch: Arch, clock: Clock, peaks: Peaks, folder: Path
) -> list[Measured]:
    """Ours and every rival, on every number of tokens; figures of wrong results are not given."""
    weights = random_weights(layer, clock.device)
    runner = LayerRunner(
        layer, choose_ladder(layer, arch, counts), max(counts), clock.device, folder
    )
    ways: dict[str, Callable[[Batch], Tensor]] = {
        "dovetail": lambda b: runner.forward(b.x, b.logits, weights, b.gate),
    }
    skipped, eager = {}, set()
    if layer.up.format == "plain" and not layer.shared and not layer.bias:
        slots = Slots(layer, weights, arch, counts).runner(folder)
        ways["dovetail, by address"] = lambda b: slots(b.x, b.ids, b.routed)
        for rival in rivals(layer, weights):
            if rival.run is None:
                skipped[rival.name] = rival.skipped
                continue
            ways[rival.name] = functools.partial(_run_rival, rival.run)
            if not rival.graph:
                eager.add(rival.name)
    found = []
    for tokens in counts:
        batches = make_batches(layer, tokens, weights, clock.device)
        limit = bound(layer, batches, peaks)
        expected = _expected(layer, batches[0], weights)
        for name, way in ways.items():
            case = Measured(layer.name, tokens, name, None, *limit, 0.0)
            found.append(_measured(case, way, batches, expected, clock, name not in eager))
        for name, reason in skipped.items():
            found.append(Measured(layer.name, tokens, name, None, *limit, 0.0, reason))
    return found


def _run_rival(run: Experts, batch: Batch) -> Tensor:
    return run(batch.x, batch.logits, batch.ids, batch.routed)


def _expected(layer: LayerSpec, batch: Batch, weights: LayerWeights) -> Tensor:
    """The first few tokens' result in float64."""
    few = slice(0, CHECKED)
    gate = None if batch.gate is None else batch.gate[few]
    return layer_reference(layer, batch.x[few], batch.logits[few], weights, gate)


def _measured(
    case: Measured,
    way: Callable[[Batch], Tensor],
    batches: Sequence[Batch],
    expected: Tensor,
    clock: Clock,
    graph: bool,
) -> Measured:
    """Check one way on the first batch, then time it on all."""
    try:
        got = way(batches[0])[:CHECKED].double()
        error = float((got - expected).abs().max() / expected.abs().max())
        timing = clock.time([functools.partial(way, batch) for batch in batches], graph)
    except (RuntimeError, TypeError, AssertionError, TritonError) as failure:
        words = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:120]}"
        return replace(case, skipped=words)
    return replace(case, timing=timing, error=error)


def verdicts(measured: Sequence[Measured]) -> list[str]:
    """Each target of the CUDA work, met or missed by how much."""
    lines = []
    for m in measured:
        comparable = not m.way.startswith("triton_kernels")  # another activation
        if m.timing and comparable and not m.error <= ERROR_LIMIT:
            lines.append(f"**WRONG**: {m.way}, {m.layer}, {m.tokens} tokens: error {m.error:.2g}")
    ours = {(m.layer, m.tokens): m for m in measured if m.way == "dovetail" and m.timing}
    for (layer, tokens), mine in ours.items():
        if layer.startswith("Mixtral") and mine.resource == "FLOP rate":
            lines.append(_against(mine, PREFILL_TARGET))
        if tokens >= 16 and mine.resource == "bandwidth":
            lines.append(_against(mine, DECODE_TARGET))
        for other in measured:
            same = (other.layer, other.tokens) == (layer, tokens)
            if same and other.way.endswith("grouped_mm") and other.timing and mine.timing:
                ratio = other.timing.seconds / mine.timing.seconds
                word = "met" if ratio >= 1 else "MISSED"
                lines.append(
                    f"{word}: {layer}, {tokens} tokens: {ratio:.2f} × {other.way} "
                    f"({other.timing.how})"
                )
    return lines


def _against(mine: Measured, target: float) -> str:
    word = "met" if mine.share >= target else "MISSED"
    return (
        f"{word}: {mine.layer}, {mine.tokens} tokens: {mine.share:.0%} of the measured "
        f"{mine.resource}, target {target:.0%}"
    )
