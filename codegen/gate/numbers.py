"""Run one kernel on random data of a given shape and routing, and compare with float64.

The same check runs in Triton's interpreter on the CPU and on a GPU: only the tensors' device
differs.
"""

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from dovetail.codegen.gate import reference
from dovetail.codegen.gate.placed import placed_weights
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.codegen.kernels.launch import grid_of, launch, weight_descriptor
from dovetail.codegen.kernels.launch_bounds import SORT_PART, most_tiles, sort_parts
from dovetail.codegen.kernels.quantise import TORCH_DTYPES, pack, unpack
from dovetail.ir.kernel_spec import (
    ActivateSpec,
    GemmSpec,
    KernelSpec,
    ReduceSpec,
    RouteSpec,
    SortSpec,
)

Routing = Literal["random", "skewed", "one_expert", "foreign"]
_ROUNDING = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24}
_SUM_ERROR = 2e-5
"""Float32 sums and the GPU's fast exponential, relative to the largest output."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a kernel is run on. ``random``: every token chooses distinct experts; ``skewed``: as a
    power law; ``one_expert``: all choose the same, the rest stay empty; ``foreign``: a third of the
    choices belong to experts that are elsewhere."""

    tokens: int
    routing: Routing = "random"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """``error``: the largest deviation over what rounding allows; at most 1 is right."""

    error: float
    note: str = ""

    @property
    def right(self) -> bool:
        """Whether every value is within rounding; NaN is not."""
        return self.error <= 1.0


def check(spec: KernelSpec, case: Case, folder: Path, device: str, text: str = "") -> Verdict:
    """Emit (or take ``text``), run and compare one kernel."""
    torch.manual_seed(case.seed)
    text = text or emit_kernel(spec)
    name = file_name(spec)
    module = load_source(text, folder, name)
    match spec:
        case GemmSpec():
            return _check_gemm(module, spec, case, device)
        case RouteSpec():
            return _check_route(module, spec, case, device)
        case SortSpec():
            return _check_sort(module, spec, case, device)
        case ReduceSpec():
            return _check_reduce(module, spec, case, device)
        case ActivateSpec():
            return _check_activate(module, spec, case, device)


def choices(case: Case, experts: int, top_k: int) -> Tensor:
    """Routed ids [tokens, top_k], int32."""
    popularity = torch.ones(experts)
    if case.routing == "skewed":
        popularity = 1.0 / torch.arange(1, experts + 1) ** 1.5
    if case.routing == "one_expert":
        return torch.arange(top_k, dtype=torch.int32).repeat(case.tokens, 1)
    ids = torch.multinomial(popularity.repeat(case.tokens, 1), top_k).int()
    if case.routing == "foreign":
        elsewhere = torch.rand(ids.shape) < 1 / 3
        ids[elsewhere] = torch.where(torch.rand(ids.shape) < 0.5, -1, experts)[elsewhere].int()
    return ids


def deviation(found: Tensor, expected: Tensor, out: str) -> float:
    """Largest error over what one rounding to ``out`` and float32 sums allow; NaN stays NaN."""
    if found.numel() == 0:
        return 0.0
    allowed = _ROUNDING[out] * expected.abs() + _SUM_ERROR * expected.abs().max() + 1e-30
    return float(((found.double() - expected).abs() / allowed).max())


