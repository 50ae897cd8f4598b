"""One GEMM of a layer under many tiles: variants side by side, spills, the cost model's rank."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from clock import Clock, Timing
from layers import Batch, make_batches
from triton.errors import TritonError  # type: ignore[import-untyped]

from dovetail.codegen.gate.binary import BinaryFacts
from dovetail.codegen.gate.compile import compile_kernel
from dovetail.codegen.gate.layer_numbers import random_weights
from dovetail.codegen.kernels.arch import Arch
from dovetail.codegen.kernels.choose import rank
from dovetail.codegen.kernels.cost import predicted_seconds, refusal
from dovetail.codegen.kernels.emit import emit_kernel, file_name, load_source
from dovetail.codegen.kernels.launch import grid_of, launch, weight_descriptor
from dovetail.codegen.kernels.launch_bounds import SORT_PART, most_tiles, sort_parts
from dovetail.codegen.kernels.quantise import TORCH_DTYPES
from dovetail.codegen.kernels.routing import power_of_two
from dovetail.ir.errors import InputError
from dovetail.ir.kernel_layer import LayerSpec
from dovetail.ir.kernel_parts import Tile
from dovetail.ir.kernel_spec import GemmSpec, SortSpec


@dataclass(frozen=True, slots=True)
class Tried:
    """One spec on one number of tokens; ``facts`` of its binary when they were asked for."""

    question: str
    label: str
    tokens: int
    spec: GemmSpec
    predicted: float
    timing: Timing | None
    facts: BinaryFacts | None = None
    skipped: str = ""


class GemmBench:
    """Times moe_up specs of one layer on sorted slots of random batches."""

    def __init__(self, layer: LayerSpec, arch: Arch, clock: Clock, folder: Path) -> None:
        self.layer, self.arch, self.clock, self.folder = layer, arch, clock, folder
        self.weights = random_weights(layer, clock.device)
        self._batches: dict[int, list[Batch]] = {}
        self._sorted: dict[tuple[int, int], list[dict[str, Any]]] = {}

    def batches(self, tokens: int) -> list[Batch]:
        """The batches for this many tokens, made once."""
        if tokens not in self._batches:
            device = self.clock.device
            self._batches[tokens] = make_batches(self.layer, tokens, self.weights, device)
        return self._batches[tokens]

    def tried(self, question: str, label: str, spec: GemmSpec, tokens: int) -> Tried:
        """Run, time and describe one spec."""
        predicted = predicted_seconds(spec, self.arch, tokens)
        try:
            timing = self.time(spec, tokens)
        except (RuntimeError, TritonError) as failure:
            words = f"{type(failure).__name__}: {str(failure).strip().splitlines()[0][:120]}"
            return Tried(question, label, tokens, spec, predicted, None, None, words)
        return Tried(question, label, tokens, spec, predicted, timing)

    def time(self, spec: GemmSpec, tokens: int) -> Timing:
        """Seconds of one launch, over batches that hit different experts."""
        module = load_source(emit_kernel(spec), self.folder, file_name(spec))
        y = self._output(spec, tokens)
        stored = self.weights.up
        operand: dict[str, Any] = {"w_ptr": stored, "y_ptr": y}
        if spec.loads == "tma":
            operand["w_desc"] = weight_descriptor(stored, spec)
        common = {"scale_ptr": self.weights.up_scale, "bias_ptr": self.weights.up_bias}
        grid = grid_of(spec, tokens)
        values = [
            {**common, **order, **operand, "x_ptr": batch.x}
            for batch, order in zip(
                self.batches(tokens), self._orders(spec.tile.m, tokens), strict=True
            )
        ]
        return self.clock.time(
            [functools.partial(launch, module, spec, grid, value) for value in values]
        )

    def _output(self, spec: GemmSpec, tokens: int) -> torch.Tensor:
        rows = most_tiles(tokens * spec.top_k, spec.experts, spec.tile.m) * spec.tile.m
        shape = (spec.tile.split_k * rows, spec.n)
        return torch.empty(shape, dtype=TORCH_DTYPES[spec.out], device=self.clock.device)

    def _orders(self, tile_m: int, tokens: int) -> list[dict[str, Any]]:
        if (tile_m, tokens) not in self._sorted:
            orders = [self._sort(batch, tile_m) for batch in self.batches(tokens)]
            self._sorted[tile_m, tokens] = orders
        return self._sorted[tile_m, tokens]

    def _sort(self, batch: Batch, tile_m: int) -> dict[str, Any]:
        """Slots of a batch in the order that the GEMM reads."""
        experts, slots = self.layer.experts, batch.ids.numel()
        spec = SortSpec("moe_sort", experts, tile_m, one_launch=False)
        module = load_source(emit_kernel(spec), self.folder, file_name(spec))
        tiles, parts = most_tiles(slots, experts, tile_m), sort_parts(slots)

        def ints(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=self.clock.device)

        values: dict[str, Any] = {
            "id_ptr": batch.ids, "partial_ptr": ints(parts * power_of_two(experts + 1)),
            "slot_ptr": ints(tiles * tile_m), "tile_expert_ptr": ints(tiles),
            "count_ptr": ints(experts), "num_rows_ptr": ints(1), "num_slots": slots,
            "chunk": SORT_PART, "parts": parts, "max_rows": tiles * tile_m,
        }  # fmt: skip
        launch(module, spec, (parts,), values, f"{spec.name}_count")
        launch(module, spec, grid_of(spec, len(batch.x), self.layer.top_k), values)
        return values


def up_spec(layer: LayerSpec, tile: Tile, **changes: Any) -> GemmSpec:
    """The layer's gather, GEMM and activation with this tile."""
    base = GemmSpec(
        "moe_up", layer.experts, layer.inter, layer.hidden, layer.top_k, layer.x, tile,
        layer.up, "gather", "row", layer.activation, layer.bias, out=layer.x,
    )  # fmt: skip
    return dataclasses.replace(base, **changes)


