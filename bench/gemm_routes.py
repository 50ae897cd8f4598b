"""Routes for the experts' products on a CPU: one by one, packed, grouped, and in fewer bits.

    python bench/gemm_routes.py --out bench/results/NAME-gemm-routes.json

All experts of a layer run over as many rows each, taken from the step's tokens and added up with
their weights, with matrices that no cache holds, on one thread; the routes take turns, and of each
the lowest CPU time counts. ``packed`` multiplies one expert after the other as ``loop`` does, but
takes rows, activates and adds up for all of them at once; ``grouped`` has one call for the
products too. ``int8`` and ``int4`` go one by one over converted matrices. All these are the
executor's, with rows padded to tiles. ``prepacked`` is oneDNN's product of int8 matrices in a
layout of its own (rows rounded per tensor), into which no matrix can be brought on its way from the
disk: that takes several times the product. Outputs in fewer bits differ, by the error given.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from host import describe_machine
from torch import Tensor
from torch.nn import functional as F

from dovetail.codegen.kernels.quantise import pack
from dovetail.ir.gemm_tiles import LADDERS
from dovetail.ir.kernel_parts import Weights
from dovetail.ir.moves import ExpertFormat
from dovetail.passes.expert_precision import weights_of
from dovetail.runtime.expert_packs import run_pack
from dovetail.runtime.linear import TiledLinear
from dovetail.runtime.packed import Packed
from dovetail.runtime.quantised import rounded
from dovetail.runtime.tokens import Routing, padded_rows

SIZES = {"small": (64, 256, 128), "medium": (64, 1024, 512), "OLMoE": (16, 2048, 1024)}
"""Experts of a layer, hidden and intermediate size; of OLMoE's 64 experts 16."""
ROWS = (1, 4, 8, 16, 32, 64, 128)
TOP_K = 8
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's tokens ``x [tokens, hidden]`` and, expert by expert, which of them each takes and
    with what weight, ``[experts * rows]``."""

    x: Tensor
    rows: Tensor
    weights: Tensor
    each: int

    @classmethod
    def random(cls, experts: int, each: int, hidden: int) -> "Rows":
        """``each`` tokens for every expert, of a step in which a token has TOP_K experts."""
        seed = torch.Generator().manual_seed(each)
        tokens = max(each, experts * each // TOP_K)
        x = torch.randn(tokens, hidden, generator=seed).to(torch.bfloat16)
        chosen = [torch.randperm(tokens, generator=seed)[:each] for _ in range(experts)]
        weights = torch.rand(experts * each, 1, generator=seed)
        return cls(x, torch.cat(chosen), weights, each)


Route = Callable[[Rows], Tensor]
"""The sum over experts, ``[tokens, hidden]`` in float32."""


@dataclass(frozen=True, slots=True)
class Timed:
    """Microseconds of a layer's experts by each route, and the error of each against the 16-bit
    loop, as a share of its root mean square."""

    size: str
    rows: int
    microseconds: Mapping[str, float]
    errors: Mapping[str, float]


def one_by_one(experts: Sequence[Product]) -> Route:
    """One expert after the other, in tiles, as the executor does."""

    def run(step: Rows) -> Tensor:
        total = torch.zeros(step.x.shape, dtype=torch.float32)
        for number, expert in enumerate(experts):
            at = slice(number * step.each, (number + 1) * step.each)
            rows = step.rows[at]
            y = expert(padded_rows(step.x, rows, LADDERS[0]))[: step.each].float()
            total.index_add_(0, rows, y.mul_(step.weights[at]))
        return total

    return run


def loop_route(gate: Tensor, up: Tensor, down: Tensor) -> Route:
    """The 16-bit product of every expert on its own."""

    def expert(g: Tensor, u: Tensor, d: Tensor) -> Product:
        return lambda x: F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)

    return one_by_one([expert(*each) for each in zip(gate, up, down, strict=True)])


def packed_route(gate: Tensor, up: Tensor, down: Tensor, grouped: bool) -> Route:
    """All experts as one pack, by the executor's own code."""
    linear, experts = TiledLinear(LADDERS[0]), range(len(gate))
    loaded = [{"gate": gate[e], "up": up[e], "down": down[e]} for e in experts]

    def expert(x: Tensor, weights: Mapping[str, Packed]) -> Tensor:
        h = F.silu(linear(x, weights["gate"])) * linear(x, weights["up"])
        return linear(h, weights["down"])

    def run(step: Rows) -> Tensor:
        offsets = [step.each * e for e in range(len(gate) + 1)]
        routing = Routing(step.rows, step.weights, offsets, (0,) * len(gate))
        total = torch.zeros(step.x.shape, dtype=torch.float32)
        run_pack(expert, step.x, routing, experts, loaded, total, LADDERS[0], grouped)
        return total

    return run


