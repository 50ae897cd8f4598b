"""Routes for an expert's products on a CPU: 16-bit one by one, grouped, and 8-bit.

    python bench/gemm_routes.py --out bench/results/NAME-gemm-routes.json

All experts of a layer run over the same number of rows each, with weights that no cache holds, on
one thread; the routes take turns, and of each the lowest CPU time counts. The 8-bit routes take
int8 weights that were converted before and quantize rows as they come (per row, symmetric for
``int_mm``; per tensor, for oneDNN's ``qlinear``), or leave rows at 16 bits (``int8pack``).
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from host import describe_machine
from torch import Tensor
from torch.nn import functional as F

from dovetail.ir.gemm_tiles import LADDERS
from dovetail.runtime.tokens import padded_rows

SIZES = {"small": (64, 256, 128), "medium": (64, 1024, 512), "OLMoE": (16, 2048, 1024)}
"""Experts of a layer, hidden and intermediate size; of OLMoE's 64 experts 16."""
ROWS = (1, 4, 8, 16, 32, 64, 128)
Route = Callable[[Tensor], Tensor]
"""``[experts * rows, hidden] -> [experts * rows, hidden]``."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Microseconds of a layer's experts by each route, and the largest error of each against the
    16-bit loop, as a share of its root mean square."""

    size: str
    rows: int
    microseconds: Mapping[str, float]
    errors: Mapping[str, float]


def loop_route(gate: Tensor, up: Tensor, down: Tensor) -> Route:
    """One expert after the other, in tiles, as the executor does."""

    def run(x: Tensor) -> Tensor:
        out = []
        rows = len(x) // len(gate)
        numbers = torch.arange(len(x))
        for expert in range(len(gate)):
            own = padded_rows(x, numbers[expert * rows : (expert + 1) * rows], LADDERS[0])
            h = F.silu(F.linear(own, gate[expert])) * F.linear(own, up[expert])
            out.append(F.linear(h, down[expert])[:rows])
        return torch.cat(out)

    return run


def grouped_route(gate: Tensor, up: Tensor, down: Tensor) -> Route:
    """Three grouped products over all experts."""

    def run(x: Tensor) -> Tensor:
        rows = len(x) // len(gate)
        ends = torch.arange(rows, len(x) + 1, rows, dtype=torch.int32)
        h = F.silu(F.grouped_mm(x, gate.transpose(1, 2), offs=ends))
        h = h * F.grouped_mm(x, up.transpose(1, 2), offs=ends)
        return F.grouped_mm(h, down.transpose(1, 2), offs=ends)

    return run


def _by_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = weight.float().abs().amax(-1).clamp_min(1e-8) / 127
    return (weight.float() / scale[..., None]).round().to(torch.int8), scale


def eight_bit_route(gate: Tensor, up: Tensor, down: Tensor, kind: str) -> Route:
    """One expert after the other with int8 weights, one scale for each output channel."""
    packed = [[_packed(w, kind) for w in each] for each in zip(gate, up, down, strict=True)]

    def run(x: Tensor) -> Tensor:
        out = []
        for (g, u, d), own in zip(packed, x.chunk(len(packed)), strict=True):
            out.append(d(F.silu(g(own)) * u(own)))
        return torch.cat(out)

    return run


def _packed(weight: Tensor, kind: str) -> Route:
    """A product with one int8 matrix."""
    eight, scale = _by_channel(weight)
    if kind == "int8pack":
        scales = scale.to(torch.bfloat16)
        return lambda x: torch._weight_int8pack_mm(x, eight, scales)
    if kind == "int_mm":
        turned = eight.t()

        def int_mm(x: Tensor) -> Tensor:
            rows = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-8) / 127
            product = torch._int_mm((x / rows).round().to(torch.int8), turned)
            return (product.float() * rows * scale).to(torch.bfloat16)

        return int_mm
    made = torch.ops.onednn.qlinear_prepack(eight, None)
    zeros = torch.zeros(len(scale), dtype=torch.int64)

    def qlinear(x: Tensor) -> Tensor:
        step = float(x.abs().max()) / 127 or 1.0
        own = (x.float() / step).round().add_(128).clamp_(0, 255).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            own, step, 128, made, scale, zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return out

    return qlinear


def timed(size: str, rows: int, routes: Mapping[str, Route], seconds: float) -> Timed:
    """Time the routes in turns for so many seconds."""
    experts, hidden, _ = SIZES[size]
    x = torch.randn(experts * rows, hidden, generator=torch.Generator().manual_seed(rows))
    x = x.to(torch.bfloat16)
    reference = routes["loop"](x).float()
    errors, best = {}, {}
    for name, route in routes.items():
        apart = (route(x).float() - reference).square().mean() / reference.square().mean()
        errors[name], best[name] = float(apart.sqrt()), float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, route in routes.items():
            begin = time.thread_time()
            route(x)
            best[name] = min(best[name], 1e6 * (time.thread_time() - begin))
    return Timed(size, rows, best, errors)


def table(found: list[Timed]) -> str:
    """All as Markdown."""
    names = list(found[0].microseconds)
    lines = [
        f"| experts | rows | loop, µs | {' | '.join(f'{n} ÷ loop' for n in names[1:])} |",
        "|" + "---|" * (len(names) + 2),
    ]
    for each in found:
        loop = each.microseconds["loop"]
        ratios = " | ".join(f"{each.microseconds[n] / loop:.2f}" for n in names[1:])
        lines.append(f"| {each.size} | {each.rows} | {loop:.0f} | {ratios} |")
    return "\n".join(lines)


def main() -> None:
    """The whole bench."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each size and row count")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = []
    with torch.inference_mode():
        for size, (experts, hidden, inner) in SIZES.items():
            seed = torch.Generator().manual_seed(0)
            shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
            gate, up, down = (
                (torch.randn(experts, *s, generator=seed) / s[1] ** 0.5).to(torch.bfloat16)
                for s in shapes
            )
            routes = {
                "loop": loop_route(gate, up, down),
                "grouped": grouped_route(gate, up, down),
                "qlinear": eight_bit_route(gate, up, down, "qlinear"),
                "int_mm": eight_bit_route(gate, up, down, "int_mm"),
                "int8pack": eight_bit_route(gate, up, down, "int8pack"),
            }
            found += [timed(size, rows, routes, options.seconds) for rows in ROWS]
    print(table(found))
    if options.out:
        data = {"machine": describe_machine(), "timed": [asdict(each) for each in found]}
        options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
