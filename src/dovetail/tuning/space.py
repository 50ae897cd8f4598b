"""The space of `dovetail tune`: the knobs of a schedule and the values near the planner's optimum.

A point is a value per knob. It is turned into moves by the policy ``module_batch``, of which the
other policies are cases, and by what no policy decides: the size of a disk read, threads per
worker, which tiles 16-bit products take for how many rows, for how many rows experts run in packs,
whether a pack's products are grouped, and in how many bits experts are, where fewer are allowed.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dovetail.ir import codec
from dovetail.ir.gemm_tiles import LADDERS
from dovetail.ir.moves import Bucket, ExpertFormat, Move, Overlap, Pack, Precision, Prefetch
from dovetail.ir.task_graph import ITEMSIZE, TaskGraph
from dovetail.passes.apply_moves import Layout, apply_moves
from dovetail.passes.expert_precision import with_precision
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies import module_batch
from dovetail.passes.policies.common import BLOCK, Setting, powers
from dovetail.runtime.expert_groups import GROUPED, WORD
from dovetail.runtime.pools import torch_dtype

Point = Mapping[str, int]
"""A value for each knob; truths are 0 and 1."""
REACH = 3
"""So many values to either side of the planner's are in the space."""
MIB = 1 << 20
BITS: Mapping[int, ExpertFormat | None] = {16: None, 8: "int8", 4: "int4"}
"""Bits of an expert's weights, and the format that they stand for; 16 for the model's own."""
BLOCKS = (1 * MIB, 2 * MIB, 4 * MIB, 8 * MIB, 16 * MIB)
SHORTEST_PIECE = 16
OWN = ("block", "tiles", "threads", "pack", "grouped", "bits")
"""Knobs that are not the policy's."""
PACKS = (0, 64, 256, 1024)
"""Rows of a pack of experts; with more, what lies between their products leaves the caches."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "disk": ("readers", "slots", "dense_slots", "block", "chunk", "embed"),
    "experts": ("expert_rows", "pack", "grouped", "bits", "tiles", "seqs", "prefill_tokens"),
    "groups": ("rows", "attn_tokens", "chunk_tokens", "head_rows", "workers", "threads", "refill"),
}
"""Which part of a step's time a knob acts on first."""


@dataclass(frozen=True, slots=True)
class Built:
    """A point's schedule, or by what share it exceeds the budget (``over`` > 0)."""

    moves: tuple[Move, ...] = ()
    over: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Ladders:
    """Knobs and their values in order, and a ``base`` point that has a value for every knob."""

    base: Point
    ladders: Mapping[str, tuple[int, ...]]

    @property
    def size(self) -> int:
        """How many points there are."""
        total = 1
        for values in self.ladders.values():
            total *= len(values)
        return total

    def complete(self, point: Point) -> dict[str, int]:
        """The point with the base's value for every knob that it leaves out."""
        return {**self.base, **point}

    def holds(self, point: Mapping[str, int | bool | str]) -> bool:
        """Whether every knob of the point has a value that this space has too; one that it leaves
        out, as rows from before there was such a knob do, has the base's."""
        return all(point.get(k, self.base[k]) in values for k, values in self.ladders.items())

    def neighbours(self, point: Point) -> Iterator[tuple[str, dict[str, int]]]:
        """Points one value further along one knob, with the knob."""
        for name, values in self.ladders.items():
            at = values.index(point[name])
            for step in (at - 1, at + 1):
                if 0 <= step < len(values):
                    yield name, {**point, name: values[step]}


@dataclass(frozen=True, slots=True)
class Space(Ladders):
    """The schedules for the CPU around an untuned one, whose point is the base."""

    setting: Setting

    @classmethod
    def around(
        cls, setting: Setting, untuned: Layout, allow: Sequence[ExpertFormat] = ()
    ) -> "Space":
        """The space around an untuned schedule, with experts in the formats allowed too."""
        base = point_of(untuned)
        ladders = {
            name: window(values, base[name])
            for name, values in _ladders(replace(setting, graph=untuned.graph), base).items()
            if name in base
        }
        ladders["bits"] = tuple(bits for bits, form in BITS.items() if not form or form in allow)
        kept = {name: values for name, values in ladders.items() if len(values) > 1}
        return cls(base, kept, setting)

    def build(self, point: Point) -> Built:
        """The schedule of a point."""
        form, setting = BITS[point["bits"]], self.setting
        if form is not None:
            setting = replace(setting, graph=with_precision(setting.graph, form))
        knobs = {k: v for k, v in point.items() if k not in OWN}
        made = module_batch.moves(setting, knobs | {"refill": bool(point["refill"])})
        if made is None:
            return Built(over=1.0, why="its buffers alone exceed the budget")
        moves = tuple(_adjusted(made, point))
        peak = sum(ram_bytes(apply_moves(setting.graph, moves)).values())
        if form is not None:
            moves = (Precision("experts", form), *moves)
        if peak > setting.budget:
            over = peak / setting.budget - 1
            return Built(over=over, why=f"needs {over:.1%} more than the budget")
        return Built(moves)