def variants(bench: GemmBench, tokens: int) -> Iterator[Tried]:
    """Plain, swapped, by TMA, both, and not fused with its activation, on the best tile of each."""
    layer, question = bench.layer, f"variants, {bench.layer.name}"
    rows = 16 if tokens * layer.top_k <= 16 * layer.experts else 128
    tile = Tile(rows, 128, 64, 4 if rows == 16 else 8, 3)
    forms: dict[str, dict[str, Any]] = {
        "plain": {},
        "swapped": {"swap_ab": True},
        "TMA": {"loads": "tma"},
        "swapped, TMA": {"swap_ab": True, "loads": "tma"},
        "not fused": {"activation": None, "n": 2 * layer.inter},
    }
    for label, changes in forms.items():
        if rows > 16 and "swapped" in label:
            continue
        try:
            spec = up_spec(layer, tile, **changes)
        except InputError:
            continue
        if not refusal(spec, bench.arch):
            yield bench.tried(question, label, spec, tokens)


def spills(bench: GemmBench, tokens: int) -> Iterator[Tried]:
    """The same product with tiles that spill more and more: where does it begin to cost?"""
    for tile in (
        Tile(64, 128, 64, 4, 3),
        Tile(128, 128, 64, 8, 3),
        Tile(128, 128, 64, 4, 3),
        Tile(128, 256, 64, 8, 2),
        Tile(128, 256, 64, 4, 2),
    ):
        spec = up_spec(bench.layer, tile)
        done = bench.tried(
            f"spills, {bench.layer.name}", f"{tile.m}×{tile.n}, {tile.warps} warps", spec, tokens
        )
        if done.timing is not None and bench.clock.device == "cuda":
            module = load_source(emit_kernel(spec), bench.folder, file_name(spec))
            facts = compile_kernel(module, spec, bench.arch)[0].facts
            done = dataclasses.replace(done, facts=facts)
        yield done


def ranked(bench: GemmBench, tokens: int, count: int) -> Iterator[Tried]:
    """Tiles from the best predicted to the worst that fits: does measurement rank them alike?"""
    base = up_spec(bench.layer, Tile(16, 64, 32), bucket=(1, tokens))
    rows = (16, 32, 64, 128) if tokens > 64 else (16, 32)
    everything = sorted(
        (item for m in rows for item in rank(base, bench.arch, tokens, m, 10_000)),
        key=lambda item: item.seconds,
    )
    step = max(1, len(everything) // count)
    for item in everything[::step][:count]:
        yield bench.tried(f"rank, {bench.layer.name}", "", item.spec, tokens)


def kendall(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau of (predicted, measured): 1 for the same order, -1 for the reverse."""
    agree = total = 0
    for i, (a, b) in enumerate(pairs):
        for c, d in pairs[:i]:
            total += 1
            agree += 1 if (a - c) * (b - d) > 0 else -1
    return agree / total if total else 0.0