def quantised_route(gate: Tensor, up: Tensor, down: Tensor, form: ExpertFormat) -> Route:
    """One expert after the other with converted matrices, by the executor's own code."""
    linear = TiledLinear(LADDERS[0])

    def converted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        stored, scale = pack(matrix[None], weights_of(form))
        assert scale is not None
        return stored[0], scale[0]

    def expert(g: Tensor, u: Tensor, d: Tensor) -> Product:
        (gate, gates), (up, ups), (down, downs) = map(converted, (g, u, d))

        def run(x: Tensor) -> Tensor:
            own = rounded(x) if form == "int8" else x
            h = F.silu(linear(own, gate, scale=gates)) * linear(own, up, scale=ups)
            return linear(h, down, scale=downs)

        return run

    return one_by_one([expert(*each) for each in zip(gate, up, down, strict=True)])


def prepacked_route(gate: Tensor, up: Tensor, down: Tensor) -> Route:
    """One expert after the other with int8 matrices in oneDNN's own layout."""

    def expert(g: Product, u: Product, d: Product) -> Product:
        return lambda x: d(F.silu(g(x)) * u(x))

    made = ([_prepacked(w) for w in each] for each in zip(gate, up, down, strict=True))
    return one_by_one([expert(*each) for each in made])


def _prepacked(weight: Tensor) -> Product:
    stored, scale = pack(weight[None], Weights("int8"))
    assert scale is not None
    made = torch.ops.onednn.qlinear_prepack(stored[0], None)
    zeros = torch.zeros(len(weight), dtype=torch.int64)

    def qlinear(x: Tensor) -> Tensor:
        step = float(x.abs().max()) / 127 or 1.0
        own = (x.float() / step).round().add_(128).clamp_(0, 255).to(torch.uint8)
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            own, step, 128, made, scale[0], zeros, None, 1.0, 0, torch.bfloat16, "none", [], ""
        )
        return out

    return qlinear


def timed(size: str, rows: int, routes: Mapping[str, Route], seconds: float) -> Timed:
    """Time the routes in turns for so many seconds."""
    experts, hidden, _ = SIZES[size]
    step = Rows.random(experts, rows, hidden)
    reference = routes["loop"](step)
    errors, best = {}, {}
    for name, route in routes.items():
        apart = (route(step) - reference).square().mean() / reference.square().mean()
        errors[name], best[name] = float(apart.sqrt()), float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, route in routes.items():
            begin = time.thread_time()
            route(step)
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
                "packed": packed_route(gate, up, down, grouped=False),
                "grouped": packed_route(gate, up, down, grouped=True),
                "int8": quantised_route(gate, up, down, "int8"),
                "int4": quantised_route(gate, up, down, "int4"),
                "prepacked": prepacked_route(gate, up, down),
            }
            found += [timed(size, rows, routes, options.seconds) for rows in ROWS]
    print(table(found))
    if options.out:
        data = {"machine": describe_machine(), "timed": [asdict(each) for each in found]}
        options.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