def point_of(layout: Layout) -> dict[str, int]:
    """The point whose schedule is, or is nearest to, a layout."""
    dispatch, admission, prefetch = layout.dispatch, layout.admission, layout.prefetch
    longest = dispatch.longest
    experts, dense = prefetch.get("experts"), prefetch.get("dense")
    point = {
        "seqs": dispatch.seqs,
        "rows": admission.rows,
        "attn_tokens": min(layout.attn_tokens, max(longest, 1 << 16)),
        "prefill_tokens": dispatch.prefill_tokens,
        "chunk_tokens": dispatch.chunk_tokens,
        "chunk": layout.chunk,
        "slots": experts.slots if experts else 2,
        "dense_slots": dense.slots if dense else 2,
        "readers": layout.readers,
        "block": experts.block if experts else BLOCK,
        "expert_rows": min(layout.expert_rows, 1 << 14),
        "pack": layout.pack,
        "head_rows": min(layout.head_rows, 1 << 14),
        "workers": layout.workers,
        "threads": layout.threads,
        "refill": int(dispatch.refill),
        "embed": int(layout.embed_resident),
        "bits": next(bits for bits, form in BITS.items() if (form or "") == layout.precision),
    }
    if dispatch.layer_groups > 1:
        point["layer_groups"] = dispatch.layer_groups
    if ITEMSIZE[layout.graph.dtype] == 2 and layout.buckets in LADDERS:
        point["tiles"] = LADDERS.index(layout.buckets)
    if takes_groups(layout.graph):
        point["grouped"] = int(layout.grouped)
    return point


def takes_groups(graph: TaskGraph) -> bool:
    """Whether some products of experts may be grouped: those without a bias, of matrices of the
    model's own type whose rows are whole words."""
    tasks = (body.experts for body in graph.bodies)
    specs = [task.experts for task in tasks if task and task.experts]
    return any(
        torch_dtype(tensor.dtype) in GROUPED
        and len(tensor.shape) == 2
        and all(size * ITEMSIZE[tensor.dtype] % WORD == 0 for size in tensor.shape)
        and not tensor.part.endswith("_bias")
        and f"{tensor.part}_bias" not in {other.part for other in spec.tensors}
        for spec in specs
        for tensor in spec.tensors
    )


def moves_digest(moves: Iterable[Move]) -> str:
    """What names a schedule: digest of its moves."""
    return codec.digest([codec.encode(move) for move in moves])


def knob_shares(classes: Mapping[str, float]) -> dict[str, float]:
    """The share of the time, by measured seconds of each class, that a knob acts on first: effort
    goes where the time goes."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for name, value in classes.items():
        kind, _, what = name.partition(":")
        if kind == "wait" and what in ("dense", "experts", "head"):
            seconds["disk"] += value
        elif kind == "run":
            seconds["experts" if "experts" in what else "groups"] += value
    total = sum(seconds.values()) or 1.0
    return {knob: seconds[group] / total for group, knobs in GROUPS.items() for knob in knobs}


def _adjusted(moves: Iterable[Move], point: Point) -> Iterator[Move]:
    for move in moves:
        match move:
            case Overlap():
                yield replace(move, threads=point["threads"])
            case Prefetch():
                yield replace(move, block=point["block"])
            case Bucket() if "tiles" in point:
                yield Bucket(LADDERS[point["tiles"]])
            case _:
                yield move
    if point["pack"]:
        yield Pack("experts", point["pack"], "grouped" if point.get("grouped") else "")


def _ladders(setting: Setting, base: Point) -> dict[str, tuple[int, ...]]:
    shared = module_batch.ladders(setting)
    cores, longest = setting.machine.workers, setting.workload.longest
    ladders: dict[str, tuple[int, ...]] = {
        name: tuple(int(value) for value in values) for name, values in shared.items()
    }
    pieces = (*powers(SHORTEST_PIECE, longest), 0) if longest > SHORTEST_PIECE else (0,)
    ladders |= {
        "chunk_tokens": pieces,
        "dense_slots": (1, 2, 3, 4),
        "readers": (1, 2, 4),
        "block": BLOCKS,
        "workers": tuple(range(1, cores + 1)),
        "pack": PACKS,
        "threads": tuple(n for n in (1, 2, 4, 8) if n * base["workers"] <= cores or n == 1),
    }
    if "tiles" in base:
        ladders["tiles"] = tuple(range(len(LADDERS)))
    if "grouped" in base:
        ladders["grouped"] = (0, 1)
    if "layer_groups" in base:
        ladders["layer_groups"] = (1, 2, 4, 8)
        ladders["chunk_tokens"] = (0,)
    return ladders


def window(values: tuple[int, ...], base: int) -> tuple[int, ...]:
    """The values at most REACH places from the base's, which is put in where it is missing."""
    if base not in values:
        # 0 stands for "whole" and comes after every size.
        place = next((i for i, v in enumerate(values) if v > base or v == 0), len(values))
        values = (*values[:place], base, *values[place:])
    at = values.index(base)
    return values[max(0, at - REACH) : at + REACH + 1]
