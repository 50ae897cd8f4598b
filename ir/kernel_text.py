"""A plan's kernels in words."""

from collections.abc import Iterator

from dovetail.ir.kernel_layer import KernelLadder, LayerSpec
from dovetail.ir.kernel_spec import GemmSpec
from dovetail.ir.notation import table
from dovetail.ir.plan import Plan


def kernel_lines(plan: Plan) -> Iterator[str]:
    """What runs the experts of a GPU plan: kernels with their tiles and digests, or why none."""
    if plan.ladders or plan.no_kernels:
        yield ""
    specs = {reference.file: reference for reference in plan.kernels}
    for ladder in plan.ladders:
        yield f"kernels for {ladder.arch}: {layer_text(ladder.layer)}, in {_bodies(ladder)}"
        rows = []
        for rung in ladder.rungs:
            tiles = []
            for role in ("up", "down"):
                reference = specs.get(rung.files.get(role, ""))
                if reference is not None and isinstance(reference.spec, GemmSpec):
                    digest = reference.source_digest[:10]
                    tiles.append(f"{role} {tile_text(reference.spec)} ({digest})")
            if rung.measured is not None:
                tiles.append(f"measured, {rung.measured.ratio:.3f} of the model's choice")
            rows.append((f"to {rung.bucket[1]} tokens", *tiles))
        yield from table(rows)
    if plan.kernels:
        measured = any(rung.measured for ladder in plan.ladders for rung in ladder.rungs)
        by = (
            "a measurement where it says so, else by the cost model"
            if measured
            else "the cost model"
        )
        yield f"  {len(plan.kernels)} sources beside the plan, chosen by {by}"
    if plan.no_kernels:
        yield f"no kernels, torch's products instead: {plan.no_kernels}"


def layer_text(layer: LayerSpec) -> str:
    """The experts of a layer in short."""
    parts = [f"{layer.experts} experts of {layer.hidden} × {layer.inter}, top {layer.top_k}"]
    parts += [layer.x, layer.activation.function]
    parts += ["biases"] * layer.bias + ["by address"] * (layer.up_place is not None)
    return ", ".join(parts)


def tile_text(spec: GemmSpec) -> str:
    """A GEMM's tile in short: rows × outputs × k, warps, stages."""
    tile = spec.tile
    extra = [f"split {tile.split_k}"] * (tile.split_k > 1)
    extra += ["swapped"] * spec.swap_ab + ["TMA"] * (spec.loads == "tma")
    return ", ".join([f"{tile.m}×{tile.n}×{tile.k}, {tile.warps}w, {tile.stages}s", *extra])


def _bodies(ladder: KernelLadder) -> str:
    return ", ".join(ladder.bodies)
