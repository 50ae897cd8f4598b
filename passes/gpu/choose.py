"""Choose for a machine with a GPU: `graph, machine, budget, workload, policy -> plan`.

Every policy searches its free knobs by a short simulation; its best few are simulated in full.
``auto`` takes the best of all policies, the joint one included, which begins its search at the
others' answers: it is never predicted worse than any of them.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dovetail.ir.errors import BoundError, BudgetError, InputError
from dovetail.ir.machine import Machine
from dovetail.ir.plan import Candidate, Certificate, Plan
from dovetail.ir.task_graph import TaskGraph
from dovetail.ir.units import format_bytes
from dovetail.ir.workload import Workload
from dovetail.passes.apply_moves import apply_moves
from dovetail.passes.chosen import Chosen
from dovetail.passes.gpu.bound import gpu_bound
from dovetail.passes.gpu.cost import GpuCosts
from dovetail.passes.gpu.memory import HBM_SHARE, RAM_SHARE, tier_bytes
from dovetail.passes.gpu.overlap import QUICK, WORK, overlap
from dovetail.passes.gpu.place import place
from dovetail.passes.gpu.predict import GpuPredictor
from dovetail.passes.gpu.residency import Residency, inside, leaner, residency, shortage
from dovetail.passes.policies.common import Knobs
from dovetail.passes.policies.gpu import GPU_POLICIES, GpuPolicy, GpuSetting, ladders, moves, starts
from dovetail.solvers.ladder_search import LadderSearch

_LOG = logging.getLogger(__name__)
ENOUGH = 0.001
"""Share of its time by which another schedule must promise to be better to be looked at."""
TIED = 2
"""Schedules within that share of the best to which the other solvers are put first."""
CLIMBS, FINALISTS = 2, 4
"""Starts from which a policy's search climbs, and schedules of each policy that are simulated."""


def choose_gpu(
    graph: TaskGraph,
    machine: Machine,
    budget: Mapping[str, int],
    workload: Workload,
    policy: str = "auto",
    knobs: Knobs | None = None,
    checkpoint: str = "",
    *,
    runs: bool = False,
) -> Plan:
    """The best plan of ``policy``, or of all for ``auto``; with ``knobs`` exactly that schedule.
    One that ``runs`` has nothing that is simulated only.

    Raises BudgetError if nothing fits and InputError for an unknown policy.
    """
    if policy != "auto" and policy not in GPU_POLICIES:
        known = ", ".join(["auto", *GPU_POLICIES])
        raise InputError(f"policy {policy!r} is not known here; choose one of {known}")
    hbm, ram = int(budget["hbm"] * HBM_SHARE), int(budget["ram"] * RAM_SHARE)
    setting = GpuSetting(graph, machine, hbm, ram, workload, runs)
    search = _Search(setting, GpuCosts(machine, graph.dtype, workload.routing))
    names = list(GPU_POLICIES) if policy == "auto" else [policy]
    choices: list[Chosen] = []
    candidates: list[Candidate] = []
    for name in names:
        if name == "joint" and not knobs:
            found = search.joint(choices)
        else:
            found = search.best_of(GPU_POLICIES[name], knobs)
        choices += found
        candidates += [Candidate(c.policy, dict(c.knobs), c.prediction.seconds) for c in found]
        if not found:
            candidates.append(Candidate(name, {}, None, _refusal(budget)))
    if not choices:
        raise BudgetError(_too_small(setting, GpuCosts(machine, graph.dtype), budget))
    best = min(choices, key=lambda c: c.prediction.seconds)
    certificates: tuple[Certificate, ...] = ()
    if policy == "auto":
        # A published policy keeps its own places and order; ours may take the solvers'.
        best, certificates = search.polished(choices)
        chosen = (best.policy, dict(best.knobs))
        candidates = [
            replace(c, seconds=best.prediction.seconds) if (c.policy, c.knobs) == chosen else c
            for c in candidates
        ]
    least = gpu_bound(graph, machine, budget, workload)
    return best.plan(graph, machine, budget, workload, checkpoint, least, candidates, certificates)


