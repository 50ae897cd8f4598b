"""Emit routing (scores, groups, top-k) and the sort of slots into block-aligned expert order."""

from dovetail.codegen.kernels.text import Source, kernel, render
from dovetail.ir.kernel_spec import RouteSpec, SortSpec


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least ``value``."""
    return 1 << max(0, value - 1).bit_length()


def emit_route(spec: RouteSpec) -> str:
    """Source of the routing kernel: logits [tokens, experts] to ids and weights [tokens, top_k].

    Scores lie in a [tokens, groups, experts per group] tile, both axes padded to powers of two, so
    that a group is one axis and the choice runs over the flattened tile.
    """
    kind = f"{spec.groups} groups, {spec.top_groups} kept, " if spec.groups > 1 else ""
    source = Source(spec, f"Routing: {spec.score}, {kind}top {spec.top_k} of {spec.experts}.")
    source.args("logits_ptr", *(["bias_ptr"] if spec.bias else []), "id_ptr", "weight_ptr")
    source.sizes("num_tokens")
    per_group = spec.experts // spec.groups
    source.const(EXPERTS=spec.experts, TOP_K=spec.top_k, GROUPS=spec.groups, PER_GROUP=per_group)
    wide = power_of_two(spec.groups), power_of_two(per_group)
    source.const(BLOCK_T=spec.tokens, BLOCK_G=wide[0], BLOCK_E=wide[1])
    source.const(BLOCK_K=power_of_two(spec.top_k))
    if spec.groups > 1:
        source.const(TOP_GROUPS=spec.top_groups)
    _scores(source, spec)
    if spec.groups > 1:
        _keep_groups(source, spec)
    _choose(source, spec)
    _store_choice(source, spec)
    return render(source, {"num_warps": spec.warps})


def _scores(source: Source, spec: RouteSpec) -> None:
    source.line(
        "token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)",
        "token_ok = token < num_tokens",
        "group = tl.arange(0, BLOCK_G)[None, :, None]",
        "member = tl.arange(0, BLOCK_E)[None, None, :]",
        "expert = group * PER_GROUP + member",
        "real = (group < GROUPS) & (member < PER_GROUP)",
        "at = logits_ptr + token[:, None, None] * EXPERTS + expert",
        'logits = tl.load(at, mask=token_ok[:, None, None] & real, other=float("-inf"))',
        "logits = logits.to(tl.float32)",
    )
    if spec.score == "sigmoid":
        source.line("score = tl.sigmoid(logits)")
    else:
        source.note("A row past the last token holds only -inf; 0 keeps it from becoming NaN.")
        source.line(
            "top = tl.max(tl.max(logits, axis=2), axis=1)",
            "top = tl.where(token_ok, top, 0.0)",
            "score = tl.exp(logits - top[:, None, None])",
            "total = tl.sum(tl.sum(score, axis=2), axis=1)",
            "total = tl.where(token_ok, total, 1.0)",
            "score = score / total[:, None, None]",
        )
    if spec.bias:
        source.note("The bias corrects the choice, not the weights.")
        source.line(
            "bias = tl.load(bias_ptr + expert, mask=real, other=0.0).to(tl.float32)",
            'choice = tl.where(real, score + bias, float("-inf"))',
        )
    else:
        source.line('choice = tl.where(real, score, float("-inf"))')


def _keep_groups(source: Source, spec: RouteSpec) -> None:
    source.line("best = tl.max(choice, axis=2)")
    if spec.group_score == "top2":
        source.note("Two best of each group: take the first best out, then look again.")
        source.line(
            "first = tl.argmax(choice, axis=2)",
            'rest = tl.where(member == first[:, :, None], float("-inf"), choice)',
            "best += tl.max(rest, axis=2)",
        )
    source.line(
        "lane = tl.arange(0, BLOCK_G)[None, :]",
        'best = tl.where(lane < GROUPS, best, float("-inf"))',
        "kept = lane < 0",
        "for _ in tl.static_range(TOP_GROUPS):",
        "    winner = tl.argmax(best, axis=1)[:, None]",
        "    kept = kept | (lane == winner)",
        '    best = tl.where(lane == winner, float("-inf"), best)',
        'choice = tl.where(kept[:, :, None], choice, float("-inf"))',
    )


def _choose(source: Source, spec: RouteSpec) -> None:
    source.line(
        "choice = tl.reshape(choice, (BLOCK_T, BLOCK_G * BLOCK_E))",
        "score = tl.reshape(score, (BLOCK_T, BLOCK_G * BLOCK_E))",
        "lane = tl.arange(0, BLOCK_G * BLOCK_E)[None, :]",
    )
    source.line(
        "column = tl.arange(0, BLOCK_K)[None, :]",
        "ids = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.int32)",
        "weights = tl.zeros((BLOCK_T, BLOCK_K), dtype=tl.float32)",
        "for j in tl.static_range(TOP_K):",
    )
    source.line(
        "winner = tl.argmax(choice, axis=1)[:, None]",
        "hit = lane == winner",
        "weight = tl.sum(tl.where(hit, score, 0.0), axis=1)[:, None]",
        "id = winner // BLOCK_E * PER_GROUP + winner % BLOCK_E",
        "ids = tl.where(column == j, id, ids)",
        "weights = tl.where(column == j, weight, weights)",
        'choice = tl.where(hit, float("-inf"), choice)',
        depth=2,
    )


def _store_choice(source: Source, spec: RouteSpec) -> None:
    if spec.renormalise:
        source.line(
            "total = tl.sum(weights, axis=1)[:, None]",
            "weights = weights / tl.where(token_ok[:, None], total, 1.0)",
        )
    if spec.scale != 1.0:
        source.line(f"weights *= {spec.scale}")
    source.line(
        "at = token[:, None] * TOP_K + column",
        "ok = token_ok[:, None] & (column < TOP_K)",
        "tl.store(id_ptr + at, ids, mask=ok)",
        "tl.store(weight_ptr + at, weights, mask=ok)",
    )


def emit_sort(spec: SortSpec) -> str:
    """Source of the sort: one kernel, or ``<name>_count`` before it where programs share the count.

    Program (e, p) places expert e's slots out of part p of all slots: rows of earlier experts and
    parts come first. The last part pads the expert's run, names its row tiles and stores its count.
    """
    source = Source(
        spec, "Sort of slots into block-aligned expert order; counts stay on the device."
    )
    bins = power_of_two(spec.experts + 1)
    source.const(EXPERTS=spec.experts, BLOCK_M=spec.tile_m, BLOCK_S=spec.block, BINS=bins)
    shared = [] if spec.one_launch else ["partial_ptr"]
    source.args("id_ptr", *shared)
    source.args("slot_ptr", "tile_expert_ptr", "count_ptr", "num_rows_ptr")
    source.sizes("num_slots", *([] if spec.one_launch else ["chunk", "parts"]))
    _totals(source, spec)
    _place(source, spec)
    _finish(source, spec)
    options = {"num_warps": spec.warps}
    if spec.one_launch:
        return render(source, options)
    return render(source, options, kernel(_count(spec), f"{spec.name}_count"))


_HISTOGRAM = (
    "id = tl.load(id_ptr + s, mask=s < end, other=EXPERTS)",
    "id = tl.where((id >= 0) & (id < EXPERTS), id, EXPERTS)  # experts of elsewhere",
)


def _count(spec: SortSpec) -> Source:
    """Slots per expert in each part."""
    source = Source(spec, "")
    source.args("id_ptr", "partial_ptr")
    source.sizes("num_slots", "chunk")
    source.line(
        "part = tl.program_id(0)",
        "end = min(num_slots, (part + 1) * chunk)",
        "count = tl.zeros((BINS,), dtype=tl.int32)",
        "for s0 in range(part * chunk, end, BLOCK_S):",
        "    s = s0 + tl.arange(0, BLOCK_S)",
    )
    source.line(*_HISTOGRAM, "count += tl.histogram(id, BINS)", depth=2)
    source.line("tl.store(partial_ptr + part * BINS + tl.arange(0, BINS), count)")
    return source


def _totals(source: Source, spec: SortSpec) -> None:
    source.line(
        "e = tl.program_id(0)",
        *([] if spec.one_launch else ["part = tl.program_id(1)"]),
        "bin = tl.arange(0, BINS)",
        "count = tl.zeros((BINS,), dtype=tl.int32)",
    )
    if spec.one_launch:
        source.line(
            "end = num_slots",
            "for s0 in range(0, end, BLOCK_S):",
            "    s = s0 + tl.arange(0, BLOCK_S)",
        )
        source.line(*_HISTOGRAM, "count += tl.histogram(id, BINS)", depth=2)
        source.line("count = tl.where(bin < EXPERTS, count, 0)")
        return
    source.line(
        "before = tl.zeros((BINS,), dtype=tl.int32)",
        "for p in range(0, parts):",
        "    found = tl.load(partial_ptr + p * BINS + bin)",
        "    count += found",
        "    before += tl.where(p < part, found, 0)",
        "count = tl.where(bin < EXPERTS, count, 0)",
        "end = min(num_slots, (part + 1) * chunk)",
    )


def _place(source: Source, spec: SortSpec) -> None:
    source.line(
        "padded = (count + BLOCK_M - 1) // BLOCK_M * BLOCK_M",
        "first = tl.sum(tl.where(bin < e, padded, 0))",
        "mine = tl.sum(tl.where(bin == e, count, 0))",
        "at = first" if spec.one_launch else "at = first + tl.sum(tl.where(bin == e, before, 0))",
        f"for s0 in range({'0' if spec.one_launch else 'part * chunk'}, end, BLOCK_S):",
        "    s = s0 + tl.arange(0, BLOCK_S)",
        "    hit = tl.load(id_ptr + s, mask=s < end, other=EXPERTS) == e",
        "    rank = tl.cumsum(hit.to(tl.int32), axis=0)",
        "    tl.store(slot_ptr + at + rank - 1, s, mask=hit)",
        "    at += tl.max(rank, axis=0)",
    )


def _finish(source: Source, spec: SortSpec) -> None:
    depth = 1
    if not spec.one_launch:
        source.line("if part == parts - 1:")
        depth = 2
    source.line(
        "last = first + (mine + BLOCK_M - 1) // BLOCK_M * BLOCK_M",
        "pad = first + mine + tl.arange(0, BLOCK_M)",
        "tl.store(slot_ptr + pad, num_slots + tl.zeros_like(pad), mask=pad < last)",
        "for tile in range(first // BLOCK_M, last // BLOCK_M):",
        "    tl.store(tile_expert_ptr + tile, e)",
        "tl.store(count_ptr + e, mine)",
        "if e == 0:",
        "    tl.store(num_rows_ptr, tl.sum(padded))",
        depth=depth,
    )
