"""Run a whole layer's kernels, routing to sum, and compare with float64."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dovetail.codegen.gate import reference
from dovetail.codegen.gate.numbers import Case, Verdict, choices
from dovetail.codegen.gate.placed import expert_elements, put, scattered
from dovetail.codegen.kernels.addresses import slot_addresses
from dovetail.codegen.kernels.experts_runner import ExpertsRunner
from dovetail.codegen.kernels.layer import LayerRunner, LayerWeights
from dovetail.codegen.kernels.quantise import TORCH_DTYPES, pack, unpack
from dovetail.ir.kernel_layer import LayerKernels, LayerSpec
from dovetail.ir.kernel_parts import Weights

_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-21}
_ROUNDINGS = 4
"""Of the hidden rows, the slots' rows, the shared expert's and the sum."""


def random_weights(layer: LayerSpec, device: str) -> LayerWeights:
    """Random weights of the layer, packed as its spec says."""
    dtype = TORCH_DTYPES[layer.x]
    matrices: dict[str, Tensor | None] = {}
    sides = 2 if layer.activation.gated else 1
    sizes = {"up": (sides * layer.inter, layer.hidden), "down": (layer.hidden, layer.inter)}
    for name, (outputs, inputs) in sizes.items():
        weights: Weights = getattr(layer, name)
        matrix = torch.empty(layer.experts, outputs, inputs, dtype=dtype, device=device)
        matrix.normal_(std=inputs**-0.5)
        matrices[name], matrices[f"{name}_scale"] = pack(matrix, weights)
        if layer.bias:
            bias = torch.randn(layer.experts, outputs, device=device).to(dtype)
            matrices[f"{name}_bias"] = bias
    if layer.shared:
        for name, shape in (
            ("shared_up", (sides * layer.shared, layer.hidden)),
            ("shared_down", (layer.hidden, layer.shared)),
        ):
            matrix = torch.randn(1, *shape, device=device) * shape[1] ** -0.5
            plain = Weights(order=getattr(layer, name.removeprefix("shared_")).order)
            matrices[name] = pack(matrix.to(dtype), plain)[0]
    if layer.route is not None and layer.route.bias:
        matrices["route_bias"] = torch.randn(layer.experts, device=device) / 4
    return LayerWeights(**matrices)  # type: ignore[arg-type]


def layer_reference(
    layer: LayerSpec, x: Tensor, logits: Tensor, weights: LayerWeights, gate: Tensor | None
) -> Tensor:
    """y [tokens, hidden] in float64, the hidden rows rounded to the layer's dtype as kernels do."""
    assert layer.route is not None
    dtype = TORCH_DTYPES[layer.x]
    ids, routed = reference.route(layer.route, logits.double(), weights.route_bias)
    y = experts_reference(layer, x, ids, routed, weights)
    if weights.shared_up is not None and weights.shared_down is not None:
        pair = (weights.shared_up, layer.up), (weights.shared_down, layer.down)
        up, down = (unpack(w, None, Weights(order=kind.order))[0] for w, kind in pair)
        h = reference.activate(layer.activation, x.double() @ up.T).to(dtype).double()
        factor = 1.0 if gate is None else gate.double().sigmoid()[:, None]
        y = y + h @ down.T * factor
    return y


def experts_reference(
    layer: LayerSpec, x: Tensor, ids: Tensor, routed: Tensor, weights: LayerWeights
) -> Tensor:
    """The routed experts' y [tokens, hidden] in float64; ``ids``, ``routed`` [tokens, top_k]."""
    dtype = TORCH_DTYPES[layer.x]
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for expert in range(layer.experts):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        up, down = (_matrix(layer, weights, name, expert) for name in ("up", "down"))
        h = x[token].double() @ up.T
        if weights.up_bias is not None:
            h = h + weights.up_bias[expert].double()
        h = reference.activate(layer.activation, h).to(dtype).double()
        out = h @ down.T
        if weights.down_bias is not None:
            out = out + weights.down_bias[expert].double()
        y.index_add_(0, token, out * routed[token, choice].double()[:, None])
    return y


def _matrix(layer: LayerSpec, weights: LayerWeights, name: str, expert: int) -> Tensor:
    scale: Tensor | None = getattr(weights, f"{name}_scale")
    one = slice(expert, expert + 1)
    stored: Tensor = getattr(weights, name)[one]
    return unpack(stored, None if scale is None else scale[one], getattr(layer, name))[0]


def check_layer(
    layer: LayerSpec, ladder: Sequence[LayerKernels], case: Case, folder: Path, device: str
) -> Verdict:
    """Run the layer on ``case.tokens`` random tokens; popularity of experts follows ``routing``."""
    torch.manual_seed(case.seed)
    if layer.up_place is not None:
        return _check_placed(layer, ladder, case, folder, device)
    weights = random_weights(layer, device)
    runner = LayerRunner(layer, ladder, case.tokens, device, folder)
    x = torch.randn(case.tokens, layer.hidden, device=device).to(TORCH_DTYPES[layer.x])
    logits = torch.randn(case.tokens, layer.experts, device=device)
    if case.routing == "skewed":
        logits = logits - 3 * torch.arange(layer.experts, device=device).log1p()
    gate = torch.randn(case.tokens, device=device) if layer.shared_gate else None
    found = runner.forward(x, logits, weights, gate)
    return _verdict(layer, found, layer_reference(layer, x, logits, weights, gate))


def tolerance(layer: LayerSpec) -> float:
    """The deviation from float64 that rounding explains, as a share of the largest value."""
    return _ROUNDINGS * _ROUNDING[layer.x]


def _verdict(layer: LayerSpec, found: Tensor, expected: Tensor) -> Verdict:
    allowed = tolerance(layer) * expected.abs().max()
    return Verdict(float((found.double() - expected).abs().max() / allowed))


def _check_placed(
    layer: LayerSpec, ladder: Sequence[LayerKernels], case: Case, folder: Path, device: str
) -> Verdict:
    """The same for experts in slots, launched in two pieces, of which one expert is elsewhere."""
    runner = ExpertsRunner(layer, ladder, case.tokens, device, folder)
    up, down = ladder[0].up, ladder[0].down
    weights = random_weights(layer, device)
    pool, slots = scattered(
        layer.experts, expert_elements([up, down]), TORCH_DTYPES[layer.x], device
    )
    for expert in (slots >= 0).nonzero().flatten().tolist():
        for spec, stored, bias in (
            (up, weights.up, weights.up_bias),
            (down, weights.down, weights.down_bias),
        ):
            matrix = stored[expert].T if spec.weights.order == "kn" else stored[expert]
            put(pool[slots[expert]], spec, matrix, None if bias is None else bias[expert])
    x = torch.randn(case.tokens, layer.hidden, device=device).to(pool.dtype)
    ids = choices(case, layer.experts, layer.top_k).to(device)
    routed = torch.rand(ids.shape, device=device)
    sums = torch.zeros(x.shape, device=device)
    runner.begin(x, ids, routed)
    first = torch.arange(layer.experts, device=device) < layer.experts // 2
    for piece in (first, ~first):
        here = torch.where(piece, slots, -1)
        runner.run(slot_addresses(pool, pool.stride(0) * pool.itemsize, here), sums)
    # The reference leaves out what is not among the experts' numbers, as the runner does.
    ids = torch.where((slots >= 0)[ids.clamp(0, layer.experts - 1).long()], ids, -1)
    return _verdict(layer, sums, experts_reference(layer, x, ids, routed, weights))
