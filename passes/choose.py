"""Choose: `graph, machine, budget, workload, policy -> plan`.

Every policy proposes schedules for its knobs; a coarse estimate ranks them, the simulator decides
among the best of each policy. ``auto`` takes the best over all policies, so it is never predicted
worse than any of them.
"""

import math
from collections.abc import Mapping, Sequence

from dovetail.ir.errors import BudgetError, InputError
from dovetail.ir.machine import Machine
from dovetail.ir.moves import Move
from dovetail.ir.plan import Candidate, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.bound import bound
from dovetail.passes.chosen import Chosen
from dovetail.passes.cost import Costs
from dovetail.passes.gpu.buffers import with_offsets
from dovetail.passes.gpu.choose import choose_gpu
from dovetail.passes.memory import ram_bytes
from dovetail.passes.policies import POLICIES, chunked_prefill
from dovetail.passes.policies.common import Knobs, Policy, Setting
from dovetail.passes.search import Found, Search
from dovetail.passes.simulate import Simulator, workload_steps

HOPELESS = 3.0
"""A schedule this many times slower than the best so far is not simulated to its end."""
FINALISTS = 4
"""Schedules of each policy that are simulated in full."""


def choose(
    graph: TaskGraph,
    machine: Machine,
    budget: Mapping[str, int],
    workload: Workload,
    policy: str = "auto",
    knobs: Knobs | None = None,
    checkpoint: str = "",
    *,
    runs: bool = False,
    near: Sequence[Candidate] = (),
) -> Plan:
    """The best plan of ``policy``, or of all for ``auto``; with ``knobs`` exactly that schedule.
    One that ``runs`` has nothing that is simulated only. Without a GPU, candidates of another plan
    let only their policies search, ``near`` their knobs: for problems that are hardly different.

    Raises BudgetError if nothing fits, naming the smallest budget that works, and InputError for
    an unknown policy.
    """
    if machine.accelerator is not None and "hbm" in budget:
        plan = choose_gpu(graph, machine, budget, workload, policy, knobs, checkpoint, runs=runs)
        return with_offsets(plan, graph)
    if policy != "auto" and policy not in POLICIES:
        known = ", ".join(["auto", *POLICIES])
        raise InputError(f"policy {policy!r} is not known; choose one of {known}")
    setting = Setting(graph, machine, budget["ram"] - machine.process_bytes, workload)
    costs = Costs(machine)
    names = list(POLICIES) if policy == "auto" else [policy]
    begins = {name: [c.knobs for c in near if c.policy == name] for name in names}
    choices: list[Chosen] = []
    candidates: list[Candidate] = []
    for name in names if not near else [name for name in names if begins[name]]:
        best_so_far = min((c.prediction.seconds for c in choices), default=math.inf)
        search = Search(POLICIES[name], setting, costs)
        limit = HOPELESS * best_so_far
        found, tried = _best_of(setting, search, costs, knobs, limit, begins[name])
        choices += found
        candidates += tried
    if not choices:
        raise BudgetError(_too_small(setting, policy))
    best = min(choices, key=lambda c: c.prediction.seconds)
    least = bound(graph, machine, budget["ram"], workload)
    return best.plan(graph, machine, budget, workload, checkpoint, least, candidates)


def _best_of(
    setting: Setting,
    search: Search,
    costs: Costs,
    fixed: Knobs | None,
    limit: float,
    near: Sequence[Knobs],
) -> tuple[list[Chosen], list[Candidate]]:
    policy = search.policy
    one = search.attempt(fixed) if fixed else None
    found = ([one] if one else []) if fixed else _diverse(search.run(near))
    simulated = [_simulated(setting, policy, schedule, costs, limit) for schedule in found]
    choices = sorted((c for c in simulated if c), key=lambda c: c.prediction.seconds)
    if choices and not fixed and not near:
        choices = _polished(setting, policy, search, choices, costs)
    candidates = [Candidate(c.policy, dict(c.knobs), c.prediction.seconds) for c in choices]
    if found and not choices:
        why = f"given up in simulation after {limit:.1f} s, {HOPELESS:g} times the best"
        candidates.append(Candidate(policy.name, dict(found[0].knobs), None, why))
    elif not choices:
        tried = search.refused
        why = f"none of {tried} schedules tried fits ram={format_bytes(setting.budget)}"
        candidates.append(Candidate(policy.name, {}, None, why))
    return choices, candidates


def _simulated(
    setting: Setting, policy: Policy, schedule: Found, costs: Costs, limit: float
) -> Chosen | None:
    """The schedule with its prediction, or None if it takes longer than ``limit`` seconds."""
    layout = apply_moves(setting.graph, schedule.moves)
    steps = workload_steps(layout, setting.workload)
    prediction = Simulator(layout, setting.machine, costs).predict_within(steps, limit)
    if prediction is None:
        return None
    return Chosen(policy.name, schedule.knobs, schedule.moves, prediction)


def _diverse(found: list[Found]) -> list[Found]:
    """The best schedules, no two with the same number of sequences in flight."""
    chosen: dict[int | bool, Found] = {}
    for schedule in found:
        chosen.setdefault(schedule.knobs["seqs"], schedule)
    return list(chosen.values())[:FINALISTS]


def _polished(
    setting: Setting, policy: Policy, search: Search, choices: list[Chosen], costs: Costs
) -> list[Chosen]:
    """The choices, best first, after simulating the neighbours of the best: the estimate that
    ranked them knows nothing of how a run begins and ends."""
    for schedule in search.neighbours(choices[0].knobs):
        choice = _simulated(setting, policy, schedule, costs, choices[0].prediction.seconds)
        if choice is not None:
            choices.insert(0, choice)
    return choices


def _peak(setting: Setting, moves: tuple[Move, ...]) -> int:
    return sum(ram_bytes(apply_moves(setting.graph, moves)).values())


def smallest_budget(graph: TaskGraph, machine: Machine, workload: Workload) -> int:
    """Bytes of ram that the leanest schedule needs: one sequence, its prompt in short pieces, and
    one expert at a time."""
    budget, peak = 0, 1 << 62
    while peak != budget:
        # With less memory the tiles of 16-bit products are coarser, and so need less of it.
        budget = peak
        setting = Setting(graph, machine, budget, workload)
        moves = chunked_prefill.moves(setting, chunked_prefill.leanest(setting))
        assert moves is not None
        peak = _peak(setting, moves)
    return budget + machine.process_bytes


def _too_small(setting: Setting, policy: str) -> str:
    least = smallest_budget(setting.graph, setting.machine, setting.workload)
    given = setting.budget + setting.machine.process_bytes
    found = format_bytes(given)
    if least > given:
        return (
            f"a budget of ram={found} is too small for this model and workload: the leanest "
            f"schedule needs ram={format_bytes(least, up=True)}; give at least that, or shorter "
            "prompts"
        )
    return (
        f"policy {policy!r} has no schedule that fits ram={found}, though others do (the leanest "
        f"needs {format_bytes(least, up=True)}): use --policy auto"
    )