def _check_gemm(module: ModuleType, spec: GemmSpec, case: Case, device: str) -> Verdict:
    dtype, slots = TORCH_DTYPES[spec.x], case.tokens * spec.top_k
    ids = choices(case, spec.experts, spec.top_k).reshape(-1)
    if spec.rows == "dense":
        order, owners = list(range(case.tokens)), [0]
    else:
        order, owners, _ = reference.sort(ids, spec.experts, spec.tile.m)
    most = most_tiles(slots, spec.experts, spec.tile.m) * spec.tile.m
    rows = {"gather": case.tokens, "dense": case.tokens, "sorted": most}[spec.rows]
    x = torch.randn(rows, spec.k).to(dtype).to(device)
    matrix = (torch.randn(spec.experts, spec.outputs, spec.k) / spec.k**0.5).to(dtype).to(device)
    stored, scales = pack(matrix, spec.weights)
    absent: list[int] = []
    bias = torch.randn(spec.experts, spec.outputs).to(dtype).to(device) if spec.bias else None
    routed = torch.rand(slots).to(device)
    out_rows = {"row": rows if spec.rows == "dense" else most, "slot": slots, "add": case.tokens}
    shape = (spec.tile.split_k, out_rows[spec.store], spec.n)
    blank = 0.0 if spec.store == "add" else torch.nan
    y = torch.full(shape, blank, dtype=TORCH_DTYPES[spec.out], device=device)
    values: dict[str, Any] = {
        "x_ptr": x, "w_ptr": stored, "scale_ptr": scales, "bias_ptr": bias, "y_ptr": y,
        "routed_weight_ptr": routed, "num_slots": slots, "max_rows": most, "num_rows": case.tokens,
        "slot_ptr": _ints(order, device), "tile_expert_ptr": _ints(owners, device),
        "num_rows_ptr": _ints([len(order)], device),
    }  # fmt: skip
    if spec.loads == "tma":
        values["w_desc"] = weight_descriptor(stored, spec)
    if spec.place:
        pool, values["expert_at_ptr"], absent = placed_weights(spec, matrix, bias)
        values["pool"] = pool  # keeps it alive
    launch(module, spec, grid_of(spec, case.tokens), values)
    run = [slot < slots and int(ids[slot]) not in absent for slot in order]
    at = [row for row, there in enumerate(run) if there]
    of = [order[row] for row in at]
    tokens = [slot // spec.top_k for slot in of]
    source = {"gather": tokens, "sorted": at, "dense": at}[spec.rows]
    owner = torch.zeros(len(of), dtype=torch.long) if spec.rows == "dense" else ids[of].long()
    plain = spec.weights.format == "plain"
    w = matrix.double() if plain else unpack(stored, scales, spec.weights)
    expected = reference.gemm(spec, x[source].double(), w, bias, owner.to(device))
    if spec.routed_weight:
        expected = expected * routed[of].double()[:, None]
    target = {"row": at, "slot": of, "add": tokens}[spec.store]
    if spec.store == "add":
        sums = torch.zeros(case.tokens, spec.n, dtype=torch.float64, device=device)
        expected = sums.index_add(0, torch.tensor(tokens, device=device), expected)
        target = list(range(case.tokens))
    found = y.double().sum(0)
    elsewhere = torch.ones(found.shape[0], dtype=torch.bool)
    elsewhere[target] = False
    if spec.store != "add" and not y[:, elsewhere.to(device)].isnan().all():
        return Verdict(torch.inf, "wrote rows that are not its own")
    return Verdict(deviation(found[target], expected, spec.out))


def _ints(values: list[int], device: str) -> Tensor:
    return torch.tensor(values or [0], dtype=torch.int32, device=device)


def _check_route(module: ModuleType, spec: RouteSpec, case: Case, device: str) -> Verdict:
    logits = torch.randn(case.tokens, spec.experts).to(device)
    bias = (torch.randn(spec.experts) / 4).to(device) if spec.bias else None
    ids = torch.full((case.tokens, spec.top_k), -7, dtype=torch.int32, device=device)
    weights = torch.full(ids.shape, torch.nan, device=device)
    values = {"logits_ptr": logits, "bias_ptr": bias, "id_ptr": ids, "weight_ptr": weights}
    launch(module, spec, grid_of(spec, case.tokens), values | {"num_tokens": case.tokens})
    expected_ids, expected = reference.route(spec, logits.double(), bias)
    if not torch.equal(ids.long(), expected_ids):
        return Verdict(torch.inf, "chose other experts")
    return Verdict(deviation(weights, expected, "fp32"))


def _check_sort(module: ModuleType, spec: SortSpec, case: Case, device: str) -> Verdict:
    top_k = min(spec.experts, 2)
    ids = choices(case, spec.experts, top_k).reshape(-1)
    slots, parts = ids.numel(), sort_parts(ids.numel())
    most = most_tiles(slots, spec.experts, spec.tile_m)
    values: dict[str, Any] = {
        "id_ptr": ids.to(device),
        "slot_ptr": torch.full((most * spec.tile_m,), -7, dtype=torch.int32, device=device),
        "tile_expert_ptr": torch.full((most,), -7, dtype=torch.int32, device=device),
        "count_ptr": torch.full((spec.experts,), -7, dtype=torch.int32, device=device),
        "num_rows_ptr": torch.full((1,), -7, dtype=torch.int32, device=device),
        "num_slots": slots,
        "chunk": SORT_PART,
        "parts": parts,
    }
    if not spec.one_launch:
        bins = 1 << spec.experts.bit_length()
        values["partial_ptr"] = torch.zeros(parts, bins, dtype=torch.int32, device=device)
        launch(module, spec, (parts,), values, f"{spec.name}_count")
    launch(module, spec, grid_of(spec, case.tokens, top_k), values)
    order, owners, counts = reference.sort(ids, spec.experts, spec.tile_m)
    found = [values["slot_ptr"][: len(order)], values["tile_expert_ptr"][: len(owners)]]
    found += [values["count_ptr"], values["num_rows_ptr"]]
    same = [
        a.tolist() == b for a, b in zip(found, (order, owners, counts, [len(order)]), strict=True)
    ]
    return Verdict(0.0) if all(same) else Verdict(torch.inf, "another order than a stable sort's")


def _check_reduce(module: ModuleType, spec: ReduceSpec, case: Case, device: str) -> Verdict:
    ids = choices(case, spec.experts, spec.top_k).to(device)
    part_dtype = torch.float32 if spec.split_k > 1 else TORCH_DTYPES[spec.x]
    part = torch.randn(spec.split_k, ids.numel(), spec.n).to(part_dtype).to(device)
    local = ((ids >= 0) & (ids < spec.experts)).reshape(-1)
    table = torch.ones(spec.experts, dtype=torch.int64, device=device)
    y = torch.full((case.tokens, spec.n), torch.nan, dtype=TORCH_DTYPES[spec.out], device=device)
    if spec.by_address:
        table[1::2] = 0  # every other expert is not in this launch
        local &= table[ids.clamp(0, spec.experts - 1).long()].reshape(-1) != 0
        y = torch.randn(y.shape, device=device)
    before = y.double()
    part[:, ~local] = torch.nan
    shared = gate = None
    if spec.shared != "none":
        shared = torch.randn(case.tokens, spec.n).to(TORCH_DTYPES[spec.x]).to(device)
    if spec.shared == "gated":
        gate = torch.randn(case.tokens).to(device)
    values = {
        "expert_at_ptr": table,
        "part_ptr": part,
        "id_ptr": ids,
        "shared_ptr": shared,
        "gate_ptr": gate,
        "y_ptr": y,
    }
    launch(module, spec, grid_of(spec, case.tokens), values | {"num_tokens": case.tokens})
    if spec.by_address:
        ids = torch.where(local.reshape(ids.shape), ids, -1)
    expected = reference.reduce(spec, part, ids, shared, gate)
    return Verdict(deviation(y, expected + before if spec.by_address else expected, spec.out))


def _check_activate(module: ModuleType, spec: ActivateSpec, case: Case, device: str) -> Verdict:
    rows = case.tokens
    part = torch.randn(spec.split_k, rows + 3, 2 * spec.n).to(device)
    y = torch.full((rows + 3, spec.n), torch.nan, dtype=TORCH_DTYPES[spec.out], device=device)
    values = {"part_ptr": part, "y_ptr": y, "num_rows_ptr": _ints([rows], device)}
    launch(module, spec, grid_of(spec, rows + 3), values | {"max_rows": rows + 3})
    if not y[rows:].isnan().all():
        return Verdict(torch.inf, "wrote rows past the last one")
    return Verdict(deviation(y[:rows], reference.activate_sums(spec, part)[:rows], spec.out))
