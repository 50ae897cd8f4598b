"""Costs: seconds of every task on a machine, from the symbolic costs of its operators (op_cost.py).

`Costs` turns these into seconds with the machine's measured curves: a GEMM runs at the rate of its
rows, attention at the rate of its query length or, in decode, of its KV reads, everything else at
the speed of memory, plus a fixed cost per operator.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dovetail.ir.errors import PlanError
from dovetail.ir.expr import evaluate
from dovetail.ir.gemm_tiles import tiles
from dovetail.ir.machine import LARGE_BLOCK, Curve, Machine
from dovetail.ir.task_graph import ITEMSIZE, Body, Experts, Task
from dovetail.passes.op_cost import OpCost, op_costs

ROUND_BYTES, SCALE_BYTES = 25, 16
"""Bytes read and written to round a value of a row to int8, and to scale a sum in int32, as far as
they show in the time: 0.62 and 0.35 ns where copies take 0.03 ns a byte (measured on Zen 5)."""


@dataclass(frozen=True, slots=True)
class Workers:
    """What tasks run on: ``count`` workers in a model of type ``dtype``, whose 16-bit products have
    tiles of ``buckets`` rows."""

    dtype: str
    buckets: tuple[int, ...]
    count: int


class Costs:
    """Seconds of tasks on one worker of a machine; results are remembered."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ops: dict[tuple[int, str], tuple[Body, list[OpCost]]] = {}
        self._known: dict[tuple[int, str, Workers, int, int, int], float] = {}

    def task_seconds(
        self,
        task: Task,
        body: Body,
        workers: Workers,
        *,
        seqs: int,
        q_len: int,
        past: int,
    ) -> float:
        """Seconds of a task that is not routed experts, for one group."""
        key = (id(body), task.name, workers, seqs, q_len, past)
        if key not in self._known:
            dims = {"seqs": seqs, "q_len": q_len, "past": past}
            costs = (cost for cost in self._task_costs(task, body) if cost.runs(q_len))
            self._known[key] = sum(self._op_seconds(cost, workers, dims) for cost in costs)
        return self._known[key]

    def _task_costs(self, task: Task, body: Body) -> list[OpCost]:
        key = (id(body), task.name)
        if key not in self._ops:
            weights = {w.fqn: w for w in task.weights}
            costs = [c for op in task.ops for c in op_costs(op, body.values, weights)]
            # The body stays, so that its id is not another's.
            self._ops[key] = body, costs
        return self._ops[key][1]

    def _op_seconds(self, cost: OpCost, workers: Workers, dims: dict[str, int]) -> float:
        machine, dtype = self._machine, workers.dtype
        fixed = self._fixed_seconds(workers)
        if cost.kind == "view":
            return fixed / 2
        made = evaluate(cost.made, **dims)
        if made >= LARGE_BLOCK and machine.fresh_bandwidth:
            fixed += made / machine.fresh_bandwidth
        nbytes = evaluate(cost.bytes, **dims)
        if cost.kind == "copy":
            return fixed + nbytes / machine.memory_bandwidth
        flops = evaluate(cost.flops, **dims)
        if cost.kind == "gemm":
            return fixed + self.gemm_seconds(flops, evaluate(cost.rows, **dims), workers)
        reading = 0.0
        if dims["q_len"] == 1 or dims["past"]:
            one = nbytes / dims["seqs"]
            reading = nbytes / self.curve("kv_bandwidth", dtype).at(max(one, 1.0))
        if dims["q_len"] == 1:
            return fixed + max(reading, self.absorbed_seconds(cost, workers.dtype, dims))
        # The rate counts the masked half of a causal square as done; the past has no such half.
        flops = evaluate(cost.flops, **dims | {"past": 2 * dims["past"]})
        return fixed + max(reading, flops / self.curve("attention", dtype).at(dims["q_len"]))

    def absorbed_seconds(self, cost: OpCost, dtype: str, dims: Mapping[str, int]) -> float:
        """Seconds of the arithmetic of absorbed attention, whose heads all read the same latents:
        at the best rate of attention, which counts the masked half that this has not; 0 for others,
        since the rate of KV reads was measured with their few queries for each key."""
        if cost.form != "decode":
            return 0.0
        return 2 * evaluate(cost.flops, **dims) / self.curve("attention", dtype).peak

    def _fixed_seconds(self, workers: Workers) -> float:
        """Of one operator: with several workers, each waits for its turn in the interpreter."""
        keeps = self._machine.keeps("op", "op") if workers.count > 1 else 1.0
        return self._machine.op_seconds / keeps

    def gemm_seconds(
        self, flops: float, rows: float, workers: Workers, precision: str = ""
    ) -> float:
        """Seconds of a product of ``rows`` rows, padded to tiles where the type has 16 bits; with
        a matrix of another ``precision`` than the model's, if one is named."""
        curve = self.curve("gemm", precision or workers.dtype)
        if ITEMSIZE[workers.dtype] != 2:
            return flops / curve.at(rows)
        sizes = tiles(math.ceil(rows), workers.buckets)
        return sum(size / curve.at(size) for size in sizes) * flops / rows

    def curve(self, name: str, dtype: str) -> Curve:
        """The machine's curve ``name`` for ``dtype``; raises PlanError if it was not measured."""
        curves: Mapping[str, Curve] = getattr(self._machine, name)
        if dtype not in curves:
            raise PlanError(
                f"machine {self._machine.name!r} has no {name} curve for {dtype}, found "
                f"{', '.join(curves) or 'none'}; run `dovetail calibrate` on it, or add the curve "
                "to its file"
            )
        return curves[dtype]

    def expert_seconds(
        self,
        experts: Experts,
        workers: Workers,
        rows: float,
        tile: int,
        pack: int = 0,
        grouped: bool = False,
    ) -> float:
        """Mean seconds of one expert that ``rows`` tokens choose on average, each on its own, in
        GEMMs of at most ``tile`` rows, beside others in packs of ``pack`` rows, whose products
        may be ``grouped``."""
        if rows <= 0:
            return 0.0
        spread = math.sqrt(rows)
        weights = {rows - spread: 0.25, rows: 0.5, rows + spread: 0.25}
        return sum(
            weight * self._expert_seconds(experts, workers, max(1.0, n), tile, pack, grouped)
            for n, weight in weights.items()
        )

    def _expert_seconds(
        self,
        experts: Experts,
        workers: Workers,
        rows: float,
        tile: int,
        pack: int,
        grouped: bool,
    ) -> float:
        item = ITEMSIZE[workers.dtype]
        flops = 2 * rows * experts.parameters
        moved = rows * (4 * experts.hidden + 6 * experts.intermediate) * item
        more, more_ops = _fewer_bits(experts)
        moved += rows * more
        # Products of matrices in fewer bits are never one call.
        ops = _expert_ops(rows, tile, pack, grouped and not experts.precision)
        ops += more_ops * max(1.0, rows / tile)
        ops *= self._fixed_seconds(workers)
        whole, rest = divmod(rows, tile)
        gemm = sum(
            count * self.gemm_seconds(flops * n / rows, n, workers, experts.precision)
            for count, n in ((whole, tile), (1, rest))
            if count and n
        )
        return gemm + moved / self._machine.memory_bandwidth + ops


def _fewer_bits(experts: Experts) -> tuple[float, float]:
    """Bytes that each row moves, and operators that an expert takes, beside products of matrices in
    fewer bits (``runtime.quantised``): rows are rounded once before gate and up and once before
    down, sums scaled after each. Int4's curve has all but the operators."""
    matrices = [tensor for tensor in experts.tensors if tensor.parameters]
    match experts.precision:
        case "int8":
            sums = sum(tensor.shape[1] for tensor in matrices)
            moved = ROUND_BYTES * (experts.hidden + experts.intermediate) + SCALE_BYTES * sums
            return moved, 2 * 8 + 4 * len(matrices)
        case "int4":
            return 0.0, 7 * len(matrices)
    return 0.0, 0.0


def _expert_ops(rows: float, tile: int, pack: int, grouped: bool) -> float:
    """Operators of one expert: three products, and its share of those that a pack takes together;
    a pack has some more to say which rows are whose. A product in a group takes half an operator,
    and 18 more find out where the matrices are: the two meet at 12 experts (measured)."""
    together = pack // max(1.0, rows)
    if together < 2:
        return 12 * max(1.0, rows / tile)
    return 1.5 + 34 / together if grouped and together >= 12 else 3 + 16 / together
