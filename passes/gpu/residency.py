"""GPU residency: `setting -> knobs of the integer program's answers, and its bound`.

The program (tables.py, solved by solvers/batch_residency.py) knows engines and chains of a
layer, not its schedule: its best answers are simulated and scheduled like every other candidate,
and its optimum bounds what any of them, and any other schedule of these knobs, can reach.
"""

from dataclasses import dataclass, replace

from dovetail.ir.errors import BoundError
from dovetail.ir.plan import Certificate
from dovetail.ir.workload import Workload
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.table_setting import EXPERT_ROWS, KIB, UNIT
from dovetail.passes.gpu.tables import Tables
from dovetail.passes.policies.common import Knobs
from dovetail.passes.policies.gpu import DEFAULTS, GpuSetting, moves
from dovetail.solvers.batch_residency import solve

NAME = "batch sizes and residency"
NEAR, ANSWERS = 0.03, 6
"""Answers within this share of the best are given too, at most so many."""
WORK = 6.0
"""Deterministic work of the solver, about as many seconds."""
ROUNDING = 1e-9
"""Share by which sums of seconds may differ from sums of the program's units."""
LENGTHS = 8
"""Distinct prompt lengths that the tables tell apart; more are merged."""
FIXED = ("by_load", "linears_cpu", "layer_groups", "attn_tokens", "dense_slots", "one_batch")
"""Knobs that the program leaves as they are, so that its bound holds only there."""


@dataclass(frozen=True, slots=True)
class Residency:
    """Knobs, best first, and the seconds that each takes at least; ``bound`` seconds are what no
    schedule of these knobs beats (None where the tables are not exact)."""

    knobs: tuple[Knobs, ...]
    floors: tuple[float, ...]
    bound: float | None
    work: float

    def certificate(self, seconds: float | None) -> tuple[Certificate, ...]:
        """What is proved of the best schedule that was found among these knobs.

        Raises BoundError if it takes less than the bound: then one of the two is wrong, and a
        smaller bound would hide it."""
        if self.bound is None or seconds is None:
            return ()
        if self.bound > seconds * (1 + ROUNDING):
            raise BoundError(
                f"a schedule takes {seconds:.9g} s, but the integer program of {NAME} proved that "
                f"none of its kind takes less than {self.bound:.9g} s: this is a defect of "
                "dovetail, please report it with the model's config, the machine and the workload"
            )
        # What is within rounding of the schedule is the schedule's own time.
        bound = min(self.bound, seconds)
        proved = seconds <= bound * 1.001
        work = round(self.work, 3)
        return (Certificate(NAME, seconds, bound, "optimal" if proved else "feasible", work),)


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why nothing fits: the tiers whose budgets alone leave no schedule, and the bytes that each
    tier needs at least while the others are as they are."""

    binding: tuple[str, ...]
    least: dict[str, int]


def residency(setting: GpuSetting, costs: GpuCosts, most: float | None) -> Residency:
    """The program's answers that take at most ``most`` seconds."""
    exact = len(setting.workload.lengths) <= LENGTHS and not setting.workload.routing
    if len(setting.workload.lengths) > LENGTHS:
        setting = replace(setting, workload=_merged(setting.workload))
    tables = Tables(setting, costs)
    # Beyond ``most`` by more than rounding: a schedule that is known may not look impossible.
    limit = None if most is None else int(most / UNIT * (1 + ROUNDING)) + 1
    solved = solve(
        tables,
        tables.capacities,
        floors=tables.floors(),
        near=NEAR,
        most=limit,
        work=WORK,
        blame=False,
    )
    ranked = solved.value
    if solved.status == "infeasible":
        return Residency((), (), None, ranked.effort.work)
    found = [
        (tables.knobs(choice), ticks * UNIT)
        for choice, ticks in zip(ranked.choices, ranked.objectives, strict=True)
    ][:ANSWERS]
    fitting = [
        (knobs, floor)
        for knobs, floor in found
        if any(moves(setting, each) is not None for each in leaner(knobs))
    ]
    bound = solved.bound * UNIT if exact and solved.bound is not None else None
    return Residency(
        tuple(knobs for knobs, _ in fitting),
        tuple(floor for _, floor in fitting),
        bound,
        ranked.effort.work,
    )


def shortage(setting: GpuSetting, costs: GpuCosts) -> Shortage:
    """Why no schedule of this setting fits; names no tier if some may."""
    one = replace(setting, workload=_merged(setting.workload))
    tables = Tables(one, costs)
    few = [batch for batch, sizes in enumerate(tables.batches) if sizes.seqs == 1]
    solved = solve([tables[batch] for batch in few], tables.capacities, work=WORK)
    if solved.status != "infeasible":
        return Shortage((), {})
    (blamed,) = solved.value.choices
    tiers = ("hbm", "ram")
    least = {tier: blamed.least[tier] * KIB for tier in tiers if tier in blamed.least}
    return Shortage(tuple(tier for tier in tiers if tier in blamed.binding), least)


def inside(knobs: Knobs) -> bool:
    """Whether the program's bound holds for these knobs."""
    knobs = {**DEFAULTS, **knobs}
    # Whole layers are only buffered where experts run group by group.
    buffered = (0, True), (2, False)
    return (
        all(knobs[name] == DEFAULTS[name] for name in FIXED)
        and knobs["expert_rows"] in EXPERT_ROWS
        and (int(knobs["layers"]), bool(knobs["accumulate"])) in buffered
    )


def leaner(knobs: Knobs) -> list[Knobs]:
    """The knobs with each number of rows of an expert's product: the program's answers are for any
    of them, and which is faster depends on what else fits."""
    return [{**knobs, "expert_rows": rows} for rows in EXPERT_ROWS]


def _merged(workload: Workload) -> Workload:
    """The workload with few prompt lengths: the longest, and the means of the rest."""
    if len(workload.lengths) <= LENGTHS:
        return replace(workload, routing=())
    (longest, count), *others = workload.lengths
    every = [n for n, times in others for _ in range(times)]
    part = -(-len(every) // (LENGTHS - 1))
    merged = {longest: count}
    for i in range(0, len(every), part):
        some = every[i : i + part]
        mean = round(sum(some) / len(some))
        merged[mean] = merged.get(mean, 0) + len(some)
    return Workload(tuple(sorted(merged.items(), reverse=True)), workload.new_tokens)
