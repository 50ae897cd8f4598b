"""Emit what follows the GEMMs: activation of split sums, and the sum over a token's slots."""

from dovetail.codegen.kernels.gemm import activated
from dovetail.codegen.kernels.text import Source, render
from dovetail.ir.kernel_spec import ActivateSpec, ReduceSpec

_CAST = {"bf16": ".to(tl.bfloat16)", "fp16": ".to(tl.float16)", "fp32": ""}


def emit_activate(spec: ActivateSpec) -> str:
    """Source of the activation: sums [split_k, max_rows, 2n] of float32 to h [max_rows, n]."""
    act = spec.activation
    source = Source(spec, f"Sum of {spec.split_k} parts of the k axis, then {act.function}.")
    source.const(N=spec.n, SPLIT_K=spec.split_k, BLOCK_N=spec.block)
    source.args("part_ptr", "y_ptr", "num_rows_ptr")
    source.sizes("max_rows")
    interleaved = act.pairs == "interleaved"
    source.line(
        "row = tl.program_id(0).to(tl.int64)",
        "if row >= tl.load(num_rows_ptr):",
        "    return",
        "n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "ok = n < N",
        "gate = tl.zeros((BLOCK_N,), dtype=tl.float32)",
        "up = tl.zeros((BLOCK_N,), dtype=tl.float32)",
        "for split in tl.static_range(SPLIT_K):",
        "    at = part_ptr + (split * max_rows + row) * (2 * N)",
        f"    gate += tl.load(at + {'2 * n' if interleaved else 'n'}, mask=ok, other=0.0)",
        f"    up += tl.load(at + {'2 * n + 1' if interleaved else 'N + n'}, mask=ok, other=0.0)",
        *activated(act),
        f"tl.store(y_ptr + row * N + n, acc{_CAST[spec.out]}, mask=ok)",
    )
    return render(source, {"num_warps": spec.warps})


def emit_reduce(spec: ReduceSpec) -> str:
    """Source of the sum: part [split_k, tokens · top_k, n] (weighted already) to y [tokens, n]."""
    shared = {
        "none": "",
        "plain": ", plus the shared expert",
        "gated": ", plus the gated shared expert",
    }
    what = ", of experts that have an address, added" if spec.by_address else shared[spec.shared]
    source = Source(spec, f"Sum over each token's {spec.top_k} slots{what}.")
    source.const(EXPERTS=spec.experts, TOP_K=spec.top_k, N=spec.n, SPLIT_K=spec.split_k)
    source.const(BLOCK_N=spec.block)
    source.args("part_ptr", "id_ptr")
    source.args(
        *{"plain": ["shared_ptr"], "gated": ["shared_ptr", "gate_ptr"]}.get(spec.shared, [])
    )
    source.args(*(["expert_at_ptr"] if spec.by_address else []), "y_ptr")
    source.sizes("num_tokens")
    zero, there = "tl.zeros((BLOCK_N,), dtype=tl.float32)", ["here = (id >= 0) & (id < EXPERTS)"]
    if spec.by_address:
        zero = "tl.load(y_ptr + token * N + n, mask=n_ok, other=0.0)"
        there.append("here = tl.load(expert_at_ptr + id, mask=here, other=0) != 0")
    source.line(
        "token = tl.program_id(0).to(tl.int64)",
        "n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
        "n_ok = n < N",
        f"acc = {zero}",
        "for j in tl.static_range(TOP_K):",
        "    slot = token * TOP_K + j",
        "    id = tl.load(id_ptr + slot)",
        *(f"    {line}" for line in there),
        "    end = tl.where(here, N, 0)  # other rows were never written",
        "    for split in tl.static_range(SPLIT_K):",
        "        at = part_ptr + (split * (num_tokens * TOP_K) + slot) * N + n",
        "        acc += tl.load(at, mask=n < end, other=0.0).to(tl.float32)",
    )
    if spec.shared != "none":
        source.line("shared = tl.load(shared_ptr + token * N + n, mask=n_ok, other=0.0)")
        gate = " * tl.sigmoid(tl.load(gate_ptr + token).to(tl.float32))" * (spec.shared == "gated")
        source.line(f"acc += shared.to(tl.float32){gate}")
    source.line(f"tl.store(y_ptr + token * N + n, acc{_CAST[spec.out]}, mask=n_ok)")
    return render(source, {"num_warps": spec.warps})
