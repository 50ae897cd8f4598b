"""Small placements proved best: which device holds which expert, with even or weighted shares.

Both minimise T, the heaviest device, over z[e,g] (device g holds expert e) with CP-SAT.

    weighted   sum_e w[e] [e held only inside D] <= T |D|     for every set D of devices (Hall)
    even       sum_e w[s,e] z[e,c,g] / c <= T mean[s]         z[e,c,g]: e has c replicas, one on g

Identical devices make the models symmetric; they are for tens of experts, and the searches of
expert_fill.py and expert_search.py for more.
"""

import time

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from dovetail.solvers.expert_copies import overloaded_sets
from dovetail.solvers.expert_split import split
from dovetail.solvers.solved import Solved

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_UNITS = 100_000_000
_ROUNDS = 200


def exact_weighted(
    loads: Floats, capacity: Ints, work: float = 10.0, hint: Bools | None = None
) -> Solved[Bools]:
    """Who holds what (``[expert, device]``), best for weighted shares of ``loads[expert]``.

    ``objective`` and ``bound`` are loads of the heaviest device, equal up to a hundred-thousandth
    where ``optimal``. ``hint`` is an answer to start from, returned if nothing better is
    found within ``work`` (deterministic, about seconds); without one ``value`` may hold nobody and
    the status is then ``infeasible``.
    """
    begin = time.perf_counter()
    devices, mean = len(capacity), float(loads.sum()) / len(capacity)
    units = np.rint(loads / max(mean, 1e-300) * _UNITS).astype(np.int64)
    model, z = _holding(len(loads), capacity)
    worst = model.new_int_var(_UNITS - len(loads), _UNITS * devices, "T")
    model.minimize(worst)
    cuts = [frozenset([g]) for g in range(devices)]
    best, value, bound = hint, _worst(loads, hint), mean
    for _ in range(_ROUNDS):
        for devices_cut in cuts:
            _cut(model, z, units, devices_cut, worst)
        solver = _solve(model, z, best, work)
        work -= solver.response_proto.deterministic_time
        bound = max(bound, (solver.best_objective_bound - len(loads)) / _UNITS * mean)
        if not solver.response_proto.solution:
            break
        held = np.array([[solver.boolean_value(x) for x in row] for row in z])
        if (found := _worst(loads, held)) < value:
            best, value = held, found
        cuts = overloaded_sets(units, held, int(solver.value(worst)))[:8]
        if not cuts or value <= bound * (1 + 1e-5) or work <= 0:
            break
    return _answer(best, value, bound, (len(loads), devices), begin)


def exact_even(
    loads: Floats, capacity: Ints, work: float = 10.0, hint: Bools | None = None
) -> Solved[Bools]:
    """Like ``exact_weighted``, for experts whose replicas share evenly, and for the worst of
    several scenarios: ``loads[scenario, expert]``, objective heaviest over mean device."""
    begin = time.perf_counter()
    scenarios, experts = loads.shape
    devices = len(capacity)
    ratio = loads / np.maximum(loads.sum(1, keepdims=True), 1e-300) * devices
    model, z = _holding(experts, capacity)
    most = int(min(devices, capacity.sum() - experts + 1))
    worst = model.new_int_var(_UNITS - experts, _UNITS * devices, "T")
    terms: list[list[list[object]]] = [[[] for _ in capacity] for _ in range(scenarios)]
    for e, row in enumerate(z):
        has = [model.new_bool_var("") for _ in range(most)]
        model.add_exactly_one(has)
        model.add(sum(row) == sum((c + 1) * y for c, y in enumerate(has)))
        for g, here in enumerate(row):
            one = [model.new_bool_var("") for _ in has]
            model.add(sum(one) == here)
            for c, (part, y) in enumerate(zip(one, has, strict=True)):
                model.add_implication(part, y)
                for s in range(scenarios):
                    terms[s][g].append(round(ratio[s, e] / (c + 1) * _UNITS) * part)
    for per_device in terms:
        for term in per_device:
            model.add(sum(term) <= worst)  # type: ignore[arg-type]
    model.minimize(worst)
    solver = _solve(model, z, hint, work)
    bound = max(1.0, (solver.best_objective_bound - experts) / _UNITS)
    best, value = hint, _even_worst(ratio, hint)
    if solver.response_proto.solution:
        held = np.array([[solver.boolean_value(x) for x in row] for row in z])
        if (found := _even_worst(ratio, held)) < value:
            best, value = held, found
    return _answer(best, value, bound, (experts, devices), begin)


def _holding(experts: int, capacity: Ints) -> tuple[cp_model.CpModel, list[list[cp_model.IntVar]]]:
    model = cp_model.CpModel()
    z = [[model.new_bool_var("") for _ in capacity] for _ in range(experts)]
    for row in z:
        model.add_bool_or(row)
    for g, column in enumerate(zip(*z, strict=True)):
        model.add(sum(column) <= int(capacity[g]))
    # Devices of one size are alike: the first holder of expert 0 is the first of them.
    if len(set(capacity.tolist())) == 1:
        model.add(z[0][0] == 1)
    return model, z


def _cut(
    model: cp_model.CpModel,
    z: list[list[cp_model.IntVar]],
    units: Ints,
    devices: frozenset[int],
    worst: cp_model.IntVar,
) -> None:
    terms = []
    for row, load in zip(z, units.tolist(), strict=True):
        inside = model.new_bool_var("")
        model.add_bool_or([inside, *(x for g, x in enumerate(row) if g not in devices)])
        terms.append(load * inside)
    model.add(sum(terms) <= len(devices) * worst)


def _solve(
    model: cp_model.CpModel,
    z: list[list[cp_model.IntVar]],
    hint: Bools | None,
    work: float,
) -> cp_model.CpSolver:
    model.clear_hints()  # type: ignore[no-untyped-call]
    if hint is not None:
        for (e, g), held in np.ndenumerate(hint):
            model.add_hint(z[e][g], bool(held))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 1
    solver.parameters.max_deterministic_time = max(work, 0.0)
    solver.solve(model)
    return solver


def _worst(loads: Floats, held: Bools | None) -> float:
    return float("inf") if held is None else split(loads, held).objective


def _even_worst(ratio: Floats, held: Bools | None) -> float:
    return float("inf") if held is None else float((ratio @ (held / held.sum(1)[:, None])).max())


def _answer(
    best: Bools | None, value: float, bound: float, shape: tuple[int, int], begin: float
) -> Solved[Bools]:
    seconds = time.perf_counter() - begin
    if best is None:
        return Solved(np.zeros(shape, bool), value, bound, "infeasible", seconds)
    proved = value <= bound * (1 + 1e-5)
    return Solved(best, value, min(bound, value), "optimal" if proved else "feasible", seconds)