class _Search:
    """Schedules of one setting; what two policies share is worked out once."""

    def __init__(self, setting: GpuSetting, costs: GpuCosts) -> None:
        self._setting, self._costs = setting, costs
        self._ladders = ladders(setting)
        self._solved = Residency((), (), None, 0.0)

    def best_of(self, policy: GpuPolicy, fixed: Knobs | None) -> list[Chosen]:
        """The policy's best schedules, simulated, best first."""
        if fixed:
            choices = self._finalists(policy, [fixed])
        else:
            choices = self._climbed(policy, list(starts(self._setting, policy)))
        return sorted(choices, key=lambda c: c.prediction.seconds)

    def joint(self, others: Sequence[Chosen]) -> list[Chosen]:
        """The best schedules of all knobs at once: the integer program's answers, and what a search
        finds around the others' schedules."""
        policy, known = GPU_POLICIES["joint"], [c.prediction.seconds for c in others]
        solved = residency(self._setting, self._costs, min(known, default=None))
        pairs = zip(solved.knobs, solved.floors, strict=True)
        answers = [(c, floor) for k, floor in pairs if (c := self._leanest(policy, k)) is not None]
        choices = [choice for choice, _ in answers]
        self._solved = replace(
            solved,
            knobs=tuple(choice.knobs for choice in choices),
            floors=tuple(floor for _, floor in answers),
        )
        points = [c.knobs for c in sorted(others, key=lambda c: c.prediction.seconds)]
        begins = [points] if answers else [list(starts(self._setting, policy)), points]
        choices += [c for b in begins if b for c in self._climbed(policy, b)]
        return sorted(choices, key=lambda c: c.prediction.seconds)

    def _leanest(self, policy: GpuPolicy, answer: Knobs) -> Chosen | None:
        """The integer program's answer with the products' rows that are fastest."""
        made = [self._simulated(policy, knobs) for knobs in leaner(answer)]
        fitting = [choice for choice in made if choice is not None]
        return min(fitting, key=lambda c: c.prediction.seconds, default=None)

    def _climbed(self, policy: GpuPolicy, begin: Sequence[Knobs]) -> list[Chosen]:
        free = {name: self._ladders[name] for name in policy.free}
        solver = LadderSearch(self._seconds, free)
        return self._finalists(policy, list(solver.solve(begin, CLIMBS).value))

    def _finalists(self, policy: GpuPolicy, points: Sequence[Knobs]) -> list[Chosen]:
        """The best few, no two with the same number of sequences in flight."""
        choices: dict[int | bool, Chosen] = {}
        for knobs in points:
            if len(choices) == FINALISTS:
                break
            if knobs["seqs"] not in choices:
                choice = self._simulated(policy, knobs)
                if choice is not None:
                    choices[knobs["seqs"]] = choice
        return list(choices.values())

    def polished(self, choices: Sequence[Chosen]) -> tuple[Chosen, tuple[Certificate, ...]]:
        """The best of all with the solvers' places and order, and what is proved: the simulated
        best, and then the integer program's answers while one may still be better."""
        tied = _tied(choices)
        made = [(*self._scheduled(choice, QUICK), choice) for choice in tied.values()]
        inner = [choice.prediction.seconds for choice, _, _ in made if inside(choice.knobs)]
        best, certificates, plain = min(made, key=lambda found: found[0].prediction.seconds)
        for knobs, floor in zip(self._solved.knobs, self._solved.floors, strict=True):
            least = min(inner, default=math.inf)
            if _key(knobs) in tied or floor >= min(least, best.prediction.seconds) * (1 - ENOUGH):
                continue
            choice = next(c for c in choices if c.knobs == knobs)
            scheduled, proved = self._scheduled(choice, QUICK)
            inner.append(scheduled.prediction.seconds)
            if scheduled.prediction.seconds < best.prediction.seconds:
                best, certificates, plain = scheduled, proved, choice
        # Only the schedule that is taken is worth all of the solver's work.
        scheduled, proved = self._scheduled(plain, WORK)
        if scheduled.prediction.seconds <= best.prediction.seconds:
            best, certificates = scheduled, proved
        inner += [best.prediction.seconds] if inside(best.knobs) else []
        inner += [c.prediction.seconds for c in choices if inside(c.knobs)]
        return best, (*self._proved(min(inner, default=None)), *certificates)

    def _proved(self, seconds: float | None) -> tuple[Certificate, ...]:
        """The program's certificate; where it is contradicted the plan stands without one."""
        try:
            return self._solved.certificate(seconds)
        except BoundError as error:
            _LOG.warning("%s; the plan stands, without proof of its batch sizes", error)
            return ()

    def _scheduled(self, choice: Chosen, work: float) -> tuple[Chosen, tuple[Certificate, ...]]:
        choice, placed = self.placed(choice)
        choice, overlapped = self.overlapped(choice, work)
        return choice, (*placed, *overlapped)

    def placed(self, choice: Chosen) -> tuple[Chosen, tuple[Certificate, ...]]:
        """The choice with the placement solver's tiers where they make it faster, and what is
        proved about them."""
        found = place(self._setting, choice.moves)
        if found is None:
            return choice, ()
        layout = apply_moves(self._setting.graph, found.moves)
        prediction = GpuPredictor(layout, self._costs).predict(self._setting.workload)
        if prediction.seconds < choice.prediction.seconds:
            choice = replace(choice, moves=found.moves, prediction=prediction)
        layout = apply_moves(self._setting.graph, choice.moves)
        return choice, (found.certificate(layout),)

    def overlapped(self, choice: Chosen, work: float) -> tuple[Chosen, tuple[Certificate, ...]]:
        """The choice with the overlap solver's pipelines where they make it faster, and what is
        proved about every loop body with so much ``work``."""
        graph, workload = self._setting.graph, self._setting.workload
        predictor = GpuPredictor(apply_moves(graph, choice.moves), self._costs)
        found = overlap(predictor, workload, work)
        moves = (*choice.moves, *found.moves)
        prediction = GpuPredictor(apply_moves(graph, moves), self._costs).predict(workload)
        if prediction.seconds < choice.prediction.seconds:
            choice = replace(choice, moves=moves, prediction=prediction)
        return choice, found.certificates

    def _seconds(self, knobs: Knobs) -> float | None:
        found = moves(self._setting, knobs)
        if found is None:
            return None
        layout = apply_moves(self._setting.graph, found)
        return GpuPredictor(layout, self._costs).estimate(self._setting.workload)

    def _simulated(self, policy: GpuPolicy, knobs: Knobs) -> Chosen | None:
        found = moves(self._setting, knobs)
        if found is None:
            return None
        layout = apply_moves(self._setting.graph, found)
        prediction = GpuPredictor(layout, self._costs).predict(self._setting.workload)
        return Chosen(policy.name, knobs, found, prediction)


def _tied(choices: Sequence[Chosen]) -> dict[str, Chosen]:
    """The best and, of what is as good as that, the next."""
    ranked = sorted(choices, key=lambda c: c.prediction.seconds)
    most = ranked[0].prediction.seconds * (1 + ENOUGH)
    tied: dict[str, Chosen] = {}
    for choice in ranked:
        if choice.prediction.seconds <= most and len(tied) < TIED:
            tied.setdefault(_key(choice.knobs), choice)
    return tied


def _key(knobs: Knobs) -> str:
    return str(sorted(knobs.items()))


def _refusal(budget: Mapping[str, int]) -> str:
    sizes = ",".join(f"{name}={format_bytes(size)}" for name, size in budget.items())
    return f"no schedule tried fits {sizes}"


def _too_small(setting: GpuSetting, costs: GpuCosts, budget: Mapping[str, int]) -> str:
    least = {name: format_bytes(size, up=True) for name, size in smallest(setting).items()}
    text = (
        f"{_refusal(budget)}; one sequence at a time needs hbm={least['hbm']} and "
        f"ram={least['ram']}: give at least that, or shorter prompts"
    )
    found, shares = shortage(setting, costs), {"hbm": HBM_SHARE, "ram": RAM_SHARE}
    needs = {tier: format_bytes(int(n / shares[tier]), up=True) for tier, n in found.least.items()}
    if found.binding:
        binding = " and ".join(found.binding)
        text += f". Proved: {binding} too small whatever the other budgets"
    if found.binding and needs:
        each = " or ".join(f"{tier}={size}" for tier, size in needs.items())
        text += f"; as they are, no less than {each} can do"
    return text


def smallest(setting: GpuSetting) -> dict[str, int]:
    """Bytes of each tier that one sequence at a time needs, everything streamed from disk."""
    roomy = replace(setting, hbm=1 << 62, ram=1 << 62)
    knobs = {**next(iter(starts(roomy, GPU_POLICIES["module_batch"]))), "resident": 0, "seqs": 1}
    found = moves(roomy, knobs)
    assert found is not None
    used = tier_bytes(apply_moves(setting.graph, found), setting.gpus)
    return {
        "hbm": int(sum(used["hbm"].values()) / HBM_SHARE),
        "ram": int((sum(used["ram"].values()) - used["ram"]["resident"]) / RAM_SHARE),
    }
